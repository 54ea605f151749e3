"""Copies of lists of tensors, in place and in memory that is used again."""

import torch
from torch import Tensor

from sam_lightning.tensors.shards import local_parts


class Copies:
    """Copies of tensors, in the same memory every time: fresh memory costs more than the copying."""

    def __init__(self) -> None:
        self._like: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def take(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of `tensors`, good until the next call; sharded ones stay sharded."""
        like = [(t.shape, t.dtype, t.device) for t in tensors]
        if self._like != like:
            self._like, self._copies = like, [torch.empty_like(t) for t in tensors]
        copy(tensors, self._copies)
        return self._copies


@torch.no_grad()
def copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copies in place: a sharded weight that is given other storage is not the one that its module gathers.

    Part by part: torch has no rule for copying lists of sharded tensors.
    """
    if targets:
        torch._foreach_copy_(local_parts(targets), local_parts(sources))
