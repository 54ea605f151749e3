"""Where a new run may start, and how it replaces the files of an earlier one without losing them too early."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sam_lightning.runs.directory import CHECKPOINTS, CONFIG, RESULT, SHARPNESS, WEIGHTS
from sam_lightning.runs.settings import as_text, differences, settings

# Whatever the commands write into a run's directory, but for a study's log of the run.
_WRITTEN = (
    CONFIG,
    "config.*.yaml",
    CHECKPOINTS,
    "hpc_ckpt_*.ckpt",
    "hparams.yaml",
    "events.out.tfevents.*",
    "predictions*.pt",
    SHARPNESS,
    "landscape-*",
    RESULT,
    WEIGHTS,
)


class RunExistsError(ValueError):
    """A new run's directory holds one already."""


def replaceable(run: Path, config: Mapping[str, Any], overwrite: bool) -> list[Path]:
    """The files that a run which starts in `run` replaces.

    A run of which no checkpoint was saved is replaced without being asked; one that SLURM requeues goes on by itself.

    Args:
        run: The directory.
        config: The new run's configuration.
        overwrite: Whether an equal run that was saved is to be replaced.

    Raises:
        RunExistsError: If the directory holds a run with other settings, or an equal one that is not to be replaced.
    """
    saved = has_checkpoints(run)
    requeued = any(run.glob("hpc_ckpt_*.ckpt"))
    if (run / CONFIG).is_file():
        found = differences(settings(yaml.safe_load((run / CONFIG).read_text())), settings(config))
        if found and (saved or not overwrite):
            raise RunExistsError(
                f"{run} holds a run with other settings:\n{as_text(found, 'there')}\n"
                "Give this one a directory of its own: --trainer.default_root_dir DIR."
            )
        if saved and not overwrite and not requeued:
            raise RunExistsError(
                f"{run} holds this run already.\n"
                f"Go on with it:  sam-lightning fit --ckpt_path {run}\n"
                "Or start afresh, which replaces it:  the same command with --overwrite"
            )
    elif saved and not requeued:
        raise RunExistsError(
            f"{run} holds checkpoints and no {CONFIG} that says whose they are. Give this run a directory of its own: "
            "--trainer.default_root_dir DIR."
        )
    if requeued:
        return []
    return sorted(path for pattern in _WRITTEN for path in run.glob(pattern))


def has_checkpoints(run: Path) -> bool:
    """Whether something was saved to go on from."""
    return any((run / CHECKPOINTS).glob("*.ckpt"))


def set_aside(run: Path, files: Sequence[Path]) -> None:
    """Moves files of an earlier run into `replaced-N`, where they stay until the new run has saved something."""
    if files:
        folder = next(path for n in range(1, 10**6) if not (path := run / f"replaced-{n}").exists())
        folder.mkdir()
        for path in files:
            path.rename(folder / path.name)


def remove_replaced(run: Path) -> None:
    """Removes what was set aside, if the new run has a checkpoint."""
    if has_checkpoints(run):
        for folder in run.glob("replaced-*"):
            shutil.rmtree(folder)
