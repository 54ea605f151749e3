"""What a user reads instead of a traceback, where the cause is not in the code."""

import errno
import sysconfig
import traceback
from pathlib import Path

import torch

import sam_lightning
from sam_lightning.cli.sharpness import MeasureError
from sam_lightning.data import DataError
from sam_lightning.runs.checkpoints import CheckpointError
from sam_lightning.runs.extras import MissingExtraError
from sam_lightning.runs.overwrite import RunExistsError
from sam_lightning.training.divergence import DivergedError
from sam_lightning.training.strategies import StrategyError

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
_LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe", "timed out", "timeout", "remote process exited")


class SettingsError(ValueError):
    """A value of the configuration that model, data, optimizer or trainer refuse."""


_SAY_IT_THEMSELVES = (
    CheckpointError,
    DataError,
    DivergedError,
    MeasureError,
    MissingExtraError,
    RunExistsError,
    SettingsError,
    StrategyError,
)


def first_cause(error: BaseException) -> BaseException:
    """What the error was at first; jsonargparse wraps what a class raises in pages of its own."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def is_from_users_code(error: BaseException) -> bool:
    """Whether the error's first cause was raised neither in this package nor in one that is installed."""
    frames = traceback.extract_tb(first_cause(error).__traceback__)
    folders = {
        str(Path(sam_lightning.__file__).parent),
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    }
    return bool(frames) and not frames[-1].filename.startswith((*folders, "<"))


def explain(error: Exception) -> str | None:
    """One message for what a user can mend; `None` for everything else, whose traceback is needed.

    Args:
        error: What ended the command.
    """
    text = str(error)
    if isinstance(error, _SAY_IT_THEMSELVES):
        return text
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text:
        what = (text.strip() or "no more to be had").splitlines()[0].rstrip(".")
        return (
            f"out of memory: {what}. Lower --data.batch_size, or cut each batch into parts by --model.micro_batches 2 "
            "or more. What was saved before is kept."
        )
    if isinstance(error, OSError) and error.errno in _UNWRITABLE and not is_from_users_code(error):
        return (
            f"cannot write: {text}. Make room or the folder writable, or name another by --trainer.default_root_dir. "
            "What was saved before is kept."
        )
    if "could not find the monitored key" in text:
        return (
            f"{text.splitlines()[0]} Name what your module logs by --trainer.callbacks.monitor NAME --trainer.callbacks"
            ".mode min (or max)."
        )
    if isinstance(error, KeyError) and "checkpoint contains only the model" in text:
        return "the checkpoint holds weights only: it can be tested, and no training can go on from it."
    if isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in text:
        return f"the checkpoint is of another network. {text}"
    is_peers = torch.distributed.is_initialized() and "DataLoader" not in text
    if isinstance(error, RuntimeError) and is_peers and any(words in text for words in _LOST_PEER):
        return (
            f"another process of this training ended: {text.splitlines()[0]} Its own last lines say why; what was "
            "saved before is kept."
        )
    return None
