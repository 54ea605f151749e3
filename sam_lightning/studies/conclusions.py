"""What a study came to, in words: every word and number is computed from the results."""

from typing import Any

import pandas as pd

from sam_lightning.studies.results import Results
from sam_lightning.studies.spec import Study
from sam_lightning.studies.statistics import differences, is_tested_every_epoch, outcomes


def conclusions(study: Study, results: Results) -> list[str]:
    """A sentence per arm and grid point: whether it ends ahead of the baseline, and whether at equal compute.

    An arm is ahead or behind if the 95 % interval of its mean difference does not contain 0. An interval that contains
    0 and a single seed, which has no interval, are named as such.
    """
    full, cut = (outcomes(results, equal_compute) for equal_compute in (False, True))
    at_equal_compute = {row["cell"]: row for row in _at_the_last_epoch(study, cut)}
    unit = f"points of {'test' if is_tested_every_epoch(results) else 'validation'} accuracy"
    sentences = []
    for row in _at_the_last_epoch(study, full):
        sentence = _finding(row, "points of test accuracy at the last epoch")
        other = at_equal_compute.get(row["cell"])
        if other and _epochs(cut, other) != _epochs(full, row):  # else the runs cost the same as they are
            ours, theirs = _epochs(cut, other)
            sentence += f"; at equal compute (epochs: {ours} against {theirs}) {_finding(other, unit)}"
        sentences.append(f"{sentence}.")
    return sentences


def _finding(row: dict[str, Any], unit: str) -> str:
    ours, baseline, mean = row["cell"], row["baseline"], row["mean"]
    if row["n"] == 1:
        side = "ahead of" if mean >= 0 else "behind"
        return f"{ours} ends {abs(mean):.1f} {unit} {side} {baseline} (one seed, so no interval)"
    interval = f"[{row['low']:+z.1f}, {row['high']:+z.1f}]"
    of = f"(95 %, n = {row['n']})"
    if row["low"] > 0:
        return f"{ours} is ahead of {baseline} by {mean:.1f} {unit} {interval} {of}"
    if row["high"] < 0:
        return f"{ours} is behind {baseline} by {-mean:.1f} {unit} {interval} {of}"
    return f"{ours} and {baseline} cannot be told apart: {mean:+z.1f} {unit}, and {interval} contains 0 {of}"


def _at_the_last_epoch(study: Study, outcome: pd.DataFrame) -> list[dict[str, Any]]:
    table = differences(study, outcome)
    rows: list[dict[str, Any]] = table[table.epoch == "last"].to_dict("records") if len(table) else []
    return rows


def _epochs(outcome: pd.DataFrame, row: dict[str, Any]) -> tuple[int, int]:
    """How long the arm and its baseline were trained."""
    ours, theirs = (int(outcome[outcome.cell == row[key]].epochs.min()) for key in ("cell", "baseline"))
    return ours, theirs
