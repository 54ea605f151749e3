"""Steps the learning rate schedulers of a trainer: Lightning does not in manual optimization."""

from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau


def step_schedulers(trainer: Trainer) -> None:
    """After an optimizer step: every scheduler that is due by its `interval` and `frequency`.

    Those of epochs at the epoch's last batch rather than at its end, so that a checkpoint of that batch has it.
    """
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            continue
        done = trainer.global_step if config.interval == "step" else trainer.current_epoch + 1
        if (config.interval == "step" or trainer.is_last_batch) and done % config.frequency == 0:
            config.scheduler.step()


def step_plateaus(trainer: Trainer) -> None:
    """After an epoch and its validation: every `ReduceLROnPlateau`, with its `monitor` or else `val/loss`.

    Raises:
        ValueError: If that metric was not logged.
    """
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            monitor = getattr(config.scheduler, "monitor", "val/loss")
            metrics = trainer.callback_metrics
            if monitor not in metrics:
                raise ValueError(f"ReduceLROnPlateau monitors {monitor!r}, logged were {sorted(metrics)}.")
            config.scheduler.step(metrics[monitor])
