"""Copies of lists of tensors, in place and in memory that is used again."""

import torch
from torch import Tensor

from sam_lightning.tensors.shards import PLAIN, local_parts


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
def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in fresh memory, of tensors of any class."""
    fresh = [torch.empty_like(t) if type(t) in PLAIN else t.detach().clone() for t in tensors]
    plain = [i for i, t in enumerate(tensors) if type(t) in PLAIN]
    copy([tensors[i] for i in plain], [fresh[i] for i in plain])
    return fresh


@torch.no_grad()
def copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copies in place: a sharded weight that is given other storage is not the one that its module gathers.

    Part by part: torch has no rule for copying lists of sharded tensors. In one operation for all of a kind, which is
    what an accelerator likes: mixed kinds in one operation would be copied one by one.
    """
    kinds: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(local_parts(sources), local_parts(targets), strict=True):
        targets_of_kind, sources_of_kind = kinds.setdefault((target.dtype, target.device), ([], []))
        targets_of_kind.append(target)
        sources_of_kind.append(source)
    for pair in kinds.values():
        torch._foreach_copy_(*pair)
