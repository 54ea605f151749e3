"""Sharpness watched during training."""

import math
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sam_lightning.optim import SharpnessAware
from sam_lightning.optim.checks import check_integer
from sam_lightning.sharpness import CurvatureError, Settings, Sharpness, measure
from sam_lightning.sharpness.adaptive import real
from sam_lightning.sharpness.measures import Tell
from sam_lightning.tensors import global_norm
from sam_lightning.training import SharpnessAwareTraining
from sam_lightning.training.measured_loss import measured_loss
from sam_lightning.training.sharp_step import SharpStep
from sam_lightning.training.training_sample import training_sample

_ALARMS = 3  # logged steps in a row


class SharpnessMonitor(Callback):
    r"""Logs how sharp the loss is: what SAM's two passes show by the way, and measures after epochs.

    Every `trainer.log_every_n_steps` steps of a sharpness-aware optimizer, without a gradient of its own:

    - `train/sharpness`, L(w + e) - L(w) on the batch: the one-step sharpness, by which SAM's loss exceeds L(w);
    - `train/perturbation_norm`, ||e||;
    - `train/grad_cosine`, the cosine between the gradients at w and at w + e. Near 1 SAM does what its base
      optimizer would do;
    - ||g|| is logged by the training itself, as `train/grad_norm`.

    They are the first process's. After every `every_n_epochs`-th epoch, `sharpness/...` are the measures of
    `sam_lightning.sharpness.measure` for the loss that the module's `training_step` returns, on the same training
    samples each time: those of the data module's `training_sample(samples, seed)`, without augmentation, or else the
    first batches of the training loader.

    It warns, with these numbers, when rho is too large: when in later epochs the loss at w + e is above the loss
    that training began with, in three logged steps in a row. There the second gradient is one of a network that
    knows less than an untrained one.

    A measurement that fails, such as one of a loss that is not finite, is left out: the first one with a warning.

    Args:
        every_n_epochs: Epochs from one measurement to the next; 0: none.
        samples: Training samples that are measured on, of all processes together.
        settings: What is measured; the seed in it chooses the samples, too. By default `Settings()`.

    Attributes:
        history: For each measurement its `epoch`, from 1, and the measures by name. Kept in checkpoints.

    Cost of a measurement: that of `measure` with these settings.
    """

    def __init__(self, every_n_epochs: int = 5, samples: int = 512, settings: Settings | None = None) -> None:
        self.every_n_epochs = check_integer("every_n_epochs", every_n_epochs, least=0)
        self.samples = check_integer("samples", samples)
        self.settings = settings or Settings()
        self.history: list[dict[str, float]] = []
        self._first_loss: float | None = None
        self._alarms = 0
        self._has_failed = False
        self._weights: list[Tensor] | None = None
        self._gradient: list[Tensor] = []
        self._signals: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far, and the loss that training began with."""
        return {"history": self.history, "first_loss": self._first_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on behind the checkpoint's."""
        self.history = list(state_dict["history"])
        self._first_loss = state_dict["first_loss"]

    # What the two passes show.

    @torch.no_grad()
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps w and its gradient; at w + e, compares. Each backward of a micro-batch adds to the gradients."""
        optimizer, step = trainer.optimizers[0], _step(trainer)
        if step is None or not isinstance(optimizer, SharpnessAware) or not step.is_shown:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradient = [real(p.grad) for p in parameters if p.grad is not None]
        if not step.is_second_pass:
            self._weights = [p.clone() for p in parameters]
            self._gradient = [g.clone() for g in gradient]  # copies: gradients may be views of shared memory
        elif self._weights is not None and len(self._weights) == len(parameters):
            a, b = optimizer.blend  # whose share of the first gradient lies in the second one's place
            gradient = list(torch._foreach_sub(gradient, self._gradient, alpha=a / b)) if a else gradient
            products = torch._foreach_mul(self._gradient, gradient)
            product = torch.stack([p.sum(dtype=torch.float32) for p in products]).sum()
            norms = global_norm(self._gradient) * global_norm(gradient)
            self._signals = {
                "train/perturbation_norm": global_norm(list(torch._foreach_sub(parameters, self._weights))),
                "train/grad_cosine": product / norms,
            }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what was seen in this step."""
        step = _step(trainer)
        if step is None or not outputs:
            return
        before, perturbed = step.shown.loss, step.shown.loss_perturbed
        if before is None or perturbed is None:
            return
        if self._first_loss is None:
            self._first_loss = float(before)
        if self._signals and step.is_logged:
            pl_module.log_dict({"train/sharpness": perturbed - before, **self._signals})
            self._warn_if_too_far(trainer, float(before), float(perturbed))
            self._weights, self._gradient, self._signals = None, [], {}

    def _warn_if_too_far(self, trainer: Trainer, before: float, perturbed: float) -> None:
        """Evidence over several steps, since a batch may be odd; not in the first epoch, in which it is normal."""
        assert self._first_loss is not None
        exploded = math.isfinite(before) and not perturbed <= self._first_loss
        self._alarms = self._alarms + 1 if exploded and trainer.current_epoch > 0 else 0
        if self._alarms == _ALARMS:
            optimizer = trainer.optimizers[0]
            assert isinstance(optimizer, SharpnessAware)
            radii = sorted({rho for group in optimizer.param_groups if (rho := optimizer.radius(group)) > 0})
            numbers = {name: float(value) for name, value in self._signals.items()}
            warnings.warn(
                f"rho = {', '.join(f'{rho:g}' for rho in radii)} looks too large for this network: at step "
                f"{trainer.global_step} the loss rises from {before:.4g} at w to {perturbed:.4g} at w + e, above the "
                f"{self._first_loss:.4g} that training began with, for the {_ALARMS}rd logged step in a row. ||e|| = "
                f"{numbers['train/perturbation_norm']:.3g}, cosine between the two gradients "
                f"{numbers['train/grad_cosine']:.3g}. Try half of rho.",
                stacklevel=2,
            )

    # What is measured.

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures after every `every_n_epochs`-th epoch."""
        epoch = trainer.current_epoch + 1
        if not self.every_n_epochs or epoch % self.every_n_epochs:
            return
        batches = training_sample(trainer, self.samples, self.settings.seed)
        try:
            found = measure_module(pl_module, batches, self.settings)
        except CurvatureError as error:  # in every process alike
            if not self._has_failed:
                rank_zero_warn(f"sharpness is not measured after epoch {epoch}, and training goes on: {error}")
            self._has_failed = True
            return
        values = {name: value for name, (value, _) in found.rows().items()}
        self.history.append({"epoch": epoch, **values})
        pl_module.log_dict({f"sharpness/{name}": value for name, value in values.items()})


def measure_module(
    module: LightningModule, batches: list[Any], settings: Settings, tell: Tell | None = None
) -> Sharpness:
    """Measures the loss that `training_step` returns."""
    with measured_loss(module) as loss:
        return measure(module, loss, batches, settings, tell)


def _step(trainer: Trainer) -> SharpStep | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # of a part of the trainer
    return next((callback.step for callback in callbacks if isinstance(callback, SharpnessAwareTraining)), None)
