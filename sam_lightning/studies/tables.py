"""The tables of a study, as numbers and as they are read."""

import numpy as np
import pandas as pd

from sam_lightning.studies import sharpness_statistics
from sam_lightning.studies.results import Results
from sam_lightning.studies.spec import Study
from sam_lightning.studies.statistics import differences, is_tested_every_epoch, outcomes, summary, validated


def tables(study: Study, results: Results) -> dict[str, tuple[str, pd.DataFrame, pd.DataFrame]]:
    """All tables: by file name, the caption, the numbers, and the numbers as text."""
    at = f"{'Test' if is_tested_every_epoch(results) else 'Validation'} accuracy"
    full = outcomes(results, equal_compute=False)
    found = {
        "accuracy": (f"Test accuracy (%) and training loss at full length. {_selection(results)}", full, _as_summary),
        "differences": (
            f"Test accuracy minus {study.baseline}'s, in percentage points, paired by seed.",
            full,
            _as_pairs,
        ),
    }
    if not is_tested_every_epoch(results):
        caption = "Validation accuracy (%) at full length: what to choose settings by."
        found["validation"] = (caption, validated(results), _as_summary)
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
    numbers = sharpness_statistics.summary(results.sharpness, [cell.label for cell in study.cells()])
    ranks = sharpness_statistics.correlations(results.sharpness, results.runs)
    return {
        "sharpness-by-arm": (
            "Sharpness of the training loss at the end of training, on "
            f"{' or '.join(map(str, sorted(set(results.sharpness.samples))))} training samples.",
            numbers,
            sharpness_statistics.as_text(numbers),
        ),
        "sharpness-accuracy": (
            "Rank correlation (Spearman) of sharpness with the test accuracy of the last epoch over all measured runs. "
            "The interval takes runs for independent, which those of one arm are not.",
            ranks,
            sharpness_statistics.correlations_as_text(ranks),
        ),
    }


def _selection(results: Results) -> str:
    if is_tested_every_epoch(results):
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
