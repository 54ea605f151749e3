"""What the image data modules share: splits, label noise, order, and preparation on the device."""

import os
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, TypeAlias

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from sam_lightning.data.augment import CropAndFlip
from sam_lightning.data.images import Batch, Images
from sam_lightning.data.label_noise import redraw
from sam_lightning.data.loader import BatchLoader, finished_batch
from sam_lightning.data.normalise import Normalisation, Normalise
from sam_lightning.data.sampler import EpochSampler
from sam_lightning.data.split import stratified_split
from sam_lightning.optim.checks import check_integer

Validation: TypeAlias = Literal["split", "test", "none"]


class ImageData(LightningDataModule, ABC):
    """Images for classification, prepared on the device for a whole batch at once.

    Training batches arrive in an order, and are augmented, as a pure function of (seed, epoch).

    Args:
        batch_size: Samples per step and process.
        validation: `split` holds out a stratified part of the training set, `test` validates on the test
            set (which then chooses the epoch: for reproductions that did), `none` does not validate.
        validation_fraction: Size of that part, in (0, 1).
        split_seed: Seed of the split alone; runs with different seeds share their validation set.
        training_samples: Trains on so many samples only, a stratified part of the training set (of what the split
            leaves), chosen by `split_seed`; `None`: on all.
        label_noise: Probability, in [0, 1], with which each training label is redrawn uniformly over all
            classes; validation and test labels stay clean. See `redraw`.
        label_noise_seed: Seed of the noise alone; runs with different seeds share their wrong labels.
        normalisation: `unit` x in [0, 1]; `half` (x - 0.5) / 0.5; `standard` (x - mean) / std per channel,
            with the constants of the training set.
        seed: Seed of order and augmentation; `None`: the seed of `seed_everything`, else 0.
        num_workers: Worker processes; data in memory need none.
        eval_batch_size: Samples per evaluation batch; `None`: `batch_size`.
        drop_last: Whether training leaves out an incomplete last batch.

    Raises:
        ValueError: If a value is outside what is allowed.
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
        training_samples: int | None,
        label_noise: float,
        label_noise_seed: int,
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
            ("eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed or 0, 0),
            ("split_seed", split_seed, 0),
            ("training_samples", 1 if training_samples is None else training_samples, 1),
            ("label_noise_seed", label_noise_seed, 0),
        ):
            check_integer(name, number, least)
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in (0, 1), got {validation_fraction!r}.")
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise must be in [0, 1], got {label_noise!r}.")
        self.batch_size = batch_size
        self.validation = validation
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed
        self.training_samples = training_samples
        self.label_noise = label_noise
        self.label_noise_seed = label_noise_seed
        self.normalisation = normalisation
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.num_workers = num_workers
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.drop_last = drop_last
        self._train: Images | None = None
        self.normalise = Normalise(normalisation, self.largest, self.mean, self.std)

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
        # Before the split, and by sample number: each sample's label is the same however the set is split.
        noisy = train.with_labels(redraw(train.labels, self.num_classes, self.label_noise, self.label_noise_seed))
        if self.validation == "split":
            kept, held_out = stratified_split(train.labels, self.validation_fraction, self.split_seed)
            self._train, self._val = self._part(noisy.subset(kept), train.labels[kept]), train.subset(held_out)
        else:
            self._train, self._val = self._part(noisy, train.labels), self._test

    def _part(self, train: Images, labels: Tensor) -> Images:
        """The `training_samples` of them, with equal shares of the right labels, (N,)."""
        size = self.training_samples
        if size is None or size == len(train):
            return train
        if not self.num_classes <= size <= len(train) - self.num_classes:  # a sample of each class in both parts
            raise ValueError(
                f"training_samples must be in [{self.num_classes}, {len(train) - self.num_classes}], or all "
                f"{len(train)} of the training set, got {size}."
            )
        return train.subset(stratified_split(labels, size, self.split_seed)[1])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches in the order of (seed, epoch), resumable within an epoch."""
        if self._train is None:
            raise RuntimeError("no data: call setup() before train_dataloader().")
        sampler = EpochSampler(self._train, self.seed, shuffle=True, **self._share())
        if self.trainer is not None:
            if self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]  # Trainer sets it by name
                return self._plain_loader(self._train, self.batch_size)  # Lightning takes the first ones each time
            sampler.set_epoch(_epoch(self.trainer))  # resumed at an epoch's end, Lightning loads no state here
        return BatchLoader(
            self._train,
            self.batch_size,
            sampler,
            num_workers=self.num_workers,
            drop_last=self.drop_last,
            pin_memory=self._uses_cuda(),
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Held-out or test images; no loader if there is no validation."""
        return [] if self.validation == "none" else self._eval_loader(self._val)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test images, each once."""
        return self._eval_loader(self._test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test images, in their order."""
        return self._plain_loader(self._test, self.eval_batch_size)  # Lightning has its own sampler for predictions

    def training_sample(self, samples: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of (images, labels) from the training set, normalised and never augmented, to measure on.

        Args:
            samples: How many; all if there are fewer.
            seed: What chooses them.
        """
        if self._train is None:
            raise RuntimeError("no data: call setup() before training_sample().")
        chosen = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(seed))[:samples]
        part = self._train.subset(chosen.sort().values)
        size = self.eval_batch_size
        return list(zip(torch.split(self.normalise(part.images), size), torch.split(part.labels, size), strict=True))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augments (in training only), normalises, and gives (images, labels)."""
        images, labels, samples = batch
        trainer = self.trainer
        if trainer is not None and trainer.training:
            images = self._augment(images, samples, _epoch(trainer))
        images = self.normalise(images)
        return trainer.precision_plugin.convert_input(images) if trainer is not None else images, labels

    def _eval_loader(self, images: Images) -> DataLoader[Batch]:
        share = self._share()
        # One process takes them as they are: torch's sequential sampler, which Lightning knows as unshuffled.
        sampler = EpochSampler(images, self.seed, shuffle=False, **share) if share else None
        return self._plain_loader(images, self.eval_batch_size, sampler)

    def _plain_loader(self, images: Images, batch_size: int, sampler: EpochSampler | None = None) -> DataLoader[Batch]:
        """In the images' own order; with no sampler where Lightning puts its own."""
        return DataLoader(
            images,
            batch_size=batch_size,  # by name: Lightning makes such a loader anew from its names
            sampler=sampler,
            collate_fn=finished_batch,
            generator=torch.Generator(),
            pin_memory=self._uses_cuda(),
        )

    def _uses_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _share(self) -> dict[str, int]:
        """This process's part of the data."""
        share = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return {"world": share["num_replicas"], "rank": share["rank"]} if share else {}


def _epoch(trainer: Trainer) -> int:
    """The epoch in training as Lightning tells it to samplers; `current_epoch` lags behind in a resumed run."""
    epoch: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]  # typed as its base
    return epoch
