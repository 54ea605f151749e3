"""Random states that survive a resume."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


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
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [name, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached],
            "python": random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts."""
        self._restore = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the states of the checkpoint, if one was loaded."""
        if self._restore is None:
            return
        torch.set_rng_state(self._restore["torch"].cpu())
        if len(self._restore["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in self._restore["cuda"]])
        name, keys, *rest = self._restore["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
        version, internal, gauss = self._restore["python"]
        random.setstate((version, tuple(internal), gauss))
        self._restore = None
