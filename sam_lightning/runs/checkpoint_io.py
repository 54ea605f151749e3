"""Checkpoints that are whole or not there."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from sam_lightning.runs.atomic_files import replacing
from sam_lightning.runs.checkpoints import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, flushes it to disk, and renames it.

    Lightning writes into the system's temporary folder and moves the file from there: to another file
    system that is a copy, and a kill in its middle leaves half a checkpoint under the name of a whole one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Saves `checkpoint` at `path`; what was there stays until the new file is complete.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options must be None for files, got {storage_options!r}.")
        try:
            with replacing(Path(path)) as draft:
                torch.save(checkpoint, draft)
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError of a full disk
            free = f"{shutil.disk_usage(Path(path).parent).free:,} bytes free"
            raise CheckpointError(
                f"{path} cannot be written ({free}): {str(error).splitlines()[0]}. What was saved before is kept: make "
                "room, and go on from there."
            ) from error
