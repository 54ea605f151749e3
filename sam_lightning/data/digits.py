"""The handwritten digits that scikit-learn brings along."""

import torch

from sam_lightning.data.datamodule import ImageData, Validation
from sam_lightning.data.images import Images
from sam_lightning.data.normalise import Normalisation
from sam_lightning.data.split import stratified_split
from sam_lightning.runs.extras import require


class Digits(ImageData):
    """1,797 real 8x8 images of ten handwritten digits, nothing to download: for first runs and tests.

    The test set is a fixed stratified part of 360 images, whatever the seeds.

    Args:
        batch_size: See `ImageData`, as all the others.
        validation: split, test or none.
        validation_fraction: Held-out share of the training set.
        split_seed: Seed of the split.
        training_samples: Number of training samples; all by default.
        label_noise: Probability with which each training label is redrawn over all classes.
        label_noise_seed: Seed of the label noise.
        normalisation: unit, half or standard.
        seed: Seed of the order.
        num_workers: Worker processes.
        eval_batch_size: Samples per evaluation batch.
        drop_last: Whether an incomplete last training batch is left out.

    Reference:
        E. Alpaydin, C. Kaynak. Optical Recognition of Handwritten Digits. UCI Machine Learning Repository,
        1998 (its test part).
    """

    num_classes = 10
    largest = 16.0
    mean = (0.3054,)  # of the 1,437 training images
    std = (0.3761,)

    def __init__(
        self,
        batch_size: int = 64,
        validation: Validation = "split",
        validation_fraction: float = 0.1,
        split_seed: int = 0,
        training_samples: int | None = None,
        label_noise: float = 0.0,
        label_noise_seed: int = 0,
        normalisation: Normalisation = "unit",
        seed: int | None = None,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            validation=validation,
            validation_fraction=validation_fraction,
            split_seed=split_seed,
            training_samples=training_samples,
            label_noise=label_noise,
            label_noise_seed=label_noise_seed,
            normalisation=normalisation,
            seed=seed,
            num_workers=num_workers,
            eval_batch_size=eval_batch_size,
            drop_last=drop_last,
        )
        self.save_hyperparameters()

    def load(self) -> tuple[Images, Images]:
        """Training (1,437) and test (360) images."""
        require("studies", "The digits data", "sklearn")
        # Only here: scikit-learn takes a fifth of a second to import, which other commands need not wait for.
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        # Numbered anew: a sample's number is its place in its own set.
        train, test = (Images(pixels[part], labels[part]) for part in stratified_split(labels, 360, seed=0))
        return train, test
