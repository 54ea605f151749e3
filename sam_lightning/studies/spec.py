"""A study file: what it may say, and what it means."""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from sam_lightning.runs import configs
from sam_lightning.runs.suggest import did_you_mean
from sam_lightning.studies.sharpness_spec import SharpnessSpec

FOLDER = "studies"  # of the packaged configurations


class StudyError(ValueError):
    """A study file, or a command about a study, that cannot be meant."""


@dataclass(frozen=True)
class Arm:
    """What a study compares: an optimizer, and whatever else this arm has of its own.

    Args:
        optimizer: File with one complete optimizer block, relative to the study file.
        set: Settings by dotted name, such as `model.network.init_args.norm: batch`.
        grid: Replaces the study's grid.
        seeds: Replaces the study's seeds.
    """

    optimizer: str
    set: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] | None = None
    seeds: list[int] | None = None


@dataclass(frozen=True)
class Cell:
    """An arm at one point of its grid."""

    arm: str
    point: tuple[tuple[str, Any], ...]

    @property
    def label(self) -> str:
        """As tables and legends show it: `SAM, batch size 64`."""
        return ", ".join([self.arm, *(f"{short(key).replace('_', ' ')} {value}" for key, value in self.point)])


@dataclass(frozen=True)
class Study:
    """A study file, and what the command line sets on top.

    Args:
        question: What the study asks.
        layers: Configuration files, later ones over earlier ones, relative to the study file.
        arms: By the name that tables and legends show; a bare file name is an arm's optimizer.
        seeds: One run for each, in every arm and point of the grid.
        grid: Values by dotted name; the study runs all their combinations.
        baseline: The arm that the others are compared with, seed by seed; by default the first.
        figures: Kind of each figure, by its file name.
        sharpness: What is measured of every run; by default nothing.
        reference: Published numbers: `arm`, the grid's settings, `epochs`, and `best`, `last` (test accuracy in
            percent) and `train_loss` as far as they are known.
        source: Where the published numbers come from.
        path: The file. Not a key of it, as `overrides`.
        overrides: Settings of every run by dotted name.
    """

    question: str
    layers: list[str]
    arms: dict[str, Arm]
    seeds: list[int]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    baseline: str = ""
    figures: dict[str, Literal["accuracy", "training loss", "weights", "sweep"]] = field(default_factory=dict)
    sharpness: SharpnessSpec | None = None
    reference: list[dict[str, Any]] = field(default_factory=list)
    source: str = ""
    path: Path = Path()
    overrides: Mapping[str, str] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """All arms at all points of their grids, in the file's order."""
        return [
            Cell(name, tuple(zip(grid, values, strict=True)))
            for name, grid in ((name, self.grid_of(name)) for name in self.arms)
            for values in itertools.product(*grid.values())
        ]

    def grid_of(self, arm: str) -> dict[str, list[Any]]:
        """The arm's own grid, else the study's."""
        own = self.arms[arm].grid
        return self.grid if own is None else own

    def seeds_of(self, arm: str) -> list[int]:
        """The arm's own seeds, else the study's."""
        own = self.arms[arm].seeds
        return self.seeds if own is None else own


def load(which: str, overrides: Mapping[str, str] | None = None) -> Study:
    """Reads a study.

    Args:
        which: Path of its file, or the name of one in `configs/studies` here or among the packaged files.
        overrides: Settings of every run by dotted name.

    Raises:
        StudyError: If the file cannot be meant; the message names file and key.
    """
    here = Path("configs", FOLDER)
    local = [Path(which), here / f"{which}.yaml"]
    path = next((path for path in local if path.is_file()), None)
    path = path or configs.packaged(which, FOLDER) or configs.packaged(f"{which}.yaml", FOLDER)
    if path is None:
        known = [name.removeprefix(f"{FOLDER}/") for name in configs.names() if name.startswith(f"{FOLDER}/")]
        known = sorted({*known, *(file.name for folder in (here, Path()) for file in folder.glob("*.yaml"))})
        near = did_you_mean(which, [Path(name).stem for name in known])
        raise StudyError(f"no study {which}: it is neither a file nor one of the packaged studies{near or '.'}")
    study = replace(_parse(path), path=path, overrides=overrides or {})
    _check(study)
    return study


def _overlap(a: str, b: str) -> bool:
    """Whether two dotted names mean the same setting, or one of them holds the other; `init_args` may be left out."""
    first, second = (re.sub(r"\.(init_args|dict_kwargs)(?=\.)", "", key) + "." for key in (a, b))
    return first.startswith(second) or second.startswith(first)


def short(key: str) -> str:
    """The last part of a dotted name."""
    return key.rpartition(".")[2]


def _parse(path: Path) -> Study:
    content = read_yaml(path)
    if isinstance(content.get("arms"), dict):
        arms = content["arms"].items()
        content["arms"] = {str(name): {"optimizer": arm} if isinstance(arm, str) else arm for name, arm in arms}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, skip={"path", "overrides"})
    try:
        values = parser.parse_object(content).as_dict()
    except jsonargparse.ArgumentError as error:
        raise StudyError(f"{path}: {error}") from error
    arms = {name: Arm(**arm) for name, arm in values.pop("arms").items()}
    values["baseline"] = values["baseline"] or next(iter(arms), "")
    values["sharpness"] = SharpnessSpec.of(values["sharpness"])
    return Study(arms=arms, **values)


def _check(study: Study) -> None:
    """Refuses what parses and cannot be meant."""

    def refuse(key: str, what: str) -> None:
        raise StudyError(f"{study.path}: {key}: {what}")

    for key in ("layers", "arms"):
        if not getattr(study, key):
            refuse(key, "must name at least one.")
    if study.sharpness and (problem := study.sharpness.problem()):
        refuse("sharpness", problem)
    if study.baseline not in study.arms:
        refuse("baseline", f"must be an arm ({', '.join(study.arms)}), got {study.baseline}.")
    for arm in study.arms:
        seeds, grid = study.seeds_of(arm), study.grid_of(arm)
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            refuse(f"seeds of {arm}", f"must be different integers >= 0, at least one, got {seeds}.")
        for key, values in grid.items():
            if not values or len({word_of(value) for value in values}) < len(values):
                refuse(f"grid of {arm}: {key}", f"must be different values, at least one, got {values}.")
            if any(isinstance(value, list | dict) for value in values):
                refuse(f"grid of {arm}: {key}", f"must be single values, got {values}.")
            if key in study.arms[arm].set:
                refuse(f"arms.{arm}.set.{key}", "is varied by the grid.")
        for key in study.overrides:
            own = [*grid, *study.arms[arm].set, "model.optimizer.class_path", "trainer.default_root_dir"]
            if any(_overlap(key, other) for other in own):
                raise StudyError(
                    f"--{key} {study.overrides[key]}: {study.path} sets it itself, in {arm}. To run a part of the "
                    f"study use --only {key}=...; for other values write a study file of your own."
                )
    for i, row in enumerate(study.reference):
        known = {"best", "last", "train_loss"}
        point = {key: value for key, value in row.items() if key not in {"arm", "epochs", *known}}
        if "epochs" not in row or Cell(str(row.get("arm")), tuple(point.items())) not in study.cells():
            refuse(f"reference[{i}]", f"must have epochs, an arm, its grid's settings, and of {sorted(known)}: {row}.")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML that refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
    return {loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a file; errors name the file."""
    try:
        content = yaml.load(path.read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"{path}: must be a mapping, got {type(content).__name__}.")
    return content


def word_of(value: Any) -> str:
    """A setting's value as a word of a command."""
    return value if isinstance(value, str) else json.dumps(value)
