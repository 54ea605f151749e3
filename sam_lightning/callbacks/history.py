"""A row of metrics per epoch."""

from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class EpochHistory(Callback):
    """Keeps a row of metrics for every finished epoch, in checkpoints too: a resumed run's rows are complete.

    Attributes:
        epochs: For each epoch its number from 1, `seconds` (validation included), `train/loss_epoch`, and
            what was validated in it.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._validated: dict[str, float] = {}
        self._is_open = False
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on behind the checkpoint's rows."""
        self.epochs = list(state_dict["epochs"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Completes the row of the epoch before."""
        self._close(trainer)
        self._validated = {}
        self._started = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes what was validated; what an earlier epoch left in the metrics is none of this one's."""
        metrics = trainer.callback_metrics.items()
        self._validated = {name: float(value) for name, value in metrics if name.startswith("val/")}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the epoch's row. The module logs its loss behind this hook, and checkpoints come behind that."""
        seconds = perf_counter() - self._started
        self.epochs.append({"epoch": trainer.current_epoch + 1, "seconds": seconds, **self._validated})
        self._is_open = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Completes the row before it is saved."""
        self._close(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Completes the last row."""
        self._close(trainer)

    def _close(self, trainer: Trainer) -> None:
        if self._is_open and "train/loss_epoch" in trainer.callback_metrics:
            self.epochs[-1]["train/loss_epoch"] = float(trainer.callback_metrics["train/loss_epoch"])
        self._is_open = False
