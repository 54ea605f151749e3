"""What a command prints and leaves when it has ended."""

import re
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from sam_lightning.runs.directory import CHECKPOINTS


@rank_zero_only
def print_outcome(trainer: Trainer, run: Path, evaluated: str | None) -> None:
    """Prints the metrics and where everything is.

    Args:
        trainer: Behind its command.
        run: The run's directory.
        evaluated: The checkpoint of an evaluation, of which every metric is shown; `None` after a training, of which
            the validation's are.
    """
    metrics = trainer.callback_metrics
    for name in sorted(metrics):
        if evaluated or re.match(r"val(id|idation)?[/_.-]", name):
            print(f"{re.sub(r'[/_]', ' ', name):<15}{metrics[name].item():.4f}")
    if evaluated:
        print(f"{'checkpoint':<15}{evaluated}")
    print(f"{'run':<15}{run}")
    checkpoints = sorted((run / CHECKPOINTS).glob("*.ckpt"))
    if checkpoints:
        print(f"{'checkpoints':<15}{run / CHECKPOINTS}: {', '.join(path.name for path in checkpoints)}")
    print(f"{'tensorboard':<15}tensorboard --host 127.0.0.1 --logdir {run}")


def save_predictions(trainer: Trainer, run: Path) -> None:
    """Saves what this process predicted: the outputs of `predict_step`, a list with one entry per batch."""
    rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
    path = run / f"predictions{rank}.pt"
    run.mkdir(parents=True, exist_ok=True)
    torch.save(trainer.predict_loop.predictions, path)
    print(f"{'predictions':<15}{path}")


@rank_zero_only
def say_how_to_go_on(run: Path) -> None:
    """After Ctrl-C, which Lightning turns into a `SystemExit` that `CLI.fit` in `command.py` catches."""
    saved = any((run / CHECKPOINTS).glob("*.ckpt"))
    how = f"go on with: sam-lightning fit --ckpt_path {run}" if saved else "no epoch was finished, none saved"
    print(f"interrupted: {how}", file=sys.stderr)
