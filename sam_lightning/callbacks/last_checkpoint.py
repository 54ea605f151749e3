"""The newest state of a training, always there to go on from."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest state as `last.ckpt`, after every epoch.

    Lightning's own `save_last` waits for the next epoch in which the monitored metric improves, so that a run
    that is interrupted long after its best epoch would go back to there.

    An epoch that is cut (by `max_time`, or an early stop between two validations) is not kept if one before it was
    finished: training goes on from an epoch's end, and does the cut one anew. One that ends with `max_steps` is kept.

    Args:
        in_shards: Whether checkpoints are folders that all processes write into. Such a one cannot replace another
            as a whole: each epoch's has its own name, and the one before goes when it is complete.
    """

    STEM = "last"

    def __init__(self, in_shards: bool = False) -> None:
        super().__init__(filename=f"{self.STEM}-{{epoch}}" if in_shards else self.STEM, save_on_train_epoch_end=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, unless the epoch was cut and there is a finished one."""
        is_whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        is_done = 0 <= trainer.max_steps <= trainer.global_step
        if is_whole or is_done or not self._has_saved(trainer):
            super().on_train_epoch_end(trainer, pl_module)
        else:
            rank_zero_info("Stopped within an epoch: last.ckpt is of the epoch before, from which training can go on.")

    def _has_saved(self, trainer: Trainer) -> bool:
        there = self.dirpath is not None and any(Path(self.dirpath).glob(f"{self.STEM}*.ckpt"))
        return trainer.strategy.broadcast(there)

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
