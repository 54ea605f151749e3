"""Sharpness-aware training of a LightningModule that knows nothing of it."""

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from sam_lightning.optim import RadiusSchedule, SharpnessAware
from sam_lightning.optim.checks import check_integer
from sam_lightning.optim.radius_schedules import end_schedule, follow_schedule
from sam_lightning.replay import Replay
from sam_lightning.training.divergence import refuse_diverged
from sam_lightning.training.lightning_packages import of_both_packages
from sam_lightning.training.methods import Method, make_sharp, maker_of, refuse_own_steps, trained_weights
from sam_lightning.training.micro_batches import common_length
from sam_lightning.training.resume import go_on_with_the_next_epoch, tell_of_other_radii
from sam_lightning.training.sharp_step import SharpStep
from sam_lightning.training.step_logs import StepLogs
from sam_lightning.training.step_metrics import StepMetrics
from sam_lightning.training.strategies import data_parallel_size, refuse_options, refuse_strategy


class SharpnessAwareTraining(Callback):
    """Makes any LightningModule that is written for automatic optimization take sharp steps.

        Trainer(max_epochs=10, callbacks=[SharpnessAwareTraining(SAM, rho=0.05)]).fit(module, data)

    The module stays as it is: its `training_step`, `configure_optimizers`, hooks, logs and checkpoints, and the
    Trainer's `gradient_clip_val` (of the gradient that descends) and `accumulate_grad_batches` (each batch climbs from
    the same w, and the step descends along their mean; a method with a memory renews it from the last of them). There
    is one optimizer step where there was one.

    Every `log_every_n_steps` steps it logs `train/loss` (first pass), `train/loss_perturbed` (second pass),
    `train/grad_norm` (||g|| at w, before clipping) and `lr`, and per epoch `train/loss_epoch`, the mean over batches of
    the first pass's loss; names that the module logs itself are the module's.

    Args:
        method: A class of `sam_lightning`, its name, or a `functools.partial` of a class with options; it is put
            around the optimizer that the module makes.
        rho: Radius of the perturbation; by default the method's own.
        second_pass: `replay` makes the second pass the same function as the first: same random numbers, batch, buffers
            and metrics; `fresh` draws new random numbers.
        sync_perturbation: In data-parallel training, whether all processes climb along their mean gradient (two
            all-reduces a step) or each along its own (m-sharpness with m the batch of one process; one all-reduce a
            step, and a different method).
        batch_norm_stats: The passes that update running statistics: the first only, or both.
        micro_batches: Number of parts that each batch is cut into, to save memory, with one perturbation for all.
            Normalisation layers see the parts. The loss must be a mean over samples; for another one, or for a batch
            that is no structure of tensors of one length, give the module `split_batch(batch, count)`, which returns
            parts with their weights in the loss.
        radius: A schedule, such as `sam_lightning.optim.late(0.9)`: before each step every group's rho is its own times
            what the schedule makes of the training's progress.
        every: Perturb in every k-th step only, the first included.
        options: The method's other options, such as ASAM's `eta`; on the command line `dict_kwargs.eta`.

    Raises:
        ValueError: If an option is not one of those allowed.

    Attributes:
        m_sharpness: The number of samples that share a perturbation, known once training has begun; `None` without a
            sharpness-aware optimizer. Logged once.
        step: What takes the steps, and what its passes came to; `None` outside of training.
    """

    def __init__(
        self,
        method: Method | None = "SAM",
        rho: float | None = None,
        second_pass: Literal["replay", "fresh"] = "replay",
        sync_perturbation: bool = False,
        batch_norm_stats: Literal["first", "both"] = "first",
        micro_batches: int = 1,
        radius: RadiusSchedule | None = None,
        every: int = 1,
        **options: Any,
    ) -> None:
        for name, value, allowed in (
            ("second_pass", second_pass, ("replay", "fresh")),
            ("batch_norm_stats", batch_norm_stats, ("first", "both")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
        self.second_pass = second_pass
        self.sync_perturbation = sync_perturbation
        self.batch_norm_stats = batch_norm_stats
        self.micro_batches = check_integer("micro_batches", micro_batches)
        self.radius = radius
        self.m_sharpness: int | None = None
        self._method = maker_of(method)
        given = {"rho": rho, "every": None if every == 1 else every}
        self._options = {**{name: value for name, value in given.items() if value is not None}, **options}
        self.step: SharpStep | None = None
        self._hooks: list[Any] = []
        self._radii: list[float] = []
        self._metrics = StepMetrics()
        self.__class__ = of_both_packages(type(self))

    # Before the first batch.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot take a sharp step, before the strategy wraps the module."""
        if stage != "fit":
            return
        others = [callback for callback in trainer.callbacks if isinstance(callback, SharpnessAwareTraining)]  # type: ignore[attr-defined]
        if others[0] is not self or len(others) > 1:
            raise ValueError("a Trainer takes one SharpnessAwareTraining callback; remove the others.")
        refuse_own_steps(pl_module)
        self._metrics = StepMetrics()  # of this training; a checkpoint's come later
        refuse_strategy(trainer)
        # First of all callbacks: one that searches for a learning rate or a batch size trains in its `on_fit_start`.
        trainer.callbacks.remove(self)  # type: ignore[attr-defined]
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the method around the module's optimizer, and two passes in the place of one."""
        self._remove(trainer)  # of a search that was broken off
        optimizer = make_sharp(trainer, pl_module, self._method, self._options)
        self.m_sharpness = None
        self._radii = optimizer.own_radii() if isinstance(optimizer, SharpnessAware) else []
        refuse_options(trainer, pl_module, optimizer, self.sync_perturbation, self.micro_batches)
        self._hooks = [pl_module.register_state_dict_pre_hook(self._refuse_perturbed)]  # type: ignore[no-untyped-call]
        replay = Replay(
            pl_module,
            lambda: trained_weights(trainer),
            same_random_numbers=self.second_pass == "replay",
            running_stats=self.batch_norm_stats == "first",
        )
        logs = StepLogs(trainer, pl_module)
        self.step = SharpStep(trainer, pl_module, replay, logs, self.micro_batches, self.sync_perturbation)

    def _refuse_perturbed(self, *args: Any) -> None:
        """Whatever would save the weights, checkpoints first of all, asks for the module's `state_dict`."""
        if self.step is not None and self.step.is_perturbed:
            raise RuntimeError(
                "the weights are perturbed in the second pass: save or export them outside of training_step."
            )

    # While training.

    @property
    def is_second_pass(self) -> bool:
        """Whether `training_step` runs once more for this batch, at w + e: never for methods with one pass."""
        return self.step is not None and self.step.is_second_pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells of a checkpoint with other radii, and forgets its schedule where there is none now."""
        optimizer = trainer.optimizers[0]
        if not isinstance(optimizer, SharpnessAware):
            return
        tell_of_other_radii(self._radii, optimizer.own_radii())
        if self.radius is None:
            end_schedule(optimizer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the step's radius; notes m, of the first batch: an incomplete last one has fewer samples."""
        optimizer = trainer.optimizers[0]
        if not isinstance(optimizer, SharpnessAware):
            return
        if self.radius is not None:
            follow_schedule(optimizer, self.radius, trainer.global_step, trainer.estimated_stepping_batches)
        if self.m_sharpness is not None or not optimizer.needs_first_gradient:
            return
        samples = common_length(batch)
        if samples is not None:
            self.m_sharpness = samples * (data_parallel_size(trainer) if self.sync_perturbation else 1)
            for logger in trainer.loggers:
                logger.log_metrics({"m_sharpness": self.m_sharpness}, step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what the passes came to, and warns once of what could not be kept from the second one."""
        if self.step is None or not outputs:  # a batch that nothing was made of
            return
        self._metrics.add(self.step.result)
        for finding in self.step.replay.findings():
            rank_zero_warn(finding)
        if self.step.is_logged:
            self._refuse_diverged(trainer)
            lr = trainer.optimizers[0].param_groups[0].get("lr")
            self._metrics.log_step(pl_module, self.step.logs, self.step.result, self.step.shown, lr)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the epoch's mean loss.

        Raises:
            DivergedError: If the weights are not finite.
        """
        self._refuse_diverged(trainer)
        assert self.step is not None
        self._metrics.log_epoch(pl_module, self.step.logs)

    def _refuse_diverged(self, trainer: Trainer) -> None:
        refuse_diverged(trained_weights(trainer), trainer.current_epoch, trainer.global_step)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The losses of the epoch so far, so that a resumed epoch has the same mean."""
        return self._metrics.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the losses of the epoch so far."""
        self._metrics.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to save weights that are not finite.

        Raises:
            DivergedError: If they are not.
        """
        if trainer.optimizers:
            self._refuse_diverged(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Has training go on with the next epoch behind one that was finished or cut short."""
        if trainer.state.fn == "fit" and "loops" in checkpoint:
            go_on_with_the_next_epoch(checkpoint, trainer.max_epochs, trainer.max_steps)

    # Afterwards all is as before.

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives module and trainer their own step and log back."""
        self._remove(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out then."""
        self._remove(trainer)

    def _remove(self, trainer: Trainer) -> None:
        for hook in self._hooks:
            hook.remove()
        if self.step is not None:
            self.step.remove()
        self._hooks, self.step = [], None
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, SharpnessAware):
                optimizer.free_copies()
