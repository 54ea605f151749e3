"""What is watched and kept during training."""

import difflib
import random
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from sam_lightning.optim.shards import whole
from sam_lightning.run_directory import flatten


class RandomStates(Callback):
    """Keeps the global random states of torch, CUDA, NumPy and Python in checkpoints.

    Lightning saves none of them, so that dropout after a resume differs from an undisturbed run's. They
    are restored when training starts, after the data loader's iterator was made and before its first
    batch. Only tensors and primitives are saved: such checkpoints load with `weights_only=True`.
    """

    def __init__(self) -> None:
        self._restore: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The random states now."""
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [name, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached],
            "python": random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts."""
        self._restore = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the states of the checkpoint, if one was loaded."""
        if self._restore is None:
            return
        torch.set_rng_state(self._restore["torch"].cpu())
        if len(self._restore["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in self._restore["cuda"]])
        name, keys, *rest = self._restore["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
        version, internal, gauss = self._restore["python"]
        random.setstate((version, tuple(internal), gauss))
        self._restore = None


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest state as `last.ckpt`, after every epoch.

    Lightning's own `save_last` waits for the next epoch in which the monitored metric improves, so that a run
    that is interrupted long after its best epoch would go back to there.

    Args:
        in_shards: Whether checkpoints are folders that all processes write into. Such a one cannot replace another
            as a whole: each epoch's has its own name, and the one before goes when it is complete.
    """

    def __init__(self, in_shards: bool = False) -> None:
        super().__init__(filename="last-{epoch}" if in_shards else "last", save_on_train_epoch_end=True)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Has the files found again of a run that was moved, or is named by another path than before.

        Lightning compares the folder's name as it was typed, and else forgets which epoch was the best.
        """
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key, {})
            if not (isinstance(callback, ModelCheckpoint) and callback.dirpath and state.get("best_model_path")):
                continue
            folder = Path(callback.dirpath)
            if (folder / Path(state["best_model_path"]).name).exists():
                state["dirpath"] = callback.dirpath
                for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[key] = state[key] and str(folder / Path(state[key]).name)
                scores = state["best_k_models"].items()
                state["best_k_models"] = {str(folder / Path(path).name): score for path, score in scores}


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


class WeightHistograms(Callback):
    """Writes histograms of chosen parameters to TensorBoard, at the start and after epochs.

    Args:
        parameters: Names as `named_parameters()` of the LightningModule gives them, such as
            `network.conv1.weight`.
        every_n_epochs: Epochs from one histogram to the next, at least 1.
    """

    def __init__(self, parameters: list[str], every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be an integer >= 1, got {every_n_epochs!r}.")
        self.parameters = parameters
        self.every_n_epochs = every_n_epochs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses names that do not exist before anything trains."""
        names = [name for name, _ in pl_module.named_parameters()]
        for name in self.parameters:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
                raise ValueError(f"WeightHistograms: no parameter {name!r}; the nearest are {', '.join(near)}.")

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
            values = whole(weights[name].detach()).float()  # by every process, whether it writes or not
            for logger in tensorboards(trainer):
                logger.experiment.add_histogram(f"weights/{name}", values, trainer.global_step)


class HyperparameterPage(Callback):
    """Puts a run on TensorBoard's page of hyperparameters, beside its validation and test metrics."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Names the metrics that the page shows; it takes the newest value of each from the run's scalars.

        A later `test` need not write again, which the page would not read: of a run it knows the first word.
        """
        names = {name.partition("/")[2] for name in trainer.callback_metrics if name.startswith("val/")}
        metrics = dict.fromkeys(f"{stage}/{name}" for name in sorted(names) for stage in ("test", "val"))
        data = getattr(trainer, "datamodule", None)
        settings = {**pl_module.hparams_initial, "data": dict(data.hparams_initial) if data else {}}
        settings["m_sharpness"] = getattr(pl_module, "m_sharpness", None)
        known = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in flatten(settings)}
        for logger in tensorboards(trainer):
            for summary in hparams(known, metrics):  # type: ignore[no-untyped-call]
                logger.experiment._get_file_writer().add_summary(summary)


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The TensorBoard loggers of this process that write: none but in the first process."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers if trainer.is_global_zero else []
