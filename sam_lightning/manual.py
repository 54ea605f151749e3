"""What Lightning leaves undone in manual optimization, whatever the step is."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sam_lightning.lr_schedules import step_plateaus


class ManualOptimization(LightningModule):
    """Clips in the step, logs and resumes the epoch's mean loss, steps plateaus, has buffers broadcast.

    Args:
        gradient_clip_norm: Largest L2 norm of the gradient of a step; `None`: no clipping.
    """

    def __init__(self, gradient_clip_norm: float | None) -> None:
        super().__init__()
        if gradient_clip_norm is not None and not gradient_clip_norm > 0:
            raise ValueError(f"gradient_clip_norm must be > 0 or None, got {gradient_clip_norm!r}.")
        self.automatic_optimization = False
        self.gradient_clip_norm = gradient_clip_norm
        self._clips: Optimizer | None = None
        self._epoch_losses: list[Tensor | float] = []  # left on the device until the epoch ends

    def _clip_before_step_of(self, optimizer: Optimizer) -> None:
        """Has the gradient clipped that descends, in the step itself: loss scaling has been undone by then.

        Not in a hook of Lightning's, which a subclass could override and so switch off clipping unseen.
        """
        if self.gradient_clip_norm is not None and self._clips is not optimizer:
            optimizer.register_step_pre_hook(self._clip)
            self._clips = optimizer

    def _clip(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert self.gradient_clip_norm is not None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip_norm)

    def _without_sync(self) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's mean loss and steps `ReduceLROnPlateau`."""
        if self._epoch_losses:
            mean = math.fsum(map(float, self._epoch_losses)) / len(self._epoch_losses)
            self.log("train/loss_epoch", mean, sync_dist=True)
            self._epoch_losses.clear()
        step_plateaus(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Has the running statistics broadcast."""
        self._broadcast_buffers()

    def on_validation_start(self) -> None:
        """Has the running statistics broadcast."""
        self._broadcast_buffers()

    def _broadcast_buffers(self) -> None:
        # In manual optimization Lightning leaves DistributedDataParallel in a state in which it never
        # broadcasts buffers: every process would validate with running statistics of its own.
        if isinstance(self.trainer.strategy.model, DistributedDataParallel):
            self.trainer.strategy.model.require_forward_param_sync = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the losses of the epoch so far, so that a resumed epoch has the same mean."""
        checkpoint["epoch_losses"] = [float(loss) for loss in self._epoch_losses]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the losses of the epoch so far."""
        self._epoch_losses = list(checkpoint.get("epoch_losses", []))
