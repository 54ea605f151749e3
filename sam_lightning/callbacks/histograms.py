"""Histograms of weights in TensorBoard."""

import difflib
import warnings

from lightning.pytorch import Callback, LightningModule, Trainer

from sam_lightning.callbacks.tensorboard import tensorboards
from sam_lightning.optim.checks import check_integer
from sam_lightning.tensors.shards import full_tensor


class WeightHistograms(Callback):
    """Writes histograms of chosen parameters to TensorBoard, at the start and after epochs.

    Args:
        parameters: Names as `named_parameters()` of the LightningModule gives them, such as
            `network.conv1.weight`.
        every_n_epochs: Epochs from one histogram to the next, at least 1.
    """

    def __init__(self, parameters: list[str], every_n_epochs: int = 1) -> None:
        self.parameters = parameters
        self.every_n_epochs = check_integer("every_n_epochs", every_n_epochs)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses names that do not exist before anything trains, and warns if nobody takes histograms."""
        names = [name for name, _ in pl_module.named_parameters()]
        for name in self.parameters:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
                raise ValueError(f"WeightHistograms: no parameter {name!r}; the nearest are {', '.join(near)}.")
        if trainer.is_global_zero and not tensorboards(trainer):
            warnings.warn("WeightHistograms writes to TensorBoard loggers only, and there is none.", stacklevel=2)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the weights that training starts from."""
        self._write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the weights after every `every_n_epochs`-th epoch."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = dict(pl_module.named_parameters())
        for name in self.parameters:
            values = full_tensor(weights[name].detach()).float()  # by every process, whether it writes or not
            for logger in tensorboards(trainer):
                logger.experiment.add_histogram(f"weights/{name}", values, trainer.global_step)
