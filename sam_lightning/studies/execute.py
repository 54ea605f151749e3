"""One run of a study, in this process: trained, tested, and its result written last."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import sam_lightning
from sam_lightning.callbacks import EpochHistory, WeightHistograms
from sam_lightning.callbacks.sharpness_monitor import SharpnessMonitor
from sam_lightning.cli import CLI, main
from sam_lightning.runs.atomic_files import replacing
from sam_lightning.runs.checkpoints import read_checkpoint
from sam_lightning.runs.directory import RESULT, WEIGHTS
from sam_lightning.runs.overwrite import has_checkpoints
from sam_lightning.runs.run_lock import locked
from sam_lightning.studies.sharpness_spec import SharpnessSpec

C = TypeVar("C", bound=Callback)
# A log has no use for a bar.
_QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def execute(
    words: Sequence[str], directory: Path, callbacks: Iterable[Callback] = (), sharpness: SharpnessSpec | None = None
) -> None:
    """Trains what is missing of a run, tests it, measures it, and writes its result.

    Goes on from the run's own last checkpoint. A run that has its result is measured, if that is missing, and left as
    it is; one that another process is at is waited for.

    Args:
        words: A `fit` command without the run's directory.
        directory: The run's directory.
        callbacks: What else watches the training.
        sharpness: What is measured at its end.
    """
    with locked(directory):
        if (directory / RESULT).is_file():
            if sharpness is not None and not sharpness.is_done(directory):
                main(sharpness.command(directory))
            return
        how = ["--ckpt_path", "last"] if has_checkpoints(directory) else ["--overwrite"]
        where = ["--trainer.default_root_dir", str(directory)]
        cli = main([*words, *where, *_QUIET, *how], callbacks)
        _save_weights(cli.trainer, cli.model, directory)  # before the best checkpoint is loaded for its test
        result = {**_outcome(cli), "command": [*words, *where], "conditions": _conditions(cli.trainer)}
        if sharpness is not None:
            main(sharpness.command(directory))
        with replacing(directory / RESULT) as draft:
            draft.write_text(json.dumps(result, indent=1))


@contextmanager
def printing_into(path: Path) -> Iterator[None]:
    """Everything that this process prints, below Python too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with path.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, old in zip((1, 2), kept, strict=True):
            os.dup2(old, descriptor)
            os.close(old)


def _outcome(cli: CLI) -> dict[str, Any]:
    """Every epoch's metrics, the test metrics of the last epoch and of the best one, and what was measured."""
    trainer = cli.trainer
    epochs = list(next(_callbacks(trainer, EpochHistory)).epochs)  # testing a checkpoint loads its history, too
    sharpness = [row for callback in _callbacks(trainer, SharpnessMonitor) for row in callback.history]  # likewise
    tests_in_validation = getattr(cli.datamodule, "validation", None) == "test"

    def test(checkpoint: str | None) -> dict[str, float]:
        if tests_in_validation:
            return {}
        return dict(trainer.test(cli.model, cli.datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True)[0])

    last = {"epoch": epochs[-1]["epoch"], **test(None)}
    best = None
    paths = [callback.best_model_path for callback in _callbacks(trainer, ModelCheckpoint) if callback.monitor]
    if paths and paths[0]:
        best = {"epoch": read_checkpoint(Path(paths[0]))["epoch"] + 1, **test(paths[0])}
    return {
        "epochs": epochs,
        "last": last,
        "best": best,
        "selected_on": "test" if tests_in_validation else "validation",
        "sharpness": sharpness,
        "gradients_per_step": mean(row["gradients_per_step"] for row in epochs),
    }


def _save_weights(trainer: Trainer, module: LightningModule, directory: Path) -> None:
    """Saves the weights whose histograms the run was asked for."""
    names = [name for callback in _callbacks(trainer, WeightHistograms) for name in callback.parameters]
    if names:
        values = dict(module.named_parameters())
        arrays: dict[str, Any] = {name: values[name].detach().float().cpu().numpy() for name in names}
        with replacing(directory / WEIGHTS) as draft, draft.open("wb") as file:
            np.savez(file, **arrays)


def _callbacks(trainer: Trainer, kind: type[C]) -> Iterator[C]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a part of the trainer
    return (callback for callback in callbacks if isinstance(callback, kind))


def _conditions(trainer: Trainer) -> dict[str, Any]:
    """What a number must carry to mean anything."""
    on_gpu = trainer.strategy.root_device.type == "cuda"
    return {
        "precision": str(trainer.precision),
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "versions": {name: version(name) for name in ("sam-lightning", "torch", "torchvision", "lightning")},
        "commit": _commit(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def _commit() -> str | None:
    """The package's commit, `-dirty` if something was changed since; `None` where it is not under git."""
    folder = Path(sam_lightning.__file__).parent
    git = ["git", "-C", str(folder), "-c", f"safe.directory={folder.parent}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    for words in (["ls-files", "--error-unmatch", "__init__.py"], ["describe", "--always", "--dirty", "--abbrev=12"]):
        try:
            done = subprocess.run([*git, *words], capture_output=True, text=True, env=environment, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
    return done.stdout.strip()
