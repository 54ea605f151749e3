"""What a study's runs came to, as tables of numbers: read from the runs, or from the CSV files of a report."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from sam_lightning.runs.atomic_files import replacing
from sam_lightning.runs.directory import RESULT, WEIGHTS
from sam_lightning.studies.runs import runs_of
from sam_lightning.studies.sharpness_statistics import rows_of
from sam_lightning.studies.spec import Study, StudyError

_BINS = 100
# How pandas reads back the floats that it wrote; from 3.1 on it does so by itself, and deprecates the option.
_PANDAS = tuple(int(part) for part in pd.__version__.split(".")[:2])
_EXACTLY: dict[str, Any] = {} if _PANDAS >= (3, 1) else {"float_precision": "round_trip"}


@dataclass(frozen=True)
class Results:
    """Finished runs. Accuracies are fractions, losses mean cross entropy, times seconds.

    Args:
        runs: A row per run: `cell` (its label), `seed`, the conditions, `best` and `last` (test accuracy at the best
            and at the last epoch), `best_epoch`, `train_loss` (of the last epoch), `seconds`.
        epochs: A row per run and epoch: `train_loss`, and `accuracy` and `loss` on the set that was evaluated, and
            `gradients_per_step`.
        weights: Histograms of the final weights: a row per run, parameter and bin, with bins shared by all runs.
        sharpness: A row per measured run and measure: `value`, `standard_error`, `samples`.
        sharpness_epochs: What was measured during training: a row per run, epoch and measure, `value`.
    """

    runs: pd.DataFrame
    epochs: pd.DataFrame
    weights: pd.DataFrame
    sharpness: pd.DataFrame = field(default_factory=pd.DataFrame)
    sharpness_epochs: pd.DataFrame = field(default_factory=pd.DataFrame)


def collect(study: Study, root: Path) -> Results:
    """Reads the results of the study's finished runs.

    Raises:
        StudyError: If a result is damaged.
    """
    runs: list[dict[str, Any]] = []
    epochs: list[dict[str, Any]] = []
    sharpness: list[dict[str, Any]] = []
    sharpness_epochs: list[dict[str, Any]] = []
    weights: dict[tuple[str, int, str], np.ndarray] = {}
    for run in runs_of(study):
        path = root / run.name / RESULT
        if not path.is_file():
            continue
        key = {"cell": run.cell.label, "seed": run.seed}
        try:
            content = json.loads(path.read_text())
            runs.append({**key, **_run_row(content)})
            epochs += [{**key, **_epoch_row(row)} for row in content["epochs"]]
            sharpness_epochs += [
                {**key, "epoch": row["epoch"], "measure": name, "value": value}
                for row in content.get("sharpness", ())
                for name, value in row.items()
                if name != "epoch"
            ]
            if (path.parent / WEIGHTS).is_file():
                with np.load(path.parent / WEIGHTS, allow_pickle=False) as file:
                    weights |= {(run.cell.label, run.seed, name): file[name].ravel() for name in file.files}
        except (ValueError, KeyError, TypeError, OSError, EOFError, BadZipFile) as error:
            raise StudyError(
                f"{path} cannot be read ({type(error).__name__}: {error}). Remove it and run the study again: the "
                "run goes on from its last checkpoint."
            ) from error
        if run.sharpness is None or run.sharpness.is_done(path.parent):  # else it was measured otherwise
            sharpness += [{**key, **row} for row in rows_of(path.parent)]
    return Results(
        pd.DataFrame(runs),
        pd.DataFrame(epochs),
        _histograms(weights),
        pd.DataFrame(sharpness),
        pd.DataFrame(sharpness_epochs),
    )


def missing(study: Study, results: Results) -> list[str]:
    """Labels of the study's runs that are not among the results."""
    there = set(zip(results.runs.cell, results.runs.seed, strict=True)) if len(results.runs) else set()
    return [f"{run.cell.label}, seed {run.seed}" for run in runs_of(study) if (run.cell.label, run.seed) not in there]


def write(results: Results, folder: Path) -> None:
    """Writes the tables as CSV files, exactly."""
    for table in fields(results):
        frame = getattr(results, table.name)
        if len(frame):
            with replacing(folder / f"{table.name}.csv") as draft:
                frame.to_csv(draft, index=False)


def read(folder: Path) -> Results:
    """Reads what `write` wrote.

    Raises:
        StudyError: If there are no such files.
    """
    frames = {}
    for table in fields(Results):
        path = folder / f"{table.name}.csv"
        if path.is_file():
            frames[table.name] = pd.read_csv(path, **_EXACTLY)
    if not {"runs", "epochs"} <= frames.keys():
        raise StudyError(f"no results in {folder}: runs.csv and epochs.csv of a report are expected there.")
    return Results(**{"weights": pd.DataFrame(), **frames})


def _run_row(content: dict[str, Any]) -> dict[str, Any]:
    conditions = content["conditions"]
    epochs = {row["epoch"]: row for row in content["epochs"]}
    last, best = content["last"], content["best"] or {"epoch": None}

    def test_accuracy(outcome: dict[str, Any]) -> float | None:
        if content["selected_on"] == "test":  # the test set was evaluated after every epoch
            outcome = {"test/accuracy": epochs.get(outcome["epoch"], {}).get("val/accuracy")}
        return outcome.get("test/accuracy")

    return {
        "epochs": last["epoch"],
        "gradients_per_step": content["gradients_per_step"],
        "selected_on": content["selected_on"],
        "best_epoch": best["epoch"],
        "best": test_accuracy(best),
        "last": test_accuracy(last),
        "train_loss": epochs[last["epoch"]].get("train/loss_epoch"),
        "seconds": sum(row["seconds"] for row in content["epochs"]),
        **{name: conditions[name] for name in ("precision", "device", "threads", "processes")},
        **{name.replace("-", "_"): value for name, value in conditions["versions"].items()},
        "commit": conditions["commit"],
    }


def _epoch_row(row: dict[str, float]) -> dict[str, Any]:
    names = {"train_loss": "train/loss_epoch", "accuracy": "val/accuracy", "loss": "val/loss", "seconds": "seconds"}
    found = {"epoch": row["epoch"], **{column: row.get(name) for column, name in names.items()}}
    return {**found, "gradients_per_step": row.get("gradients_per_step")}


def _histograms(weights: dict[tuple[str, int, str], np.ndarray]) -> pd.DataFrame:
    rows = []
    for parameter in sorted({name for _, _, name in weights}):
        of_it = {key: values for key, values in weights.items() if key[2] == parameter}
        finite = {key: values[np.isfinite(values)] for key, values in of_it.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(finite.values())), _BINS)
        for (cell, seed, _), values in finite.items():
            counts, _ = np.histogram(values, edges)
            rows.append(
                pd.DataFrame(
                    {
                        "cell": cell,
                        "seed": seed,
                        "parameter": parameter,
                        "left": edges[:-1],
                        "right": edges[1:],
                        "count": counts,
                    }
                )
            )
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()
