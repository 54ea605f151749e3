"""The files of a training's run: its configuration, and those of the run that it replaces."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sam_lightning.runs.checkpoints import CheckpointError, find_checkpoint, read_checkpoint
from sam_lightning.runs.directory import CONFIG, write_config
from sam_lightning.runs.overwrite import remove_replaced, set_aside
from sam_lightning.runs.settings import as_text, differences_to_checkpoint


class RunFiles(Callback):
    """Writes the run's configuration when training begins.

    Files of an earlier run are set aside in that moment, when whatever could be wrong with the new one would have
    been seen, and removed when the new one has its first checkpoint: no kill leaves the directory without one.

    Args:
        run: The run's directory.
        config: Text of its configuration.
        replaced: Files of an earlier run.
    """

    def __init__(self, run: Path, config: str, replaced: Sequence[Path]) -> None:
        self._run, self._config, self._replaced = run, config, replaced

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the earlier run's files aside, and writes the configuration."""
        if trainer.is_global_zero:
            set_aside(self._run, self._replaced)
            write_config(self._run, self._config)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the earlier run's files as soon as this one is saved."""
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes them."""
        if trainer.is_global_zero and self._replaced:
            remove_replaced(self._run)


def compare_with_checkpoint(path: Path, config: Mapping[str, Any], is_resumed: bool) -> None:
    """Refuses to resume with other settings than the checkpoint's; names them before an evaluation.

    A resumed run restores its optimizer and goes on with its data: what was typed anew would be overridden unseen, or
    change the run in its middle.

    Args:
        path: The checkpoint.
        config: The command's configuration.
        is_resumed: Whether training goes on from it.

    Raises:
        CheckpointError: If training would go on with other settings.
    """
    run = path.parent.parent
    found = differences_to_checkpoint(read_checkpoint(path), config, run / CONFIG)
    if not found:
        return
    message = f"{path} was trained with other settings:\n{as_text(found, 'in the checkpoint')}"
    if is_resumed:
        raise CheckpointError(
            f"{message}\nResume with the run's own (fit --ckpt_path {run}), or start a new run without --ckpt_path."
        )
    print(f"sam-lightning: note: {message}", file=sys.stderr)


def with_run_config(args: list[str]) -> list[str]:
    """The arguments, with the run's `config.yaml` beneath them if they name a run and no configuration."""
    given = [arg.partition("=")[0] for arg in args]
    if "--ckpt_path" not in given or {"-c", "--config", "--model"} & set(given):
        return args
    at = given.index("--ckpt_path")
    value = args[at].partition("=")[2] or "".join(args[at + 1 : at + 2])
    if value in ("", "last", "best", "null"):
        return args
    path = find_checkpoint(Path(), value)
    run = path.parent.parent
    if not (run / CONFIG).is_file():
        raise CheckpointError(f"--ckpt_path {value}: no {CONFIG} in {run.resolve()}. Give the configuration by -c.")
    return [args[0], "--config", str(run / CONFIG), "--trainer.default_root_dir", str(run), *args[1:]]
