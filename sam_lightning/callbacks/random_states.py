"""Random states that survive a resume."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sam_lightning.replay.random_states import random_states, set_random_states


class RandomStates(Callback):
    """Keeps the global random states of torch, CUDA, NumPy and Python in checkpoints.

    Lightning saves none of them, so that dropout after a resume differs from an undisturbed run's. They
    are restored when training starts, after the data loader's iterator was made and before its first
    batch. Only tensors and primitives are saved: such checkpoints load with `weights_only=True`.
    """

    def __init__(self) -> None:
        self._restore: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The random states now."""
        states = random_states()
        name, keys, *rest = states["numpy"]
        return {**states, "numpy": [name, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts."""
        self._restore = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the states of the checkpoint, if one was loaded."""
        if self._restore is None:
            return
        states, (name, keys, *rest) = self._restore, self._restore["numpy"]
        version, internal, gauss = states["python"]
        set_random_states(
            {
                "torch": states["torch"].cpu(),
                "cuda": [state.cpu() for state in states["cuda"]],
                "numpy": (name, keys.cpu().numpy().astype(np.uint32), *rest),
                "python": (version, tuple(internal), gauss),
            }
        )
        self._restore = None
