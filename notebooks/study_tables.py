"""What the studies came to, as Markdown, from the CSV files in `results`."""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from sam_lightning.studies import sharpness_statistics
from sam_lightning.studies.conclusions import conclusions
from sam_lightning.studies.results import missing, read
from sam_lightning.studies.spec import load
from sam_lightning.studies.statistics import (
    differences,
    is_tested_every_epoch,
    outcomes,
    published,
    summary,
    validated,
)

HERE = Path(__file__).resolve().parent
STUDIES = HERE.parent / "configs/studies"
# The paper's studies: name, folder in results/, study.
PAPER = [
    ("A", "a", "a"),
    ("A longer", "a-h200", "a"),
    ("A longest", "a-h200-seed-20", "a"),
    ("B", "b-64", "b"),
    ("C", "c", "c"),
    ("corrected", "corrected", "corrected"),
]
# Those of which sharpness was measured: name, folder in results/, the two arms that are compared.
MEASURED = [
    ("A", "a-sharpness", "SGD, batch size 128", "SAM, batch size 128"),
    ("B", "b-sharpness", "SGD, batch size 64", "SAM, batch size 64"),
    ("C", "c-sharpness", "SAM", "ASAM"),
]


def quickstart_section() -> str:
    """A row per arm with accuracies at full length and at equal compute, and what follows in words."""
    study, results = load(str(STUDIES / "quickstart.yaml")), read(HERE / "results/quickstart")
    full, cut = (summary(study, outcomes(results, equal_compute)).set_index("cell") for equal_compute in (False, True))
    rows = [
        {
            "": arm,
            f"last of {full.epochs.max()} epochs": spread(row["last"], row.last_sd, 1),
            "best epoch": spread(row.best, row.best_sd, 1),
            "at equal compute": f"{spread(cut.loc[arm, 'last'], cut.loc[arm].last_sd, 1)} (epoch {cut.epochs[arm]})",
            "training loss": spread(row.train_loss, row.train_loss_sd, 2),
        }
        for arm, row in full.iterrows()
    ]
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    words = "\n".join(f"- {sentence}" for sentence in conclusions(study, results))
    about = (
        f"Test accuracy (%), mean ± standard deviation over {full.n.max()} seeds; the best epoch is the test set's "
        f"choice. {conditions(results.runs.assign(study=''))}."
    )
    return f"{table}\n\n{words}\n\n{about}"


def results_section() -> str:
    """The paper's studies: a row per arm, each arm's gain over the baseline, and the conditions of all runs."""
    rows, margins, runs = [], [], []
    for name, folder, file in PAPER:
        study = load(str(STUDIES / f"{file}.yaml"))
        results = read(HERE / "results" / folder)
        runs.append(results.runs.assign(study=name))
        tested_every_epoch = is_tested_every_epoch(results)
        chosen = "last" if tested_every_epoch else "best"
        full = outcomes(results, equal_compute=False)
        for _, row in summary(study, full).iterrows():
            theirs = published(study, next(c for c in study.cells() if c.label == row.cell), int(row.epochs))
            rows.append(
                {
                    "study": name,
                    "arm": row.cell,
                    "epochs": int(row.epochs),
                    "n": int(row.n),
                    "test accuracy (%)": spread(row[chosen], row[f"{chosen}_sd"], 2),
                    "authors' accuracy": f"{theirs[chosen]:.2f}" if theirs else "",
                    "training loss": spread(row.train_loss, row.train_loss_sd, 3),
                    "authors' loss": f"{theirs['train_loss']:.3f}" if theirs else "",
                }
            )
        lengths = results.runs.epochs
        if lengths.nunique() > 1:  # arms that were stopped at equal compute
            shortest = replace(results, runs=results.runs.assign(epochs=lengths.min()))
            margins += margins_of(name, study, validated(shortest), chosen)
        margins += margins_of(name, study, full, chosen)
        if tested_every_epoch and lengths.nunique() == 1 and results.runs.gradients_per_step.nunique() > 1:
            margins += margins_of(name, study, outcomes(results, equal_compute=True), chosen)
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    about = (
        "Accuracy at the last epoch (corrected: at the one that the validation split chose), mean ± standard deviation "
        "over seeds, [95 % by Student's t over pairs of one seed]."
    )
    return "\n".join([table, "", *margins, "", f"{about} {conditions(pd.concat(runs))}."])


def margins_of(name, study, outcome, chosen):
    """Each arm's accuracy at the chosen epoch minus the baseline's, ours and the authors'."""
    cells = {cell.label: cell for cell in study.cells()}
    epochs = outcome.groupby("cell").epochs.min()
    pairs = differences(study, outcome)
    for _, pair in (pairs[pairs.epoch == chosen] if len(pairs) else pairs).iterrows():
        both = [published(study, cells[label], int(epochs[label])) for label in (pair.cell, pair.baseline)]
        theirs = f"; authors: {both[0][chosen] - both[1][chosen]:+.2f}" if all(both) else ""
        interval = f" [{pair.low:+.2f}, {pair.high:+.2f}]" if pair.n > 1 else ""
        ours, base = (epochs[label] for label in (pair.cell, pair.baseline))
        how = f"equal epochs ({ours})" if ours == base else f"equal compute ({ours} and {base} epochs)"
        gain = f"{pair['mean']:+.2f}{interval} points, n = {pair.n}{theirs}"
        yield f"- {name}, {how}: {pair.cell} - {pair.baseline}: {gain}"


