"""What the image data modules share: images in memory, splits, order, and preparation on the device."""

import os
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sam_lightning.data.augment import CropAndFlip
from sam_lightning.data.loader import BatchLoader, finished_batch
from sam_lightning.data.sampler import EpochSampler

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]  # uint8 images (B, C, H, W), labels (B,), sample numbers (B,)
Validation: TypeAlias = Literal["split", "test", "none"]
Normalisation: TypeAlias = Literal["unit", "half", "standard"]


class Images(Dataset[Batch]):
    """Images in memory, fetched by whole batches.

    Args:
        images: uint8, (N, C, H, W).
        labels: int64, (N,).
        samples: Numbers of the samples, (N,), kept through a split; by default 0 to N - 1.
    """

    def __init__(self, images: Tensor, labels: Tensor, samples: Tensor | None = None) -> None:
        self.images = images
        self.labels = labels
        self.samples = torch.arange(len(images)) if samples is None else samples

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, positions: list[int]) -> Batch:
        at = torch.tensor(positions)
        return self.images[at], self.labels[at], self.samples[at]

    def subset(self, positions: Tensor) -> "Images":
        """The samples at `positions`, in that order."""
        return Images(self.images[positions], self.labels[positions], self.samples[positions])


class ImageData(LightningDataModule, ABC):
    """Images for classification, prepared on the device for a whole batch at once.

    The order of training is a pure function of (seed, epoch). Normalisation: `unit` x in [0, 1]; `half`
    (x - 0.5) / 0.5; `standard` (x - mean) / std per channel, with the constants of the training set.

    Args:
        batch_size: Samples per step and process.
        validation: `split` holds out a stratified part of the training set, `test` validates on the test
            set (which then chooses the epoch: for reproductions that did), `none` does not validate.
        validation_fraction: Size of that part, in (0, 1).
        split_seed: Seed of the split alone; runs with different seeds share their validation set.
        normalisation: unit, half or standard.
        seed: Seed of order and augmentation; `None`: the seed of `seed_everything`, else 0.
        num_workers: Worker processes; data in memory need none.
        eval_batch_size: Samples per evaluation batch; `None`: `batch_size`.
        drop_last: Whether training leaves out an incomplete last batch.
    """

    num_classes: ClassVar[int]
    largest: ClassVar[float]  # value of a white pixel
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        batch_size: int,
        validation: Validation,
        validation_fraction: float,
        split_seed: int,
        normalisation: Normalisation,
        seed: int | None,
        num_workers: int,
        eval_batch_size: int | None,
        drop_last: bool,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("validation", validation, ("split", "test", "none")),
            ("normalisation", normalisation, ("unit", "half", "standard")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
        for name, number, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size or batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed or 0, 0),
            ("split_seed", split_seed, 0),
        ):
            if number < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {number!r}.")
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in (0, 1), got {validation_fraction!r}.")
        self.batch_size = batch_size
        self.validation = validation
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed
        self.normalisation = normalisation
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.num_workers = num_workers
        self.eval_batch_size = eval_batch_size or batch_size
        self.drop_last = drop_last
        self._train: Images | None = None
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def load(self) -> tuple[Images, Images]:
        """Training and test images."""

    def augmentation(self, samples: int) -> CropAndFlip:
        """What training images go through; here nothing."""
        return CropAndFlip(samples, self.seed, crop=False, flip=False)

    def setup(self, stage: str) -> None:
        """Loads the images and splits them, once."""
        if self._train is not None:
            return
        train, self._test = self.load()
        self._augment = self.augmentation(len(train))
        if self.validation == "split":
            kept, held_out = train_test_split(
                np.arange(len(train)),
                test_size=self.validation_fraction,
                stratify=train.labels.numpy(),
                random_state=self.split_seed,
            )
            # In their old order, whichever way the split draws them.
            self._val = train.subset(torch.from_numpy(np.sort(held_out)))
            train = train.subset(torch.from_numpy(np.sort(kept)))
        else:
            self._val = self._test
        self._train = train

    def train_dataloader(self) -> BatchLoader:
        """Batches in the order of (seed, epoch), resumable within an epoch."""
        assert self._train is not None
        return BatchLoader(
            self._train,
            self.batch_size,
            EpochSampler(self._train, self.seed, shuffle=True, **self._share()),
            num_workers=self.num_workers,
            drop_last=self.drop_last,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Held-out or test images; no loader if there is no validation."""
        return [] if self.validation == "none" else self._eval_loader(self._val)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test images, each once."""
        return self._eval_loader(self._test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test images, in their order."""
        # Without a sampler of ours: Lightning has its own for predictions.
        return DataLoader(self._test, batch_size=self.eval_batch_size, collate_fn=finished_batch)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augments (in training only), normalises, and gives (images, labels)."""
        images, labels, samples = batch
        trainer = self.trainer
        if trainer is not None and trainer.training:
            images = self._augment(images, samples, trainer.current_epoch)
        images = self.normalise(images)
        return trainer.precision_plugin.convert_input(images) if trainer is not None else images, labels

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as normalised float32, in the arithmetic of torchvision's transforms."""
        images = images.to(torch.float32).div_(self.largest)
        if self.normalisation == "unit":
            return images
        if images.device not in self._constants:
            mean, std = (self.mean, self.std) if self.normalisation == "standard" else ((0.5,), (0.5,))
            shape = (-1, 1, 1)
            device = images.device
            self._constants[device] = (
                torch.tensor(mean, device=device).view(shape),
                torch.tensor(std, device=device).view(shape),
            )
        means, stds = self._constants[images.device]
        return images.sub_(means).div_(stds)

    def _eval_loader(self, images: Images) -> DataLoader[Batch]:
        return DataLoader(
            images,
            self.eval_batch_size,
            sampler=EpochSampler(images, self.seed, shuffle=False, **self._share()),
            collate_fn=finished_batch,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )

    def _share(self) -> dict[str, int]:
        """This process's part of the data."""
        share = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return {"world": share["num_replicas"], "rank": share["rank"]} if share else {}
