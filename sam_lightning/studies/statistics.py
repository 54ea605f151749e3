"""The numbers of a study: means over seeds, differences seed by seed, and the published numbers beside them."""

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from sam_lightning.studies.results import Results
from sam_lightning.studies.spec import Cell, Study

COVERAGE = 0.95
_METRICS = ("best", "last", "train_loss")


def outcomes(results: Results, equal_compute: bool) -> pd.DataFrame:
    """A row per run: `cell`, `seed`, `epochs`, `best`, `last`, `train_loss`.

    At full length, `best` and `last` are test accuracies. At equal compute every run is cut to the number of epochs
    that costs as many gradients as the cheapest run of all: SAM, with two gradients a step, to its first half; a run
    with a fraction of a gradient more per step to the last whole epoch before; one that perturbs late only by what it
    has cost until then. Then `best` and `last` are accuracies on the set that was evaluated after every epoch; learning
    rate schedules are cut, not shortened.

    Args:
        results: The runs.
        equal_compute: Whether to cut.
    """
    runs = results.runs
    if not equal_compute:
        return runs[["cell", "seed", "epochs", *_METRICS]]
    gradients = runs.gradients_per_step
    unit = math.lcm(*(int(n) for n in gradients if n == int(n)))  # whole epochs of every arm with one or two a step
    budget = int((gradients * runs.epochs).min() + 1e-6) // unit * unit
    epochs = results.epochs.merge(runs[["cell", "seed"]].assign(mean=gradients), on=["cell", "seed"])
    epochs = epochs.sort_values("epoch")
    own = epochs["gradients_per_step"] if "gradients_per_step" in epochs else epochs["mean"]  # of older results
    spent = own.astype(float).fillna(epochs["mean"]).groupby([epochs.cell, epochs.seed]).cumsum()
    affordable = epochs[spent <= budget + 1e-6].groupby(["cell", "seed"]).epoch.max()
    length = runs.merge(affordable.rename("length").reset_index(), on=["cell", "seed"], how="left").length
    return _by_epochs(results, length.fillna(0).set_axis(runs.index))


def validated(results: Results) -> pd.DataFrame:
    """As `outcomes` at full length, with accuracies on the set that was evaluated after every epoch."""
    return _by_epochs(results, results.runs.epochs)


def _by_epochs(results: Results, length: pd.Series) -> pd.DataFrame:
    """Each run's first epochs, as many as `length` has for it."""
    epochs = results.epochs.merge(results.runs[["cell", "seed"]].assign(length=length), on=["cell", "seed"])
    epochs = epochs[epochs.epoch <= epochs.length].sort_values("epoch")
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
    """The published numbers of a cell after this many epochs."""
    for row in study.reference:
        is_it = row["arm"] == cell.arm and all(row.get(key) == value for key, value in cell.point)
        if is_it and row["epochs"] == epochs:
            return {metric: float(row[metric]) for metric in _METRICS if metric in row}
    return {}


def is_tested_every_epoch(results: Results) -> bool:
    """Whether the test set was evaluated after every epoch, instead of a validation set."""
    return set(results.runs.selected_on) == {"test"}