def spread(mean: float, deviation: float, digits: int) -> str:
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation == deviation else "")


def conditions(runs: pd.DataFrame) -> str:
    """Precision, hardware, versions and commit."""
    columns = ["device", "threads", "precision", "torch", "lightning", "commit"]
    said = []
    for values, group in runs.groupby(columns, sort=False):
        device, threads, precision, torch, lightning, commit = values
        studies = "".join(f"{study}, " for study in group.study.unique() if study).removesuffix(", ")
        on = "one thread" if threads == 1 else f"{threads} threads"
        versions = f"torch {torch}, lightning {lightning}, commit {commit}"
        of = f"{studies}: " if studies else ""
        said.append(f"{of}{len(group)} runs on {on} of {device}, {precision}, {versions}")
    return "; ".join(said)


def label_noise_section() -> str:
    """A row per arm and noise with accuracies at the last epoch, and what follows in words."""
    study, results = load(str(STUDIES / "label-noise.yaml")), read(HERE / "results/label-noise")
    rows = summary(study, outcomes(results, equal_compute=False))
    table = pd.DataFrame(
        {
            "": row.cell,
            "n": int(row.n),
            "epochs": int(row.epochs),
            "last epoch": spread(row["last"], row.last_sd, 1),
            "best epoch": spread(row.best, row.best_sd, 1),
            "training loss": spread(row.train_loss, row.train_loss_sd, 2),
        }
        for _, row in rows.iterrows()
    ).to_markdown(index=False, disable_numparse=True)
    words = "\n".join(f"- {sentence}" for sentence in [*memory(rows), *conclusions(study, results)])
    absent = missing(study, results)
    about = (
        "Test accuracy (%), mean ± standard deviation over seeds; the best epoch is the test set's choice. "
        f"{len(results.runs)} of {len(results.runs) + len(absent)} runs were made, in "
        f"{results.epochs.seconds.sum() / 3600:.1f} hours of training on one core: "
        f"{conditions(results.runs.assign(study=''))}."
    )
    return f"{table}\n\n{words}\n\n{about}"


def memory(rows: pd.DataFrame):
    """What SGD knew at its best epoch, and at the last, when it fits the labels that it was given."""
    for _, row in rows[rows.cell.str.startswith("SGD")].iterrows():
        lost = row.best - row["last"]
        what = f"has {'lost' if lost > 0 else 'gained'} {abs(lost):.1f} points of test accuracy since its best epoch"
        yield f"At the end {row.cell} {what}, with a training loss of {row.train_loss:.2f}."


def sharpness_section() -> str:
    """Sharpness by arm, and what it says of accuracy."""
    results = read(HERE / "results/sharpness")
    numbers = sharpness_statistics.summary(results.sharpness, list(results.runs.cell.unique()))
    ranks = sharpness_statistics.correlations(results.sharpness, results.runs)
    tied = ranks[(ranks.low > 0) | (ranks.high < 0)].measure
    about = (
        "At the end of training, mean ± standard deviation over seeds. Spearman's rank correlation with the test "
        f"accuracy of these {len(results.runs)} runs has a 95 % interval without 0 for {len(tied)} of {len(ranks)} "
        f"measures ({ranks.correlation.min():+.2f} to {ranks.correlation.max():+.2f})."
    )
    table = sharpness_statistics.as_text(numbers).to_markdown(index=False, disable_numparse=True)
    return "\n".join([table, "", f"{about} {conditions(results.runs.assign(study='digits'))}."])


def cifar_sharpness_section() -> str:
    """Sharpness of the paper's runs that were measured, and how often the second arm of a study has less of it."""
    tables, said, runs = [], [], []
    for name, folder, first, second in MEASURED:
        results = read(HERE / "results" / folder)
        runs.append(results.runs.assign(study=name))
        numbers = sharpness_statistics.summary(results.sharpness, list(results.runs.cell.unique()))
        epochs = ", ".join(str(count) for count in sorted(results.runs.epochs.unique()))
        text = sharpness_statistics.as_text(numbers).set_index("measure")
        tables.append(text.rename(columns=lambda cell, name=name, epochs=epochs: f"{name}, {epochs} epochs: {cell}"))
        values = results.sharpness.pivot_table(index="measure", columns="cell", values="value")
        if {first, second} <= set(values.columns):
            less = (values[second] < values[first]).sum()
            said.append(
                f"- {name}: of {len(values)} measures {less} are lower for {second} than for {first}; the ratios are "
                f"{(values[second] / values[first]).min():.2f} to {(values[second] / values[first]).max():.2f}."
            )
    table = pd.concat(tables, axis=1).reset_index().to_markdown(index=False, disable_numparse=True)
    about = (
        "Of the training loss on 1000 training samples at the end of training, by the key `sharpness` of the studies."
    )
    return "\n".join([table, "", *said, "", f"{about} {conditions(pd.concat(runs))}."])
