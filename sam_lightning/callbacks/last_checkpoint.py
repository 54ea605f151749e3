"""The newest state of a training, always there to go on from."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


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
