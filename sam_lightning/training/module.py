"""The double forward-backward of sharpness-aware minimization, in Lightning's manual optimization."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from sam_lightning.optim import Params, SharpnessAware, global_norm
from sam_lightning.optim.batch_norm import RunningStats, frozen_running_stats
from sam_lightning.training.manual import ManualOptimization
from sam_lightning.training.micro_batches import MicroBatch, split_batch
from sam_lightning.training.schedules import step_schedulers


class SharpnessAwareModule(ManualOptimization):
    """A LightningModule that trains with SAM, ASAM, or any plain torch optimizer.

    A subclass gives `loss(batch)` and never sees the two passes:

        class Regression(SharpnessAwareModule):
            def __init__(self, optimizer):
                super().__init__(optimizer)
                self.network = torch.nn.Linear(8, 1)

            def loss(self, batch):
                x, y = batch
                return torch.nn.functional.mse_loss(self.network(x), y)

        Regression(partial(SAM, base=partial(torch.optim.SGD, lr=0.1), rho=0.05))

    Per batch there is one optimizer step, so `global_step`, `max_steps` and checkpoints by step count
    batches. Clipping, accumulation and schedulers are options here, since Lightning's own are refused or
    not run in manual optimization. Every `log_every_n_steps` batches it logs `train/loss` (first pass),
    `train/loss_perturbed`, `train/grad_norm` (||g|| at w, before clipping) and `lr`; and per epoch
    `train/loss_epoch`, the mean over batches of the first pass's loss.

    A subclass that overrides `on_train_epoch_end`, `on_train_batch_start`, `on_validation_start`,
    `on_test_start`, `on_predict_start`, `on_save_checkpoint` or `on_load_checkpoint` must call `super()`.

    Args:
        optimizer: Makes the optimizer from `parameter_groups()`, by default the named parameters.
        lr_scheduler: Makes the learning rate scheduler from the optimizer.
            `ReduceLROnPlateau` is stepped after every epoch, with its `monitor` (`val/loss` if it has none).
        lr_scheduler_interval: Whether the scheduler is stepped after every epoch or every step.
        gradient_clip_norm: Largest L2 norm of the gradient that descends; `None`: no clipping. The first
            pass's gradient is never clipped: its length does not matter.
        accumulate: Number of micro-batches that a batch is cut into, to save memory. Each pass runs over
            all of them; normalisation layers see micro-batches.
        batch_norm_stats: The passes that update running statistics: the first only, or both.
        sync_perturbation: In data-parallel training, whether all processes climb along their mean
            gradient (two all-reduces a step) or each along its own (m-sharpness with m the batch of one
            process; one all-reduce a step, and a different method).

    Attributes:
        m_sharpness: The number of samples that share a perturbation, known once training has begun; `None`
            without a sharpness-aware optimizer. Logged once.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        gradient_clip_norm: float | None = None,
        accumulate: int = 1,
        batch_norm_stats: Literal["first", "both"] = "first",
        sync_perturbation: bool = False,
    ) -> None:
        super().__init__(gradient_clip_norm)
        for name, value, allowed in (
            ("lr_scheduler_interval", lr_scheduler_interval, ("epoch", "step")),
            ("batch_norm_stats", batch_norm_stats, ("first", "both")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate must be an integer >= 1, got {accumulate!r}.")
        self.lr_scheduler_interval = lr_scheduler_interval
        self.accumulate = accumulate
        self.batch_norm_stats = batch_norm_stats
        self.sync_perturbation = sync_perturbation
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler
        self.is_second_pass = False  # whether `loss` runs at w + e
        self.m_sharpness: int | None = None
        self.register_state_dict_pre_hook(_refuse_perturbed)  # type: ignore[no-untyped-call]  # torch gives no types

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses a subclass with a `training_step`: it would replace the double forward-backward unseen."""
        super().__init_subclass__(**kwargs)
        if "training_step" in cls.__dict__:
            raise TypeError(
                f"{cls.__name__} must not define training_step: its loss computation belongs into "
                "loss(batch) -> Tensor, and SharpnessAwareModule takes the step."
            )

    # What a subclass gives.

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch, 0-dimensional; runs once per pass and micro-batch.

        `self.log` in here works, and is ignored in the second pass. Whatever else should happen once per
        batch, such as updating a metric, belongs behind `if not self.is_second_pass`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(batch) -> Tensor.")

    def parameter_groups(self) -> Params:
        """What the optimizer is made from; override it for groups, each with its own `rho` or `lr`."""
        return self.named_parameters()

    # The step.

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Gradient at w, ascent to w + e, gradient at w + e, descent from w."""
        optimizer = self.optimizers()
        if not isinstance(optimizer, LightningOptimizer):
            raise TypeError("SharpnessAwareModule trains with one optimizer, configure_optimizers made several.")
        inner = optimizer.optimizer
        self._clip_before_step_of(inner)
        micro_batches = split_batch(batch, self.accumulate)
        stats = RunningStats(self) if self._scaler is not None else None
        optimizer.zero_grad()
        if isinstance(inner, SharpnessAware):
            first = self._backward(micro_batches, sync=self.sync_perturbation)
            norm = self._grad_norm(inner)
            with inner.perturbed(), self._second_pass():
                optimizer.zero_grad(set_to_none=self.sync_perturbation or not self._finds_unused)
                second = self._backward(micro_batches, sync=True, factor=self._skip_unless_finite(norm))
            outputs = {"loss": first, "loss_perturbed": second}
        else:
            outputs = {"loss": self._backward(micro_batches, sync=True)}
            norm = self._grad_norm(inner)
        if stats is not None:  # a forward pass that overflowed leaves no trace, as the step is skipped
            stats.restore(unless=global_norm(_grads(inner)).isfinite())
        if self._shards:  # a checkpoint made of shards takes buffers from any process
            self._share_buffers()
        self._epoch_losses.append(outputs["loss"])
        if self._logs_this_step:
            self._log_step(outputs, norm, inner.param_groups[0]["lr"])
        optimizer.step()
        step_schedulers(self.trainer)
        return outputs

    def _backward(self, micro_batches: list[MicroBatch], sync: bool, factor: Tensor | None = None) -> Tensor:
        """Accumulates the gradient of the batch's mean loss; synchronised in the last micro-batch only."""
        total: list[Tensor] = []
        for i, (micro_batch, share) in enumerate(micro_batches):
            with nullcontext() if sync and i == len(micro_batches) - 1 else self._without_sync():
                loss = self.loss(micro_batch)
                if not isinstance(loss, Tensor) or loss.ndim != 0:
                    came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                    raise TypeError(f"{type(self).__name__}.loss must return a 0-dimensional tensor, got {came}.")
                if share != 1:
                    loss = loss * share
                total.append(loss.detach())
                self.manual_backward(loss if factor is None else loss * factor)
        return torch.stack(total).sum()

    @contextmanager
    def _second_pass(self) -> Iterator[None]:
        stats = frozen_running_stats(self) if self.batch_norm_stats == "first" else nullcontext()
        self.is_second_pass = True
        self._reshard()
        try:
            with stats:
                yield
        finally:
            self.is_second_pass = False
            self._reshard()  # a pass that failed leaves weights gathered at w + e

    # Loss scaling and the optimizer.

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _skip_unless_finite(self, norm: Tensor | None) -> Tensor | None:
        """A factor for the second loss: 1, or NaN if the first gradient is not finite.

        Under loss scaling an overflow in either pass must skip the step, on every process: as a factor
        it goes through the second pass's gradients, their all-reduce and the scaler's own check.
        """
        return None if self._scaler is None or norm is None else 1 + 0 * norm

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and its scheduler if there is one; `training_step` steps the scheduler."""
        optimizer = self._make_optimizer(self.parameter_groups())
        if self._make_lr_scheduler is None:
            return optimizer
        scheduler = self._make_lr_scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.lr_scheduler_interval},
        }

    # Logging: a `self.log` costs 0.3 ms on the host, so the step logs every `log_every_n_steps` batches.

    @property
    def _logs_this_step(self) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a part of the trainer
        return every > 0 and (self.global_step + 1) % every == 0

    def _grad_norm(self, optimizer: Optimizer) -> Tensor | None:
        """||g||, loss scaling included, in the steps that need it: for the log, or to check it."""
        if not self._logs_this_step and self._scaler is None:
            return None
        return global_norm(_grads(optimizer))

    def _log_step(self, outputs: dict[str, Tensor], norm: Tensor | None, learning_rate: float) -> None:
        self._stop_if_diverged()
        values = {f"train/{name}": value for name, value in outputs.items() if name != "loss"}
        if norm is not None:
            values["train/grad_norm"] = norm / (self._scaler.get_scale() if self._scaler else 1)
        self.log("train/loss", outputs["loss"], prog_bar=True)
        self.log_dict({**values, "lr": float(learning_rate)})

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's `log`, silent in the second pass: what `loss` logs is the first pass's."""
        if not self.is_second_pass:
            super().log(*args, **kwargs)


def _refuse_perturbed(module: SharpnessAwareModule, prefix: str, keep_vars: bool) -> None:
    """Whatever would save the weights, checkpoints first of all, asks for the module's `state_dict`."""
    if module.is_second_pass:
        raise RuntimeError("the weights are perturbed in the second pass: save or export them outside of loss().")


def _grads(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
