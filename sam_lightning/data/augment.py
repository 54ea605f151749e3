"""Random crops and flips of a whole batch at once, on its device."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sam_lightning.data.sampler import AUGMENTATION, generator_of
from sam_lightning.runs.threads import threads_for

STEPS = 10  # of crop and flip, each over about as many entries as the images have


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Pads each image with zeros, cuts its own window of the original size, and mirrors it or not.

    Args:
        images: (B, C, H, W), any type.
        top: First row of each window in the padded image, (B,), in [0, 2 * padding].
        left: First column, likewise.
        flip: Whether the window is mirrored left to right, (B,), bool.
        padding: Zeros on each side.

    Returns:
        (B, C, H, W), of the same type.
    """
    batch, channels, height, width = images.shape
    device = images.device
    padded = pad(images, (padding, padding, padding, padding))
    rows = top[:, None] + torch.arange(height, device=device)  # (B, H)
    columns = torch.arange(width, device=device).expand(batch, width)
    columns = left[:, None] + torch.where(flip[:, None], columns.flip(1), columns)  # (B, W)
    # One number per pixel: a fifth of the time of indexing by rows and columns.
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # (B, H, W)
    pixels = pixels.flatten(1)[:, None].expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixels).view_as(images)


class CropAndFlip:
    """Random crop with padding and random horizontal flip, a pure function of (seed, epoch, sample).

    The draws of an epoch are made for all samples at once, on the CPU: they do not depend on the batch
    size, the number of processes, the device, or where a run was resumed.

    Args:
        samples: Number of samples that can occur.
        seed: Seed of the draws.
        crop: Whether to crop; without it the flips stay the same.
        flip: Whether to flip; without it the crops stay the same.
        padding: Zeros on each side before the crop.
    """

    def __init__(self, samples: int, seed: int, crop: bool, flip: bool, padding: int = 4) -> None:
        self.samples = samples
        self.seed = seed
        self.crop = crop
        self.flip = flip
        self.padding = padding
        self._epoch: tuple[int, torch.device] | None = None
        self._draws: tuple[Tensor, Tensor] | None = None

    def __call__(self, images: Tensor, samples: Tensor, epoch: int) -> Tensor:
        """Augments images (B, C, H, W), whose sample numbers are (B,), for an epoch."""
        if not (self.crop or self.flip):
            return images
        corners, flips = self._drawn(epoch, images.device)
        with threads_for(STEPS * images.numel()):
            top, left = corners[samples].unbind(1)
            return crop_and_flip(images, top, left, flips[samples], self.padding)

    def _drawn(self, epoch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._draws is None or self._epoch != (epoch, device):
            generator = generator_of(self.seed, epoch, AUGMENTATION)
            corners = torch.randint(0, 2 * self.padding + 1, (self.samples, 2), generator=generator)
            flips = torch.rand(self.samples, generator=generator) < 0.5
            if not self.crop:
                corners = torch.full_like(corners, self.padding)
            if not self.flip:
                flips = torch.zeros_like(flips)
            self._epoch, self._draws = (epoch, device), (corners.to(device), flips.to(device))
        return self._draws
