"""A row of metrics per epoch."""

from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sam_lightning.callbacks.validation_metrics import ValidationMetrics
from sam_lightning.training import SharpnessAwareTraining

LOSS = "train/loss_epoch"


class EpochHistory(Callback):
    """Keeps a row of metrics for every finished epoch, in checkpoints too: a resumed run's rows are complete.

    Attributes:
        epochs: For each epoch its number from 1, `seconds` (validation included), `train/loss_epoch`, and what was
            validated in it, by the module's names. A module that does not log `train/loss_epoch` gets the mean over
            batches of what its training steps returned as loss; there is none if they return no loss.
            `gradients_per_step` is the mean number of passes of a batch: 2 for SAM, 1.2 for SAM in every fifth step.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._validation = ValidationMetrics()
        self._validated: dict[str, float] = {}
        self._is_open = False
        self._started = 0.0
        self._loss: Tensor | float = 0.0  # the sum over the epoch's batches
        self._batches = 0
        self._gradients = 0
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and the losses of the epoch that has begun."""
        return {
            "epochs": self.epochs,
            "loss": float(self._loss),
            "batches": self._batches,
            "gradients": self._gradients,
            "steps": self._steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on behind the checkpoint's rows."""
        self.epochs = list(state_dict["epochs"])
        self._loss, self._batches = state_dict.get("loss", 0.0), state_dict.get("batches", 0)
        self._gradients, self._steps = state_dict.get("gradients", 0), state_dict.get("steps", 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Completes the row of the epoch before."""
        self._close(trainer)
        self._validated = {}
        self._started = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the step's loss, on its device."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            # Lightning has divided it by the number of accumulated batches.
            self._loss = self._loss + loss.detach() * trainer.accumulate_grad_batches
            self._batches += 1
        self._gradients += _passes(trainer)
        self._steps += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers what was logged before."""
        self._validation.start(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes what was validated; what an earlier epoch left in the metrics is none of this one's."""
        self._validated = self._validation.end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the epoch's row. The module logs its loss behind this hook, and checkpoints come behind that."""
        row = {"epoch": trainer.current_epoch + 1, "seconds": perf_counter() - self._started, **self._validated}
        if self._batches:
            row[LOSS] = float(trainer.strategy.reduce(self._loss / self._batches, reduce_op="mean"))
        if self._steps:
            row["gradients_per_step"] = self._gradients / self._steps
        self._loss, self._batches, self._gradients, self._steps = 0.0, 0, 0, 0
        self.epochs.append(row)
        self._is_open = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Completes the row before it is saved."""
        self._close(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Completes the last row."""
        self._close(trainer)

    def _close(self, trainer: Trainer) -> None:
        if self._is_open and LOSS in trainer.callback_metrics:
            self.epochs[-1][LOSS] = float(trainer.callback_metrics[LOSS])
        self._is_open = False


def _passes(trainer: Trainer) -> int:
    """How many gradients the last batch took."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # of a part of the trainer
    found = (c.step.result.passes for c in callbacks if isinstance(c, SharpnessAwareTraining) and c.step)
    return next(found, 1)
