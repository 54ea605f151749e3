"""Pixels to network inputs, for a whole batch at once, on its device."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sam_lightning.runs.threads import threads_for

Normalisation: TypeAlias = Literal["unit", "half", "standard"]

STEPS = 4  # each over all entries


class Normalise:
    """(x / white - mean) / std per channel, bit for bit in the arithmetic of torchvision's transforms.

    Args:
        normalisation: `unit` leaves x / white, in [0, 1]; `half` has mean and std 0.5, so [-1, 1]; `standard`
            has the constants given.
        white: Value of a white pixel.
        mean: Per channel, (C,), of x / white.
        std: Likewise.
    """

    def __init__(
        self, normalisation: Normalisation, white: float, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        self.normalisation = normalisation
        self.white = white
        self.mean, self.std = (mean, std) if normalisation == "standard" else ((0.5,), (0.5,))
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}  # copied to each device once

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as float32 of the same shape."""
        with threads_for(STEPS * images.numel()):
            return self._normalised(images)

    def _normalised(self, images: Tensor) -> Tensor:
        images = images.to(torch.float32).div_(self.white)
        if self.normalisation == "unit":
            return images
        device = images.device
        if device not in self._constants:
            mean, std = (
                torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
                for values in (self.mean, self.std)
            )
            self._constants[device] = mean, std
        mean, std = self._constants[device]
        return images.sub_(mean).div_(std)
