"""TensorBoard's page of hyperparameters."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.tensorboard.summary import hparams

from sam_lightning.callbacks.tensorboard import tensorboards
from sam_lightning.runs.settings import flatten


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
