"""Which method: what the study `methods` and one published comparison say, as Markdown."""

import json
from dataclasses import replace

import pandas as pd
from study_tables import HERE, STUDIES, conditions, spread

from sam_lightning.studies import sharpness_statistics
from sam_lightning.studies.results import Results, read
from sam_lightning.studies.spec import Study, load
from sam_lightning.studies.statistics import differences, outcomes, summary, validated

FOLDER = HERE / "results/methods"
RHO = "model.optimizer.rho"
# M. Becker, F. Altrock, B. Risse. Momentum-SAM. arXiv 2401.12033, tables 1, 3 and A.2: CIFAR-100, 200 epochs, every
# method's best radius by a scan; test accuracy (%) on three networks, and speed relative to SGD where it is given.
NETWORKS = ("WRN-28-10", "WRN-16-4", "ResNet-50")
PUBLISHED = {
    "SGD": ((81.51, 76.90, 81.46), 1.0),
    "SAM": ((84.16, 79.25, 83.36), 0.52),
    "ASAM": ((84.74, 79.96, 83.30), None),
    "SAM-ON": ((84.57, 79.73, 84.51), None),
    "MSAM": ((83.21, 79.11, 82.65), 0.99),
    "LookSAM": ((83.31, 79.00, 82.24), 0.84),
}


def methods_section() -> str:
    """Our table, what follows from it, the published table, and the limits of both."""
    study, results = load(str(STUDIES / "methods.yaml")), read(FOLDER)
    refuse_other_radii(study)
    parts = [
        *(f"- {sentence}" for sentence in [*advice(study, results), *published_findings(), limits(results)]),
        "",
        our_table(study, results),
        "",
        *(f"- {sentence}" for sentence in findings(study, results)),
        "",
        about(study, results),
        "",
        published_table(),
    ]
    return "\n".join(parts)


def refuse_other_radii(study: Study) -> None:
    """The study's radii must be those that validation data chose."""
    for arm, rho in chosen_radii().items():
        ours = study.arms[arm].set[RHO]
        if ours != rho:
            raise SystemExit(f"methods.yaml gives {arm} rho {ours}; results/methods-radius choose {rho}.")


def radius_means() -> pd.DataFrame:
    """Validation accuracy (%) at the last epoch: `cell`, `mean`, n (`count`)."""
    last = validated(read(HERE / "results/methods-radius")).groupby("cell", sort=False)["last"]
    return (100 * last.mean()).round(6).to_frame("mean").assign(count=last.count())


def chosen_radii() -> dict[str, float]:
    """By arm, the radius with the best mean of those that were tried with the most seeds; of equal ones the smaller."""
    radius, means = load(str(STUDIES / "methods-radius.yaml")), radius_means()
    found = {}
    for arm in radius.arms:
        tried = {cell.point[0][1]: means.loc[cell.label] for cell in radius.cells() if cell.arm == arm}
        most = max(row["count"] for row in tried.values())
        found[arm] = max((rho for rho in tried if tried[rho]["count"] == most), key=lambda rho: tried[rho]["mean"])
    return found


