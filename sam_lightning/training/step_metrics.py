"""What the passes come to, in the log: step by step, and as the epoch's mean."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from sam_lightning.training.step_logs import StepLogs


@dataclass
class StepResult:
    """What the passes of one batch came to; tensors stay on their device."""

    loss: Tensor | None = None  # at w
    loss_perturbed: Tensor | None = None  # at w + e
    grad_norm: Tensor | None = None  # ||g|| at w, before clipping; in steps that are logged

    @property
    def passes(self) -> int:
        """The number of gradients."""
        return (self.loss is not None) + (self.loss_perturbed is not None)


class StepMetrics:
    """Logs `train/loss` and its companions; a name that the module logs itself is the module's."""

    def __init__(self) -> None:
        self._loss_sum: Tensor | float = 0.0  # of the epoch so far; on its device until the epoch ends
        self._batches = 0

    def add(self, result: StepResult) -> None:
        """Adds a batch to the epoch's mean."""
        loss = result.loss_perturbed if result.loss is None else result.loss
        if loss is not None:
            self._loss_sum = self._loss_sum + (loss if loss.device.type == "mps" else loss.double())
            self._batches += 1

    def log_step(self, module: LightningModule, logs: StepLogs, result: StepResult, shown: StepResult, lr: Any) -> None:
        """Logs a batch, and of the last one that was perturbed (`shown`) the loss there.

        As if from `training_step`: what the module logs in a later hook under one of these names is another value.
        """
        found = {
            "train/loss": result.loss,
            "train/loss_perturbed": shown.loss_perturbed,
            "train/grad_norm": result.grad_norm,
            "lr": None if lr is None else float(lr),
        }
        hook, module._current_fx_name = module._current_fx_name, "training_step"
        with logs.unrecorded():
            for name, value in found.items():
                if value is not None and name not in logs.names:
                    module.log(name, value, prog_bar=name == "train/loss", batch_size=1)
        module._current_fx_name = hook

    def log_epoch(self, module: LightningModule, logs: StepLogs) -> None:
        """Logs the epoch's mean loss, and begins the next one's."""
        if self._batches and not {"train/loss", "train/loss_epoch"} & logs.names:
            with logs.unrecorded():
                mean = float(self._loss_sum) / self._batches
                module.log("train/loss_epoch", mean, sync_dist=module.trainer.world_size > 1, batch_size=1)
        self._loss_sum, self._batches = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """The losses of the epoch so far, so that a resumed epoch has the same mean."""
        return {"loss_sum": float(self._loss_sum), "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the losses of the epoch so far."""
        self._loss_sum, self._batches = state_dict["loss_sum"], state_dict["batches"]
