"""Writes the README's tables from the files in `results/`, then runs the notebooks."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd

from sam_lightning.studies import sharpness
from sam_lightning.studies.report import differences, outcomes, published, summary
from sam_lightning.studies.results import read
from sam_lightning.studies.spec import load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
README = ROOT / "README.md"
# What the README shows: its name there, folder in results/, study.
SHOWN = [("A", "a", "a"), ("B", "b-64", "b"), ("C", "c", "c"), ("corrected", "corrected", "corrected")]


def results_section() -> str:
    """A row per arm, the sign and size of each arm's gain over the baseline, and the conditions of all runs."""
    rows, margins, runs = [], [], []
    for name, folder, file in SHOWN:
        study = load(str(ROOT / f"configs/studies/{file}.yaml"))
        results = read(HERE / "results" / folder)
        runs.append(results.runs.assign(study=name))
        tested_every_epoch = set(results.runs.selected_on) == {"test"}
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
        margins += margins_of(name, study, full, chosen)
        if tested_every_epoch and results.runs.gradients_per_step.nunique() > 1:
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
        studies = ", ".join(group.study.unique())
        on = "one thread" if threads == 1 else f"{threads} threads"
        versions = f"torch {torch}, lightning {lightning}, commit {commit}"
        said.append(f"{studies}: {len(group)} runs on {on} of {device}, {precision}, {versions}")
    return "; ".join(said)


def sharpness_section() -> str:
    """Sharpness by arm, and what it says of accuracy."""
    results = read(HERE / "results/sharpness")
    numbers = sharpness.summary(results.sharpness, list(results.runs.cell.unique()))
    ranks = sharpness.correlations(results.sharpness, results.runs)
    tied = ranks[(ranks.low > 0) | (ranks.high < 0)].measure
    about = (
        "At the end of training, mean ± standard deviation over seeds. Spearman's rank correlation with the test "
        f"accuracy of these {len(results.runs)} runs has a 95 % interval without 0 for {len(tied)} of {len(ranks)} "
        f"measures ({ranks.correlation.min():+.2f} to {ranks.correlation.max():+.2f})."
    )
    table = sharpness.as_text(numbers).to_markdown(index=False, disable_numparse=True)
    return "\n".join([table, "", f"{about} {conditions(results.runs.assign(study='digits'))}."])


def cost_section() -> str:
    """What SAM costs, a table for each machine that was measured."""
    tables = []
    for path in sorted((HERE / "results/cost").glob("*.json")):
        try:
            tables.append(cost_of(json.loads(path.read_text())))
        except KeyError as missing:
            raise SystemExit(f"{path} lacks {missing}: run all benchmarks, with SAM_LIGHTNING_DATA set.") from missing
    return "\n\n".join(tables)


def cost_of(measured: dict) -> str:
    info = {re.sub(r"^test_", "", entry["name"]): entry["extra_info"] for entry in measured["benchmarks"]}
    rows = []

    def add(what, name, other):
        entry = info[name]
        low, high = entry["range"][next(iter(entry["range"]))]
        work = f"{entry['batches']} batches: " if "batches" in entry else ""
        first = entry["seconds"][next(iter(entry["seconds"]))]
        rows.append(
            {
                "ours / other": what,
                "ratio": f"{entry['ratio'][other]:.3f}",
                "aim": str(entry["bound"]) if other == next(iter(entry["ratio"])) else "",
                "": "missed" if other == next(iter(entry["ratio"])) and entry["ratio"][other] > entry["bound"] else "",
                "ours": f"{work}{shown(first)} ({shown(low)} to {shown(high)})",
                "n": entry["n"],
            }
        )

    for variant in ("SAM", "ASAM"):
        add(
            f"{variant}'s step / two gradients and a step of SGD",
            f"a_step_against_its_floor[{variant}]",
            "two gradients and a step",
        )
    for network, label in (("resnet18", "ResNet-18"), ("many_small", "1,000 weights of 32x32")):
        for other in ("published loop", "barest loop", "pytorch_optimizer"):
            add(f"ascent and restoration, {label} / {other}", f"b_ascent_and_restoration[{network}]", other)
    add("`fit` with its logs and a checkpoint / a bare loop", "c_an_epoch_of_fit", "bare loop")
    for augmented, label in ((False, "plain"), (True, "crops and flips")):
        add(f"batches, {label} / torchvision, 2 workers", f"d_batches[{augmented}]", "torchvision, 2 workers")
    for name, entry in info.items():
        if name.startswith("e_"):
            add(f"study A's SAM, {next(iter(entry['seconds']))} / the paper's way", name, "the paper's way")
    seconds = info["f_startup"]["seconds"]
    more = {
        "import sam_lightning": "import torch",
        "sam-lightning --help": "import lightning.pytorch.cli",
        "sam-lightning study run --dry-run": "import torch",
    }
    starts = "; ".join(
        f"`{ours}` {seconds[ours] - seconds[other]:+.2f} s beside `{other}`" for ours, other in more.items()
    )
    parts = "; ".join(
        f"{variant}: "
        + ", ".join(
            f"{part} {shown(value)}" for part, value in info[f"h_where_the_time_goes[{variant}]"]["seconds"].items()
        )
        for variant in ("SAM", "ASAM")
    )
    factors = " and ".join(
        f"{variant}'s step takes {factor(info[f'h_where_the_time_goes[{variant}]'])}" for variant in ("SAM", "ASAM")
    )
    one, commit = info["c_an_epoch_of_fit"], measured["commit_info"]
    machine = measured["machine_info"]["cpu"].get("brand_raw", "CPU") if one["device"] == "cpu" else one["device"]
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    return "\n".join(
        [
            f"On {one['threads']} cores of {machine}, float32 where nothing else is said, {versions}, commit "
            f"{commit['id'][:12]}{' with changes' if commit['dirty'] else ''}; medians of n rounds in turn, all "
            "with freed memory kept, as the command line does. Ratios below 1: ours is faster; aim: at most.",
            "",
            pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True),
            "",
            f"{factors} times a step of SGD. Where a step's time goes (batch 128): {parts}. Start: {starts}. "
            "Memory: SAM's peak is SGD's and "
            f"{info['g_memory']['copies']:.2f} copies of the weights (aim: 1).",
        ]
    )


def factor(step: dict) -> str:
    """A step's time in steps of SGD, which are a gradient and a descent."""
    seconds = step["seconds"]
    return f"{sum(seconds.values()) / (seconds['first gradient'] + seconds['descent']):.2f}"


def shown(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def rewritten(readme: str) -> str:
    """The README with each section between its two marks made anew."""
    for name, make in (("results", results_section), ("cost", cost_section), ("sharpness", sharpness_section)):
        begin, end = f"<!-- {name}: by notebooks/regenerate.py -->\n", f"<!-- end of {name} -->"
        before, _, rest = readme.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{README} has no section between {begin.strip()} and {end}.")
        readme = f"{before}{begin}{make()}\n{end}{after}"
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README would change")
    check = parser.parse_args().check
    old = README.read_text()
    new = rewritten(old)
    if check:
        sys.exit(new != old and f"{README} is not what `python notebooks/regenerate.py` writes from the results.")
    README.write_text(new)
    notebooks = [str(path) for path in sorted(HERE.glob("*.ipynb"))]
    sys.exit(subprocess.call([sys.executable, "-m", "pytest", "--nbmake", "--overwrite", *notebooks], cwd=ROOT))


if __name__ == "__main__":
    main()
