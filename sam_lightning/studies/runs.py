"""The runs that a study names: ordinary `fit` commands, each with a directory of its own."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam_lightning.runs import configs
from sam_lightning.runs.directory import RESULT
from sam_lightning.runs.settings import FREE_OF_CONSEQUENCE
from sam_lightning.studies.sharpness_spec import SharpnessSpec
from sam_lightning.studies.spec import FOLDER, Cell, Study, StudyError, read_yaml, short, word_of

_PLAIN = re.compile(r"[\w.,=+-]{1,40}")


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        cell: The arm and the point of its grid.
        seed: The seed of weights, data order and augmentation.
        words: The command behind `sam-lightning`, without the run's directory.
        name: Of that directory; equal for equal runs, whichever study they belong to.
        sharpness: What is measured of it.
    """

    cell: Cell
    seed: int
    words: tuple[str, ...]
    name: str
    sharpness: SharpnessSpec | None = None

    def commands(self, root: Path) -> list[list[str]]:
        """The whole commands behind `sam-lightning`: the training, and what measures it."""
        folder = root / self.name
        fit = [*self.words, "--trainer.default_root_dir", str(folder)]
        return [fit, self.sharpness.command(folder)] if self.sharpness else [fit]

    def is_finished(self, root: Path) -> bool:
        """Whether it has its result, and was measured as its study asks."""
        folder = root / self.name
        return (folder / RESULT).is_file() and (self.sharpness is None or self.sharpness.is_done(folder))


def runs_of(study: Study) -> list[Run]:
    """Every run, seed by seed, so that a study that is stopped early has runs to compare.

    Raises:
        StudyError: If a file that the study names is missing or no mapping, or two arms are the same run.
    """
    layers = [_file(study, layer, f"layers[{i}]") for i, layer in enumerate(study.layers)]
    runs = [_run(study, cell, seed, layers) for cell in study.cells() for seed in study.seeds_of(cell.arm)]
    owners: dict[str, Cell] = {}
    for run in runs:
        if run.name in owners:
            raise StudyError(f"{study.path}: arms: {owners[run.name].label} and {run.cell.label} are the same runs.")
        owners[run.name] = run.cell
    return sorted(runs, key=lambda run: run.seed)


def select(runs: list[Run], only: Iterable[str]) -> list[Run]:
    """The runs that every `KEY=VALUE[,VALUE]` admits; KEY is `arm`, `seed`, or a name of the grid.

    Raises:
        StudyError: If a key or a value occurs in no run.
    """
    for word in only:
        key, _, values = word.partition("=")
        wanted = set(values.split(","))
        allowed = {_properties(run).get(key) for run in runs} - {None}
        if not wanted <= allowed:
            keys = {name for run in runs for name in _properties(run)}
            raise StudyError(
                f"--only {word}: allowed are "
                + (f"the values {_list(allowed)}." if allowed else f"KEY=VALUE[,VALUE] with the keys {_list(keys)}.")
            )
        runs = [run for run in runs if _properties(run).get(key) in wanted]
    return runs


def directory_of(study: Study, root: Path) -> Path:
    """Where the study's report goes; with other settings it is another study."""
    settings = {key: value for key, value in sorted(study.overrides.items()) if short(key) not in FREE_OF_CONSEQUENCE}
    tail = ",".join(f"{key}={value}" for key, value in settings.items())
    if tail and not re.fullmatch(r"[\w.,=+-]{1,100}", tail):
        tail = _digest(settings)
    return root / ",".join(filter(None, [study.path.stem, tail]))


def _run(study: Study, cell: Cell, seed: int, layers: list[Path]) -> Run:
    arm = study.arms[cell.arm]
    optimizer = _file(study, arm.optimizer, f"arms.{cell.arm}.optimizer")
    block = read_yaml(optimizer)
    settings = {key: word_of(value) for key, value in {**arm.set, **dict(cell.point), **study.overrides}.items()}
    words = ["fit"]
    for layer in layers:
        words += ["-c", configs.as_typed(layer)]
    words += ["--model.optimizer", configs.as_typed(optimizer)]
    for key, value in settings.items():
        words += [f"--{key}", value]
    monitor = study.sharpness.in_training() if study.sharpness else []
    words += [*monitor, "--seed_everything", str(seed)]
    # By content: a file that changes makes another run, a file that moves does not.
    settings = {key: value for key, value in settings.items() if short(key) not in FREE_OF_CONSEQUENCE}
    identity = {
        "layers": [read_yaml(layer) for layer in layers],
        "optimizer": block,
        "settings": settings,
        "seed": seed,
        **({"monitor": monitor} if monitor else {}),
    }
    shown = [word for key, value in settings.items() if _PLAIN.fullmatch(word := f"{short(key)}={value}")]
    name = short(str(block.get("class_path", "run"))).lower()
    return Run(cell, seed, tuple(words), "-".join([name, *shown, f"seed{seed}", _digest(identity)]), study.sharpness)


def _file(study: Study, name: str, key: str) -> Path:
    """A file that the study names, relative to the study file or among the packaged ones."""
    path = study.path.parent / name
    if path.is_file():
        return path
    found = configs.packaged(name, FOLDER)
    if found is None:
        raise StudyError(f"{study.path}: {key}: {configs.no_such_file(name)}")
    return found


def _properties(run: Run) -> dict[str, str]:
    return {"arm": run.cell.arm, "seed": str(run.seed), **{key: word_of(value) for key, value in run.cell.point}}


def _list(words: Iterable[str | None]) -> str:
    return ", ".join(sorted(map(str, words)))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]
