"""What a finished run is measured by: the trainer's command `sharpness`."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from sam_lightning.files import replacing
from sam_lightning.module import SharpnessAwareModule
from sam_lightning.run_directory import read_checkpoint
from sam_lightning.sharpness import Settings
from sam_lightning.sharpness_monitor import HasTrainingSample, measure_module

SHARPNESS = "sharpness.json"
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
        measured on and how. No augmentation; the loss is the module's own, in single precision.

        Args:
            model: The module, whose `loss` is measured.
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
        if not isinstance(model, SharpnessAwareModule):
            raise MeasureError(f"sharpness needs a SharpnessAwareModule with a loss, got {type(model).__name__}.")
        if not isinstance(datamodule, HasTrainingSample) or datamodule is None:
            raise MeasureError(
                "sharpness needs data with training_sample(samples, seed) -> list of batches, got "
                f"{type(datamodule).__name__}."
            )
        if samples < 1:
            raise MeasureError(f"--samples must be an integer >= 1, got {samples}.")
        model.load_state_dict(read_checkpoint(Path(str(ckpt_path)))["state_dict"])
        model.to(self.strategy.root_device)
        datamodule.prepare_data()
        datamodule.setup("fit")
        batches = datamodule.training_sample(samples, settings.seed)
        found = measure_module(model, batches, settings)
        device = self.strategy.root_device
        content = {
            "checkpoint": str(ckpt_path),
            "samples": min(samples, sum(len(labels) for _, labels in batches)),
            "settings": asdict(settings),
            "measures": {name: {"value": v, "standard_error": error} for name, (v, error) in found.rows().items()},
            "conditions": {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "versions": {name: version(name) for name in ("sam-lightning", "torch", "curvlinops-for-pytorch")},
            },
        }
        with replacing(Path(self.default_root_dir) / SHARPNESS) as draft:
            draft.write_text(json.dumps(content, indent=1))
        for name, (value, error) in found.rows().items():
            spread = "" if error is None else f" ± {error:.2g} (standard error)"
            print(f"{name.replace('_', ' '):<28}{value:.4g}{spread}")
        for name in ("samples", "checkpoint"):
            print(f"{name:<28}{content[name]}")
        print(f"{'stored':<28}{Path(self.default_root_dir) / SHARPNESS}")
        return content
