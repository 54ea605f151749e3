"""Sharpness in a study: read from its runs, compared between arms, and set against test accuracy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm, spearmanr

from sam_lightning.runs.directory import SHARPNESS
from sam_lightning.studies.spec import StudyError

COVERAGE = 0.95


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """A row per measure of a run: `measure`, `value`, `standard_error`, `samples`; none if it was not measured.

    Raises:
        StudyError: If the file is damaged.
    """
    path = directory / SHARPNESS
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text())
        return [
            {
                "measure": name,
                "value": float(row["value"]),
                "standard_error": row["standard_error"],
                "samples": content["samples"],
            }
            for name, row in content["measures"].items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise StudyError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Remove it and measure the run again: "
            f"sam-lightning sharpness --ckpt_path {directory}."
        ) from error


def correlations(sharpness: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    r"""A row per measure: Spearman's rank correlation with the test accuracy of the last epoch, over all runs.

    `low` and `high` bound it with 95 % confidence by $\tanh(\mathrm{atanh}\, r \mp z \sqrt{(1 + r^2/2) / (n - 3)})$,
    as if runs were drawn independently. Runs of one arm are alike, so that with few arms the correlation says
    little more than how the arms are ordered.

    Reference:
        D. G. Bonett, T. A. Wright. Sample size requirements for estimating Pearson, Kendall and Spearman
        correlations. Psychometrika 65, 2000.
    """
    joined = sharpness.merge(runs[["cell", "seed", "last"]], on=["cell", "seed"]).dropna(subset=["value", "last"])
    rows = []
    for measure, of_it in joined.groupby("measure", sort=False):
        n = len(of_it)
        varies = of_it.value.nunique() > 1 and of_it["last"].nunique() > 1
        r = float(spearmanr(of_it.value, of_it["last"]).statistic) if varies else np.nan
        low = high = np.nan
        if n > 3 and abs(r) < 1:
            half = norm.ppf((1 + COVERAGE) / 2) * np.sqrt((1 + r**2 / 2) / (n - 3))
            low, high = np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half)
        rows.append({"measure": measure, "n": n, "correlation": r, "low": low, "high": high})
    return pd.DataFrame(rows)


def summary(sharpness: pd.DataFrame, cells: list[str]) -> pd.DataFrame:
    """A row per cell and measure: n, mean and standard deviation (n - 1) over seeds."""
    rows = []
    for cell in cells:
        for measure, of_it in sharpness[sharpness.cell == cell].groupby("measure", sort=False):
            rows.append(
                {
                    "cell": cell,
                    "measure": measure,
                    "n": len(of_it),
                    "mean": of_it.value.mean(),
                    "sd": of_it.value.std(ddof=1),
                }
            )
    return pd.DataFrame(rows)


def as_text(numbers: pd.DataFrame) -> pd.DataFrame:
    """The summary as it is read: a row per measure, a column per cell."""
    rows: dict[str, dict[str, str]] = {}
    for row in numbers.to_dict("records"):
        spread = "" if np.isnan(row["sd"]) else f" ± {row['sd']:.2g}"
        text = f"{row['mean']:.3g}{spread}"
        rows.setdefault(row["measure"], {"measure": row["measure"].replace("_", " ")})
        rows[row["measure"]][f"{row['cell']} (n = {row['n']})"] = text
    return pd.DataFrame(rows.values()).fillna("")


def correlations_as_text(numbers: pd.DataFrame) -> pd.DataFrame:
    """The correlations as they are read."""
    return pd.DataFrame(
        {
            "measure": row["measure"].replace("_", " "),
            "n": str(row["n"]),
            "rank correlation": "" if np.isnan(row["correlation"]) else f"{row['correlation']:+.2f}",
            "95 % interval": "" if np.isnan(row["low"]) else f"{row['low']:+.2f} to {row['high']:+.2f}",
        }
        for row in numbers.to_dict("records")
    )
