"""A run's checkpoints: which of them is meant, and reading one without running code that is in it."""

import sys
from pathlib import Path
from typing import Any

import torch

from sam_lightning.runs.directory import CHECKPOINTS

SHARDED = "meta.pt"  # in a checkpoint that is a folder of shards: all but the tensors, written last


class CheckpointError(RuntimeError):
    """A checkpoint that was asked for is not there, is damaged, or belongs to another configuration."""


def find_checkpoint(run: Path, which: str) -> Path:
    """The checkpoint file that `which` means.

    Args:
        run: Directory of the run.
        which: `last` (the newest that is whole), `best` (by the run's monitored metric), a run directory, or a file.

    Raises:
        CheckpointError: If there is no such file; the message says where it was looked for.
    """
    if which not in ("last", "best"):
        path = Path(which)
        if path.is_dir() and not (path / SHARDED).is_file():
            return find_checkpoint(path, "last")
        if path.exists():
            return path
        raise CheckpointError(
            f"--ckpt_path {which}: no such file. Give last, best, a run directory, or a checkpoint file."
        )
    folder = run / CHECKPOINTS
    # Those called last first; a run that was killed before its first one was complete may still have others.
    newest = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    found = sorted(newest, key=lambda path: not path.name.startswith("last"))
    if not found:
        raise CheckpointError(
            f"--ckpt_path {which}: no checkpoint in {folder.resolve()}. Run `fit` first, or name the run by "
            "--trainer.default_root_dir."
        )
    last = _first_whole(found)
    if which == "last":
        return last
    for state in read_checkpoint(last).get("callbacks", {}).values():
        best = state.get("best_model_path") if state.get("monitor") else None
        if best:
            path = folder / Path(best).name  # the run may have been moved since
            if path.is_file():
                return path
            raise CheckpointError(f"--ckpt_path best: the run's best checkpoint {path.resolve()} is gone.")
    raise CheckpointError(
        f"--ckpt_path best: {last} names no best checkpoint. The run needs a ModelCheckpoint with a "
        "monitor and a validation (--data.validation); or give --ckpt_path last."
    )


def _first_whole(paths: list[Path]) -> Path:
    for path in paths[:-1]:
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            print(f"sam-lightning: note: {error}. An older one is taken instead.", file=sys.stderr)
        else:
            return path
    read_checkpoint(paths[-1])
    return paths[-1]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors mapped from disk; nothing in it is executed.

    Raises:
        CheckpointError: If the file is damaged, or holds anything but tensors and primitives.
    """
    try:
        file = path / SHARDED if path.is_dir() else path
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(
            f"{path} is damaged or no checkpoint: {str(error).splitlines()[0].rstrip('.')}"
        ) from error
    return content
