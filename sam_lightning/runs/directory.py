"""The directory of one run: its name, the names of its files, and its configuration."""

from pathlib import Path
from typing import Any

from sam_lightning.runs.atomic_files import replacing

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
SHARPNESS = "sharpness.json"  # of the command `sharpness`
RESULT = "result.json"  # of a study's finished run, as the two below
WEIGHTS = "weights.npz"
LOG = "log.txt"


def write_config(run: Path, text: str) -> None:
    """Writes the run's configuration; one that it replaces is kept under a number."""
    path = run / CONFIG
    if path.exists():
        if path.read_text() == text:
            return
        number = next(n for n in range(1, 10**6) if not (run / f"config.{n}.yaml").exists())
        path.rename(run / f"config.{number}.yaml")
    with replacing(path) as draft:
        draft.write_text(text)


def run_name(config: Any) -> str:
    """`<data>-<optimizer>-seed<seed>`, in lower case; the model's name where it has no optimizer."""
    names = [
        config.get("data.class_path"),
        config.get("model.init_args.optimizer.class_path", config.model.class_path),
    ]
    words = [name.rpartition(".")[2].lower() for name in names if name]
    return "-".join([*words, f"seed{config.seed_everything}"])
