"""Tables of a study: means over seeds, differences seed by seed, and the published numbers beside them."""

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from sam_lightning.studies import sharpness
from sam_lightning.studies.results import Results
from sam_lightning.studies.runs import runs_of
from sam_lightning.studies.spec import Cell, Study

COVERAGE = 0.95
_METRICS = ("best", "last", "train_loss")


def outcomes(results: Results, equal_compute: bool) -> pd.DataFrame:
    """A row per run: `cell`, `seed`, `epochs`, `best`, `last`, `train_loss`.

    At full length, `best` and `last` are test accuracies. At equal compute every run is cut to the number of epochs
    that costs as many gradients as the cheapest run of all: SAM, with two gradients a step, to its first half. Then
    `best` and `last` are accuracies on the set that was evaluated after every epoch; learning rate schedules are cut,
    not shortened.

    Args:
        results: The runs.
        equal_compute: Whether to cut.
    """
    runs = results.runs
    if not equal_compute:
        return runs[["cell", "seed", "epochs", *_METRICS]]
    cost = runs.gradients_per_step * runs.epochs
    unit = math.lcm(*runs.gradients_per_step)  # whole epochs of every arm
    allowed = (cost.min() // unit * unit // runs.gradients_per_step).rename("allowed")
    epochs = results.epochs.merge(runs[["cell", "seed"]].assign(allowed=allowed), on=["cell", "seed"])
    epochs = epochs[epochs.epoch <= epochs.allowed].sort_values("epoch")
    by_run = epochs.groupby(["cell", "seed"], sort=False)
    return by_run.agg(
        epochs=("epoch", "max"), best=("accuracy", "max"), last=("accuracy", "last"), train_loss=("train_loss", "last")
    ).reset_index()


def summary(study: Study, outcome: pd.DataFrame) -> pd.DataFrame:
    """A row per cell: n, epochs, mean and standard deviation (n - 1) of best, last and training loss.

    Accuracies are in percent. With published numbers, what they are and how far ours lie above, where both are of
    the same number of epochs.
    """
    rows = []
    for cell in study.cells():
        of_it = outcome[outcome.cell == cell.label]
        if of_it.empty:
            continue
        row: dict[str, Any] = {"cell": cell.label, "n": len(of_it), "epochs": int(of_it.epochs.min())}
        for metric in _METRICS:
            values = of_it[metric] * (100 if metric != "train_loss" else 1)
            row |= {metric: values.mean(), f"{metric}_sd": values.std(ddof=1)}
        for metric, value in published(study, cell, row["epochs"]).items():
            row |= {f"published_{metric}": value, f"{metric}_difference": row[metric] - value}
        rows.append(row)
    return pd.DataFrame(rows)


def differences(study: Study, outcome: pd.DataFrame) -> pd.DataFrame:
    """A row per arm other than the baseline: its accuracy minus the baseline's, seed by seed, in percentage points.

    Seeds that both have are compared; `low` and `high` bound the mean with 95 % confidence: mean -+ t sd / sqrt(n),
    with t of Student's distribution with n - 1 degrees of freedom. They take the differences for normal.
    """
    rows = []
    labels = {cell.label for cell in study.cells()}
    for cell in study.cells():
        base = next((name for point in (cell.point, ()) if (name := Cell(study.baseline, point).label) in labels), None)
        if cell.arm == study.baseline or base is None:
            continue
        ours, theirs = (outcome[outcome.cell == label].sort_values("seed") for label in (cell.label, base))
        pairs = ours.merge(theirs, on="seed", suffixes=("", "_0"))
        for metric in ("best", "last"):
            values = 100 * (pairs[metric] - pairs[f"{metric}_0"]).dropna()
            n = len(values)
            if not n:
                continue
            half = student.ppf((1 + COVERAGE) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
            rows.append(
                {
                    "cell": cell.label,
                    "baseline": base,
                    "epoch": metric,
                    "n": n,
                    "mean": values.mean(),
                    "low": values.mean() - half,
                    "high": values.mean() + half,
                    "by_seed": " ".join(
                        f"{seed}:{v:+z.2f}" for seed, v in zip(pairs.seed[values.index], values, strict=True)
                    ),
                }
            )
    return pd.DataFrame(rows)


def published(study: Study, cell: Cell, epochs: int) -> dict[str, float]:
    """The published numbers of a cell after so many epochs."""
    for row in study.reference:
        is_it = row["arm"] == cell.arm and all(row.get(key) == value for key, value in cell.point)
        if is_it and row["epochs"] == epochs:
            return {metric: float(row[metric]) for metric in _METRICS if metric in row}
    return {}


def tables(study: Study, results: Results) -> dict[str, tuple[str, pd.DataFrame, pd.DataFrame]]:
    """All tables: by file name, the caption, the numbers, and the numbers as text."""
    at = _evaluated(results)
    full = outcomes(results, equal_compute=False)
    found = {
        "accuracy": (f"Test accuracy (%) and training loss at full length. {_selection(results)}", full, _as_summary),
        "differences": (
            f"Test accuracy minus {study.baseline}'s, in percentage points, paired by seed.",
            full,
            _as_pairs,
        ),
    }
    cut = outcomes(results, equal_compute=True)
    if results.runs.gradients_per_step.nunique() > 1 and len(cut):
        found |= {
            "equal-compute": (
                f"{at} (%) at equal compute: as many gradients per training image in every run.",
                cut,
                _as_summary,
            ),
            "equal-compute-differences": (f"{at} minus {study.baseline}'s at equal compute.", cut, _as_pairs),
        }
    made = {}
    for name, (caption, outcome, form) in found.items():
        numbers, text = form(study, outcome)
        if len(numbers):
            made[name] = (caption, numbers, text)
    return made | _sharpness_tables(study, results)


def _sharpness_tables(study: Study, results: Results) -> dict[str, tuple[str, pd.DataFrame, pd.DataFrame]]:
    if results.sharpness.empty:
        return {}
    numbers = sharpness.summary(results.sharpness, [cell.label for cell in study.cells()])
    ranks = sharpness.correlations(results.sharpness, results.runs)
    return {
        "sharpness-by-arm": (
            "Sharpness of the training loss at the end of training, on "
            f"{' or '.join(map(str, sorted(set(results.sharpness.samples))))} training samples.",
            numbers,
            sharpness.as_text(numbers),
        ),
        "sharpness-accuracy": (
            "Rank correlation (Spearman) of sharpness with the test accuracy of the last epoch over all measured runs. "
            "The interval takes runs for independent, which those of one arm are not.",
            ranks,
            sharpness.correlations_as_text(ranks),
        ),
    }


def missing(study: Study, results: Results) -> list[str]:
    """Labels of the runs that are not among the results."""
    there = set(zip(results.runs.cell, results.runs.seed, strict=True)) if len(results.runs) else set()
    return [f"{run.cell.label}, seed {run.seed}" for run in runs_of(study) if (run.cell.label, run.seed) not in there]


def _evaluated(results: Results) -> str:
    return "Test accuracy" if set(results.runs.selected_on) == {"test"} else "Validation accuracy"


def _selection(results: Results) -> str:
    if set(results.runs.selected_on) == {"test"}:
        return "The test set was evaluated after every epoch and chose the best one."
    return "The validation set chose the best epoch."


def _as_summary(study: Study, outcome: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    numbers = summary(study, outcome)
    rows = []
    for row in numbers.to_dict("records"):
        text = {
            "arm": row["cell"],
            "n": str(row["n"]),
            "epochs": str(row["epochs"]),
            "best epoch": _spread(row["best"], row["best_sd"], ".2f"),
            "last epoch": _spread(row["last"], row["last_sd"], ".2f"),
            "training loss": _spread(row["train_loss"], row["train_loss_sd"], ".3g"),
        }
        for metric, name, form in (("best", "best", ".2f"), ("last", "last", ".2f"), ("train_loss", "loss", ".3g")):
            if f"published_{metric}" in row:
                text[f"published {name}"] = _number(row[f"published_{metric}"], form)
                text[f"{name}: ours - published"] = _number(row[f"{metric}_difference"], f"+z{form}")
        rows.append(text)
    return numbers, pd.DataFrame(rows)


def _as_pairs(study: Study, outcome: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    numbers = differences(study, outcome)
    rows = [
        {
            "arm": row["cell"],
            "minus": row["baseline"],
            "epoch": row["epoch"],
            "n": str(row["n"]),
            "mean": _number(row["mean"], "+z.2f"),
            "95 % interval": f"{row['low']:+z.2f} to {row['high']:+z.2f}" if row["n"] > 1 else "",
            "by seed": row["by_seed"],
        }
        for row in numbers.to_dict("records")
    ]
    return numbers, pd.DataFrame(rows)


def _spread(mean: float, sd: float, form: str) -> str:
    return _number(mean, form) + ("" if np.isnan(sd) else f" ± {sd:{form}}")


def _number(value: float, form: str) -> str:
    return "" if value is None or np.isnan(value) else f"{value:{form}}"
