"""The training step with two passes, in the place of Lightning's own with one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from sam_lightning.optim import SharpnessAware
from sam_lightning.replay import Replay
from sam_lightning.replay.batch_norm import RunningStats
from sam_lightning.training.gradients import Gradients
from sam_lightning.training.micro_batches import split_batch
from sam_lightning.training.sharding import reshard, share_buffers
from sam_lightning.training.step_logs import StepLogs
from sam_lightning.training.step_metrics import StepResult
from sam_lightning.training.strategies import is_sharded, synchronised, unsynchronised


class SharpStep:
    """Takes the place of what Lightning's automatic optimization does with one batch.

    There a closure runs `training_step`, `optimizer_zero_grad` (for the first of accumulated batches) and `backward`,
    once for every batch that is accumulated; around it Lightning calls hooks, clips, steps, schedules and counts. Only
    that closure is replaced: by two passes with an ascent in between, whose outcome is the gradient that descends. All
    else is Lightning's.

    Args:
        trainer: The trainer; with a plain optimizer it takes plain steps, in micro-batches if asked for.
        module: What it trains.
        replay: Makes the second pass the same function as the first.
        logs: The module's `log`.
        micro_batches: Number of parts that each batch is cut into.
        sync_perturbation: Whether all processes climb along their mean gradient.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        replay: Replay,
        logs: StepLogs,
        micro_batches: int,
        sync_perturbation: bool,
    ) -> None:
        self.result = StepResult()
        self.shown = StepResult()  # of the last batch whose perturbation is to be logged
        self.is_logged = False
        self.is_shown = False
        self.is_perturbed = False
        self.is_second_pass = False
        self._gradients = Gradients(trainer, module)
        self._trainer = trainer
        self._module = module
        self.replay = replay
        self.logs = logs
        self._micro_batches = micro_batches
        self._sync_perturbation = sync_perturbation
        self._loop = trainer.fit_loop.epoch_loop.automatic_optimization
        self._make_plain_closure = self._loop._make_closure
        self._loop._make_closure = self._make_closure  # type: ignore[method-assign]
        vars(module)["is_second_pass"] = False  # for a module that asks

    def remove(self) -> None:
        """Gives trainer and module their own step and log back."""
        self.logs.remove()
        vars(self._loop).pop("_make_closure", None)
        vars(self._module).pop("is_second_pass", None)

    def _make_closure(self, kwargs: dict[str, Any], optimizer: Optimizer, batch_idx: int) -> Any:
        self.result, self.is_logged, self.is_shown = StepResult(), False, False
        closure = self._make_plain_closure(kwargs, optimizer, batch_idx)  # type: ignore[arg-type]
        if closure._backward_fn is not None:  # else Lightning wants the forward pass only, as for averaged weights
            closure.closure = partial(self._run, kwargs, closure)  # type: ignore[method-assign]
        else:  # and takes a step all the same, which must find no gradient of an earlier batch
            closure._zero_grad_fn = optimizer.zero_grad
        return closure

    @property
    def _optimizer(self) -> Optimizer:
        return self._trainer.optimizers[0]

    @torch.enable_grad()
    def _run(self, kwargs: dict[str, Any], closure: Any) -> Any:
        """Both passes of one batch; the first one's output, as Lightning's closures give it."""
        backward, zero_grad = closure._backward_fn, closure._zero_grad_fn
        # Gradients of earlier batches, with whose mean this one's will descend. They are kept aside: the ascent follows
        # this batch's own gradient.
        accumulated = self._gradients.set_aside() if zero_grad is None else None
        self.is_logged, self.is_shown = (
            self._is_due(within=1),
            self._is_due(within=getattr(self._optimizer, "every", 1)),
        )
        stats = None if self._gradients.scaler is None else RunningStats(self._module)
        if isinstance(self._optimizer, SharpnessAware):
            output = self._sharp(self._optimizer, kwargs, backward, zero_grad)
        else:
            output = self._pass(kwargs, backward, sync=True, before_backward=zero_grad)
            self.result.loss = self._loss_of(output)
            self.result.grad_norm = self._grad_norm()
        if output.closure_loss is None:
            closure.warning_cache.warn("`training_step` returned `None`. If this was on purpose, ignore this...")
        if stats is not None:  # a forward pass that overflowed leaves no trace, as the step is skipped
            stats.restore(unless=self._gradients.are_finite())
        if accumulated is not None:
            self._gradients.add(accumulated)
        if is_sharded(self._trainer):  # a checkpoint made of shards takes buffers from any process
            share_buffers(self._module)
        return output

    def _sharp(
        self,
        optimizer: SharpnessAware,
        kwargs: dict[str, Any],
        backward: Callable[[Tensor], None],
        zero_grad: Callable[[], None] | None,
    ) -> Any:
        if not optimizer.needs_first_gradient:
            with optimizer.perturbed(loss_scale=self._gradients.loss_scale()), self._at_perturbed_weights():
                output = self._pass(kwargs, backward, sync=True, before_backward=zero_grad)
            self.result.loss_perturbed = self._loss_of(output)
            self.shown = self.result
            return output
        perturbs = optimizer.will_perturb()
        if perturbs:
            self.replay.begin(kwargs["batch"])
        local = perturbs and not self._sync_perturbation
        output = self._pass(kwargs, backward, sync=not local, before_backward=zero_grad)
        self.result.loss = self._loss_of(output)
        if self.result.loss is None:  # training_step skips this batch
            return output
        self.result.grad_norm = norm = self._grad_norm()
        with optimizer.perturbed(loss_scale=self._gradients.loss_scale()) as computes, self._at_perturbed_weights():
            if computes:
                optimizer.zero_grad(set_to_none=self._sync_perturbation or not self._gradients.must_stay())
                # Under loss scaling an overflow in either pass must skip the step, on every process: NaN goes through
                # the second pass's gradients, their average and the scaler's own check.
                factor = None if self._gradients.scaler is None or norm is None else 1 + 0 * norm
                with self.replay.again() as batch, self._second_pass():
                    second = self._pass({**kwargs, "batch": batch}, backward, sync=True, factor=factor)
                self.result.loss_perturbed = self._loss_of(second)
                self.shown = self.result
        return output

    def _pass(
        self,
        kwargs: dict[str, Any],
        backward: Callable[[Tensor], None],
        sync: bool,
        before_backward: Callable[[], None] | None = None,
        factor: Tensor | None = None,
    ) -> Any:
        """`training_step` and backward for every micro-batch; averaged over processes in the last one only."""
        parts = split_batch(kwargs["batch"], self._micro_batches, self._module)
        total: list[Tensor] = []
        with self.logs.averaged() if len(parts) > 1 else nullcontext():
            for i, (batch, share) in enumerate(parts):
                self.logs.share(share)
                averages = sync and i == len(parts) - 1
                with synchronised(self._trainer) if averages else unsynchronised(self._trainer):
                    output = self._loop._make_step_fn({**kwargs, "batch": batch})()  # type: ignore[arg-type]
                    if before_backward is not None and i == 0:
                        before_backward()
                    loss = output.closure_loss
                    if loss is None:
                        continue
                    total.append(loss.detach() * share)
                    loss = loss if share == 1 else loss * share
                    backward(loss if factor is None else loss * factor)
        if len(parts) > 1 and total:
            output.loss = torch.stack(total).sum()
        return output

    def _loss_of(self, output: Any) -> Tensor | None:
        """The batch's loss; Lightning has divided it by the number of accumulated batches."""
        return None if output.loss is None else output.loss * self._trainer.accumulate_grad_batches

    @contextmanager
    def _second_pass(self) -> Iterator[None]:
        self.is_second_pass = True
        vars(self._module)["is_second_pass"] = True
        vars(self._trainer)["save_checkpoint"] = _save_nothing  # the first pass has saved, at w
        others = self._gradients.of_others()
        try:
            with self.logs.silent():
                yield
        finally:
            self.is_second_pass = False
            vars(self._module)["is_second_pass"] = False
            vars(self._trainer).pop("save_checkpoint", None)
            for parameter, gradient in others:
                parameter.grad = gradient

    @contextmanager
    def _at_perturbed_weights(self) -> Iterator[None]:
        """Weights that FSDP2 has gathered do not follow when the sharded ones move."""
        self.is_perturbed = True
        if is_sharded(self._trainer):
            reshard(self._module)
        try:
            yield
        finally:
            self.is_perturbed = False
            if is_sharded(self._trainer):
                reshard(self._module)  # a pass that failed leaves weights gathered at w + e

    # Logs.

    def _grad_norm(self) -> Tensor | None:
        """||g|| in the steps that need it: for the log, or to check it."""
        return self._gradients.norm() if self.is_logged or self._gradients.scaler is not None else None

    def _is_due(self, within: int) -> bool:
        """Whether one of the next steps, this one first, is one of every `log_every_n_steps`, and this batch ends it.

        A method that perturbs in every k-th step shows what it sees there in the next step that is logged.
        """
        every: int = self._trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a part of the trainer
        step = self._trainer.global_step
        is_due = every > 0 and (step + within) // every > step // every
        return is_due and not self._trainer.fit_loop._should_accumulate()


def _save_nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of `Trainer.save_checkpoint`."""
