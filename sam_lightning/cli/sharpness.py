"""The commands `sharpness` and `landscape`, as methods of the trainer."""

import json
import math
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from sam_lightning.callbacks.sharpness_monitor import measure_module
from sam_lightning.runs.atomic_files import replacing
from sam_lightning.runs.checkpoints import find_checkpoint, read_checkpoint
from sam_lightning.runs.directory import SHARPNESS
from sam_lightning.runs.extras import require
from sam_lightning.sharpness import Settings
from sam_lightning.sharpness.batches import samples_in
from sam_lightning.training.measured_loss import measured_loss
from sam_lightning.training.training_sample import training_sample

_DEFAULT = Settings()


class MeasureError(ValueError):
    """What cannot be measured."""


class MeasuringTrainer(Trainer):
    """A Lightning trainer that can measure, too."""

    def sharpness(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = "last",
        samples: int = 1000,
        settings: Settings = _DEFAULT,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Measures how sharp the training loss is at a run's weights, in one process, and keeps it with the run.

        Written to `sharpness.json` in the run's directory: the measures with their standard errors, what they were
        measured on and how. No augmentation; the loss is what the module's `training_step` returns, in single
        precision.

        Args:
            model: The module, whose training loss is measured.
            datamodule: Gives the training samples.
            ckpt_path: The weights: last, best, a run directory, or a checkpoint file.
            samples: Training samples that are measured on, chosen by the seed of the settings; all if there are fewer.
            settings: What is measured.
            weights_only: Ignored, since a run's configuration brings it: nothing in a checkpoint is ever executed.

        Returns:
            What was written.

        Raises:
            MeasureError: If module or data cannot be measured, or `samples` is less than 1.
        """
        batches = self._ready(model, datamodule, ckpt_path, samples, settings.seed)
        device = self.strategy.root_device
        count = sum(map(samples_in, batches))
        _show("checkpoint", ckpt_path)
        _show("samples", count)
        found = measure_module(model, batches, settings, _show_measure)  # at once: the last may be minutes away
        content = {
            "checkpoint": str(ckpt_path),
            "samples": count,
            "samples_asked": samples,
            "settings": asdict(settings),
            "measures": {name: {"value": v, "standard_error": error} for name, (v, error) in found.rows().items()},
            "conditions": {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "versions": {name: version(name) for name in ("sam-lightning", "torch")},
            },
        }
        with replacing(Path(self.default_root_dir) / SHARPNESS) as draft:
            draft.write_text(json.dumps(content, indent=1))
        _show("stored", Path(self.default_root_dir) / SHARPNESS)
        return content

    def landscape(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = "last",
        other: str | None = None,
        points: int = 25,
        reach: float = 1.0,
        samples: int = 1000,
        seed: int = 0,
        weights_only: bool | None = None,
    ) -> list[Path]:
        """Draws the training loss around a run's weights, beside and between them and another run's.

        Along a random filter-normalised direction and over the plane of two, evaluation mode. With another run, both
        planes side by side in the same levels, each around its own weights; and the line between the two, normalised
        by the statistics of each batch. PNG, PDF and the numbers go into the run's directory. A grid that was stopped
        goes on where it was.

        Args:
            model: The module, whose training loss is drawn.
            datamodule: Gives the training samples.
            ckpt_path: The weights in the middle: last, best, a run directory, or a checkpoint file.
            other: Run directory or checkpoint file of another solution to compare with.
            points: Points along each direction, at least 2.
            reach: Largest step along a random direction; 1 moves every filter by its own length.
            samples: Training samples, chosen by the seed; all if there are fewer.
            seed: Seed of directions and samples.
            weights_only: Ignored, since a run's configuration brings it: nothing in a checkpoint is ever executed.

        Returns:
            The figures, without their endings.

        Raises:
            MeasureError: If module or data cannot be measured, or a value is outside what is allowed.
        """
        if points < 2:
            raise MeasureError(f"--points must be an integer >= 2, got {points}.")
        if not 0 < reach < math.inf:
            raise MeasureError(f"--reach must be a finite number > 0, got {reach}.")
        require("sharpness", "sam-lightning landscape", "matplotlib")
        from sam_lightning.cli.landscape import Landscape

        batches = self._ready(model, datamodule, ckpt_path, samples, seed)
        run, path = Path(self.default_root_dir), Path(str(ckpt_path))
        try:
            with measured_loss(model) as loss:
                drawn = Landscape(model, loss, batches, run, path, points, reach, seed)
                drawn.around()
                if other is not None:
                    drawn.with_other(find_checkpoint(run, other))
        except ValueError as error:
            raise MeasureError(str(error)) from error
        return drawn.figures

    def _ready(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        ckpt_path: str | None,
        samples: int,
        seed: int,
    ) -> list[Any]:
        """Loads the weights, and gives the batches."""
        if samples < 1:
            raise MeasureError(f"--samples must be an integer >= 1, got {samples}.")
        if datamodule is None:
            raise MeasureError("there is no data to measure on: name a data module by --data.")
        self.strategy.connect(model)
        model.trainer = datamodule.trainer = self
        self.datamodule = datamodule  # as Lightning sets it in its own commands
        datamodule.prepare_data()
        datamodule.setup("fit")
        model.setup("fit")
        model.configure_model()
        model.load_state_dict(read_checkpoint(Path(str(ckpt_path)))["state_dict"])
        model.to(self.strategy.root_device)
        return training_sample(self, samples, seed)


def _show(name: str, value: object) -> None:
    print(f"{name:<28}{value}", flush=True)


def _show_measure(name: str, value: float, standard_error: float | None) -> None:
    spread = "" if standard_error is None else f" ± {standard_error:.2g} (standard error)"
    _show(name.replace("_", " "), f"{value:.4g}{spread}")
