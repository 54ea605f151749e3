"""What a user reads instead of a traceback, where the cause is not in the code."""

import errno

import torch

from sam_lightning.data import DataError
from sam_lightning.manual import DivergedError
from sam_lightning.measuring import MeasureError
from sam_lightning.run_directory import CheckpointError
from sam_lightning.strategies import StrategyError

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
_LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe", "timed out", "timeout", "remote process exited")


class SettingsError(ValueError):
    """A value of the configuration that model, data, optimizer or trainer refuse."""


def explain(error: Exception) -> str | None:
    """One message for what a user can mend; `None` for everything else, whose traceback is needed.

    Args:
        error: What ended the command.
    """
    text = str(error)
    if isinstance(error, CheckpointError | DataError | DivergedError | MeasureError | SettingsError | StrategyError):
        return text
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return (
            f"out of memory: {text.strip().splitlines()[0]} Lower --data.batch_size, or cut each batch into parts by "
            "--model.accumulate 2 or more. Weights and checkpoints are as they were before this step."
        )
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return (
            f"cannot write: {text}. Make room or the folder writable, or name another by --trainer.default_root_dir. "
            "What was saved before is kept."
        )
    if isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in text:
        return f"the checkpoint is of another network. {text}"
    if isinstance(error, RuntimeError) and torch.distributed.is_initialized() and any(p in text for p in _LOST_PEER):
        return (
            f"another process of this training ended: {text.splitlines()[0]} Its own last lines say why; what was "
            "saved before is kept."
        )
    return None
