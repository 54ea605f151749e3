"""TensorBoard's page of hyperparameters."""

import os
import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from sam_lightning.callbacks.tensorboard import tensorboards
from sam_lightning.callbacks.validation_metrics import ValidationMetrics
from sam_lightning.optim import SharpnessAware
from sam_lightning.runs.settings import flatten

# What runs are compared by, as the page's first columns.
_FIRST = ("method", "rho", "learning rate", "batch size", "seed", "epochs", "data", "network")

Value = bool | int | float | str


class HyperparameterPage(Callback):
    """Puts a run on TensorBoard's page of hyperparameters, beside its last and its best metrics.

    First what one compares: method, rho (0 without a sharpness-aware optimizer), learning rate, batch size, seed,
    epochs, data and network, read from the optimizer, the trainer and the data as they are when training starts.
    Behind them what the module and the data module saved by `save_hyperparameters`.

    A metric is the run's last value; `best/...` is that of a checkpoint callback's monitor, at its best.
    """

    def __init__(self) -> None:
        self._validation = ValidationMetrics()
        self._settings: dict[str, Value] = {}
        self._metrics: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keeps Lightning from an entry of its own: of a run the page knows the first only."""
        for logger in tensorboards(trainer):
            logger._default_hp_metric = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the settings before a schedule changes them."""
        self._settings = {**_compared(trainer, pl_module), **_saved(trainer, pl_module)}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers what was logged before."""
        self._validation.start(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers the names of what was validated."""
        self._metrics = sorted({*self._metrics, *self._validation.end(trainer)})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the run's entry; the page takes the newest value of each metric from the run's scalars.

        A later `test` need not write again: its metrics are named like those of the validation.
        """
        best = _best(trainer)
        tests = [re.sub("^val(id(ation)?)?", "test", name) for name in self._metrics if name.startswith("val")]
        for logger in tensorboards(trainer):
            for name, value in best.items():
                logger.experiment.add_scalar(name, value, trainer.global_step)
            for summary in _entry(self._settings, [*best, *self._metrics, *tests]):
                logger.experiment._get_file_writer().add_summary(summary)


def _entry(settings: Mapping[str, Value], metrics: list[str]) -> list[Any]:
    """The summaries of a run.

    The page sorts columns by name and shows the first five: names are numbered, and shown without their numbers.
    """
    names = {key: f"{place}. {key}" for place, key in enumerate(_FIRST, start=1)}
    named = {names.get(key, key): value for key, value in settings.items()}
    experiment, start, end = hparams(named, dict.fromkeys(metrics))  # type: ignore[no-untyped-call]
    metadata = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(metadata.content)
    for info in content.experiment.hparam_infos:
        info.display_name = next((key for key, name in names.items() if name == info.name), info.name)
    metadata.content = content.SerializeToString()
    return [experiment, start, end]


def _compared(trainer: Trainer, module: LightningModule) -> dict[str, Value]:
    optimizer = trainer.optimizers[0]
    groups = optimizer.param_groups
    loader: Any = trainer.train_dataloader
    data: Any = getattr(trainer, "datamodule", None) or getattr(loader, "dataset", None)
    found: dict[str, Any] = {
        "method": type(optimizer).__name__,
        "rho": max(optimizer.own_radii()) if isinstance(optimizer, SharpnessAware) else 0.0,
        # With a schedule, what it begins from; before a warm-up and not in it.
        "learning rate": max(float(group.get("initial_lr", group["lr"])) for group in groups),
        "batch size": getattr(data, "batch_size", None) or getattr(loader, "batch_size", None),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "epochs": trainer.max_epochs,
        "data": type(data).__name__ if data is not None else None,
        "network": _network(module),
    }
    return {key: value for key, value in found.items() if value is not None}


def _network(module: LightningModule) -> str:
    configured = module.hparams_initial.get("network")
    if isinstance(configured, Mapping) and "class_path" in configured:
        return _short(configured["class_path"])
    return type(getattr(module, "network", module)).__name__


def _saved(trainer: Trainer, module: LightningModule) -> dict[str, Value]:
    data = getattr(trainer, "datamodule", None)
    settings = {**module.hparams_initial, "data": dict(data.hparams_initial) if data else {}}
    found: dict[str, Value] = {}
    for key, value in flatten(settings):
        words = [word.lstrip("_") for word in key.split(".") if word not in ("init_args", "class_path", "_class_path")]
        if value is not None:
            found[".".join(words) or "module"] = value if isinstance(value, int | float) else _short(str(value))
    return found


def _short(text: str) -> str:
    """A class path without its packages; other text as it is."""
    is_path = all(part.isidentifier() for part in text.split("."))
    return text.rpartition(".")[2] if is_path else text


def _best(trainer: Trainer) -> dict[str, float]:
    """The best value of every metric that decides which checkpoints are kept."""
    found = {}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
            found[f"best/{callback.monitor}"] = float(callback.best_model_score)
    return found
