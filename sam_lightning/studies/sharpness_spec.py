"""The key `sharpness` of a study file: what is measured of every run."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from sam_lightning.runs.directory import SHARPNESS
from sam_lightning.sharpness import Settings

_MONITOR = "sam_lightning.callbacks.sharpness_monitor.SharpnessMonitor"


@dataclass(frozen=True)
class SharpnessSpec:
    """What is measured of every run: at its end by the command `sharpness`, and during training by a callback.

    Args:
        samples: Training samples that are measured on.
        every: Epochs from one measurement to the next during training; 0: at the end only.
        settings: What is measured, and how.
    """

    samples: PositiveInt = 1000
    every: NonNegativeInt = 0
    settings: Settings = field(default_factory=Settings)

    @classmethod
    def of(cls, values: dict[str, Any] | None) -> "SharpnessSpec | None":
        """From what `dataclasses.asdict` makes of one."""
        return None if values is None else cls(**{**values, "settings": Settings(**values["settings"])})

    def problem(self) -> str | None:
        """What cannot be meant: found before anything trains, not behind it."""
        numbers = {name: value for name, value in asdict(self.settings).items() if name not in ("batch_norm", "seed")}
        wrong = [f"{name} {value}" for name, value in numbers.items() if value is not None and not value > 0]
        return f"settings: must be > 0, got {', '.join(wrong)}." if wrong else None

    def in_training(self) -> list[str]:
        """Words of a `fit` command that have it measured during training."""
        if not self.every:
            return []
        options = {"every_n_epochs": self.every, "samples": self.samples, "settings": asdict(self.settings)}
        return [f"--trainer.callbacks+={json.dumps({'class_path': _MONITOR, 'init_args': options})}"]

    def command(self, directory: Path) -> list[str]:
        """The command behind `sam-lightning` that measures a run at its last epoch."""
        words = ["sharpness", "--ckpt_path", str(directory), "--samples", str(self.samples)]
        for name, value in asdict(self.settings).items():
            words += [] if value is None else [f"--settings.{name}", str(value)]
        return words

    def is_done(self, directory: Path) -> bool:
        """Whether the run's last epoch was measured like this."""
        try:
            content = json.loads((directory / SHARPNESS).read_text())
            return bool(
                content["settings"] == asdict(self.settings)
                and content["samples_asked"] == self.samples
                and Path(content["checkpoint"]).name.startswith("last")
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False
