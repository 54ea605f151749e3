"""A set of images in memory, read by whole batches."""

from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sam_lightning.runs.threads import threads_for

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]  # uint8 images (B, C, H, W), labels (B,), sample numbers (B,)


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
        with threads_for(len(at) * self.images[0].numel()):
            return self.images[at], self.labels[at], self.samples[at]

    def subset(self, positions: Tensor) -> "Images":
        """The samples at `positions`, in that order."""
        return Images(self.images[positions], self.labels[positions], self.samples[positions])

    def with_labels(self, labels: Tensor) -> "Images":
        """The same images and numbers with other labels, (N,)."""
        return Images(self.images, labels, self.samples)
