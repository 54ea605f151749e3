"""What Lightning leaves undone in manual optimization, whatever the step is."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sam_lightning.optim import global_norm
from sam_lightning.training.resume import prepare_resume
from sam_lightning.training.schedules import step_plateaus
from sam_lightning.training.sharding import reshard, shard, share_buffers
from sam_lightning.training.strategies import StrategyCheck


class DivergedError(ArithmeticError):
    """Weights that are not finite: nothing that training could still save would be of use."""


class ManualOptimization(LightningModule):
    """Clips in the step, logs and resumes the epoch's mean loss, steps plateaus, has buffers broadcast.

    Stops training whose weights are not finite any more, before a checkpoint of them is saved.

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
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = global_norm([p.grad for p in parameters])
        torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip_norm, norm)

    def _without_sync(self) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    @property
    def _finds_unused(self) -> bool:
        """Whether a first pass that is not synchronised must leave gradients behind, though zero.

        DistributedDataParallel with find_unused_parameters=True still takes a parameter for used in the second
        pass if the first one used it, and fails where it then has no gradient.
        """
        return getattr(self.trainer.strategy.model, "find_unused_parameters", False)

    def _stop_if_diverged(self) -> None:
        """Looks at the weights, not at a loss: in data-parallel training all processes come to the same answer."""
        if global_norm([p.detach() for p in self.parameters() if p.is_floating_point()]).isfinite():
            return
        bad = next((i for i, loss in enumerate(self._epoch_losses) if not math.isfinite(loss)), None)
        since = "" if bad is None else f" since the loss of batch {bad} was not"
        raise DivergedError(
            f"training diverged: the weights are not finite in epoch {self.current_epoch + 1}, step {self.global_step}"
            f"{since}. Lower the learning rate or rho, set gradient_clip_norm, or look for data that are not finite. "
            "The checkpoints of earlier epochs are as they were."
        )

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's mean loss and steps `ReduceLROnPlateau`.

        Raises:
            DivergedError: If the weights are not finite.
        """
        self._stop_if_diverged()
        if self._epoch_losses:
            mean = math.fsum(map(float, self._epoch_losses)) / len(self._epoch_losses)
            self.log("train/loss_epoch", mean, sync_dist=True)
            self._epoch_losses.clear()
        step_plateaus(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Has DistributedDataParallel broadcast buffers, which it does not in Lightning's manual optimization."""
        if isinstance(self.trainer.strategy.model, DistributedDataParallel):
            self.trainer.strategy.model.require_forward_param_sync = True

    # Else each process would evaluate with running statistics of its own.

    def on_validation_start(self) -> None:
        """Has every process validate with the first one's buffers, which are those that are saved."""
        self._share_buffers()

    def on_test_start(self) -> None:
        """As `on_validation_start`."""
        self._share_buffers()

    def on_predict_start(self) -> None:
        """As `on_validation_start`."""
        self._share_buffers()

    def _share_buffers(self) -> None:
        if self.trainer.world_size > 1:
            share_buffers(self)

    def configure_callbacks(self) -> Sequence[Callback]:
        """The check of the strategy."""
        return [StrategyCheck()]

    def configure_model(self) -> None:
        """In ModelParallelStrategy shards every submodule by FSDP2, as `sharding.shard` does.

        Override it to cut your network in other places.
        """
        if self._shards:
            assert self.device_mesh is not None
            for child in self.children():
                if any(True for _ in child.parameters()):
                    shard(child, self.device_mesh["data_parallel"])

    @property
    def _shards(self) -> bool:
        # A module that is loaded by itself has no trainer.
        return self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    def _reshard(self) -> None:
        if self._shards:
            reshard(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the losses of the epoch so far, so that a resumed epoch has the same mean.

        Raises:
            DivergedError: If the weights are not finite.
        """
        self._stop_if_diverged()
        checkpoint["epoch_losses"] = [float(loss) for loss in self._epoch_losses]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the losses of the epoch so far.

        Raises:
            CheckpointError: If training cannot go on from there without losing a part of an epoch.
        """
        # A module that is loaded by itself has no trainer.
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            prepare_resume(checkpoint, self.trainer.max_epochs, self.trainer.max_steps)
        self._epoch_losses = list(checkpoint.get("epoch_losses", []))