def our_table(study: Study, results: Results) -> str:
    full, cut = (summary(study, outcomes(results, at)).set_index("cell") for at in (False, True))
    cost = results.runs.groupby("cell").gradients_per_step.mean()
    times, copies = measured_steps()
    sharp = sharpness_statistics.summary(results.sharpness, list(full.index)).set_index(["measure", "cell"])
    rows = []
    for arm, row in full.iterrows():
        half, eigenvalue = cut.loc[arm], sharp.loc[("largest_eigenvalue", arm)]
        rows.append(
            {
                "method": arm,
                "rho": f"{study.arms[arm].set.get(RHO, ''):}",
                "gradients a step": f"{cost[arm]:.3g}",
                "time a step / SGD's": " / ".join(f"{t[arm]:.2f}" for t in times),
                "copies of the weights": f"{copies[arm]:.1f}" if arm in copies else "",
                "last epoch": spread(row["last"], row.last_sd, 1),
                "at equal compute": f"{spread(half['last'], half.last_sd, 1)} (epoch {half.epochs:.0f})",
                "largest eigenvalue": f"{eigenvalue['mean']:.3g} ± {eigenvalue.sd:.2g}",
                "n": f"{row.n:.0f}",
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def benchmarks() -> dict[str, dict]:
    """What `tests/benchmarks/test_methods.py` measured, by the name of the measurement."""
    entries = [entry for path in FOLDER.glob("*.json") for entry in json.loads(path.read_text())["benchmarks"]]
    return {entry["name"]: entry["extra_info"] for entry in entries}


def measured_steps() -> tuple[list[dict[str, float]], dict[str, float]]:
    """Time of a step in steps of SGD, on the digits' network and on ResNet-18, and its memory beside SGD's."""
    found = benchmarks()
    times = [found[f"test_i_methods[{network}]"]["times SGD's"] for network in ("digits", "resnet18")]
    return times, found["test_i_memory"]["copies"]


def compared(study: Study, results: Results, baseline: str, equal_compute: bool) -> dict[str, list[str]]:
    """Arms that end ahead of the baseline, behind it, or neither, by the 95 % interval over pairs of one seed."""
    table = differences(replace(study, baseline=baseline), outcomes(results, equal_compute))
    found: dict[str, list[str]] = {"ahead": [], "behind": [], "not told apart": [], "too few seeds": []}
    for row in table[table.epoch == "last"].to_dict("records"):
        side = "ahead" if row["low"] > 0 else "behind" if row["high"] < 0 else "not told apart"
        if row["n"] < 3 or row["high"] - row["low"] < 1e-3:  # differences of whole images may agree by chance
            side = "too few seeds"
        interval = f" [{row['low']:+.1f}, {row['high']:+.1f}]" if row["n"] > 1 else ""
        found[side].append(f"{row['cell']} ({row['mean']:+.1f}{interval})")
    return found


def advice(study: Study, results: Results) -> list[str]:
    """What the table says by what a step costs, and beside SAM."""
    full = summary(study, outcomes(results, equal_compute=False)).set_index("cell")
    cost = results.runs.groupby("cell").gradients_per_step.mean().round(2)
    sentences = []
    for gradients in sorted(set(cost)):
        arms = full[full.index.map(cost) == gradients].sort_values("last", ascending=False)
        accuracies = ", ".join(f"{arm} {mean:.1f}" for arm, mean in arms["last"].items())
        sentences.append(
            f"**For {gradients:g} gradient{'s' * (gradients != 1)} a step** (test accuracy, %): {accuracies}."
        )
    full_length, cut = (", ".join(compared(study, results, "SAM", at)["ahead"]) or "nothing" for at in (False, True))
    sentences.append(
        "**Begin with SAM, then try what is ahead of it.** Ahead of SAM here, in points: at the last epoch "
        f"{full_length}; at equal compute {cut}."
    )
    return sentences


def limits(results: Results) -> str:
    seeds = " or ".join(map(str, sorted(results.runs.groupby("cell").seed.nunique().unique())))
    return (
        f"**Limits**: n = {seeds}; one small network with batch normalisation, 1,437 training images of 8x8, one "
        "learning rate, 30 epochs, other constants at their defaults; no correction for many comparisons. What is "
        "rewarded here is not to memorise wrong labels. The published table has neither GSAM nor WSAM, FriendlySAM or "
        "VaSSO."
    )


def findings(study: Study, results: Results) -> list[str]:
    """Sentences about the table, each word computed."""
    sentences = []
    for baseline, equal_compute in (("SGD", False), ("SGD", True), ("SAM", False), ("SAM", True)):
        found = compared(study, results, baseline, equal_compute)
        where = "at equal compute" if equal_compute else "at the last epoch"
        said = [f"{side}: {', '.join(arms)}" for side, arms in found.items() if arms]
        sentences.append(f"**Beside {baseline}, {where}** (points): {'; '.join(said)}.")
    ranks = sharpness_statistics.correlations(results.sharpness, results.runs)
    flat = ranks[ranks.high < 0].measure.str.replace("_", " ")
    sharp = ranks[ranks.low > 0].measure.str.replace("_", " ")
    sentences.append(
        f"**Sharpness and test accuracy** of these {len(results.runs)} runs (Spearman's rank correlation with its 95 % "
        f"interval): of {len(ranks)} measures {len(flat)} are lower where accuracy is higher ("
        f"{', '.join(flat) or 'none'}), and {len(sharp)} are higher ({', '.join(sharp) or 'none'})."
    )
    return sentences


def about(study: Study, results: Results) -> str:
    means = radius_means()
    seeds = "n = " + " or ".join(map(str, sorted(results.runs.groupby("cell").seed.nunique().unique())))
    tried = " or ".join(map(str, sorted(means["count"].unique())))
    samples = " or ".join(map(str, sorted(results.sharpness.samples.unique())))
    digits, resnet = (benchmarks()[f"test_i_methods[{network}]"]["n"] for network in ("digits", "resnet18"))
    return (
        f"Test accuracy (%), mean ± standard deviation over seeds, {seeds}; differences with their 95 % interval over "
        f"pairs of one seed. Radii by validation accuracy, {tried} other seeds for each value "
        f"(SAM, ASAM: by the study `rho`). Gradients: counted. "
        f"Time: median ratio to SGD's of {digits} rounds in turn on the digits' network / "
        f"{resnet} on ResNet-18 (32x32, batch 32), on a busy machine. Memory: the most "
        f"that lives in a step beside what SGD needs. Largest eigenvalue: of the training loss at the end, wrong "
        f"labels included, on {samples} samples. {conditions(results.runs.assign(study=''))}."
    )


def published_table() -> str:
    rows = [
        {"method": method, **{n: f"{v:.2f}" for n, v in zip(NETWORKS, values, strict=True)}, "speed": speed or ""}
        for method, (values, speed) in PUBLISHED.items()
    ]
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    return (
        "Published elsewhere (arXiv 2401.12033, by MSAM's authors): CIFAR-100, 200 epochs, every radius by a scan, "
        f"test accuracy (%); speed relative to SGD; the number of seeds is not given.\n\n{table}"
    )


def published_findings() -> list[str]:
    """How the published numbers are ordered."""
    sam, sgd = PUBLISHED["SAM"][0], PUBLISHED["SGD"][0]

    def above(method: str, other: tuple[float, ...]) -> int:
        return sum(ours > theirs for ours, theirs in zip(PUBLISHED[method][0], other, strict=True))

    others = [method for method in PUBLISHED if method not in ("SGD", "SAM")]
    beside = ", ".join(
        f"{method} is above SAM on {above(method, sam)} of {len(NETWORKS)} networks" for method in others
    )
    least = min(above(m, sgd) for m in others)
    return [f"**Published on CIFAR-100** (last table): {beside}; each is above SGD on at least {least}."]
