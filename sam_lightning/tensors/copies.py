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
    copy_by_kind([tensors[i] for i in plain], [fresh[i] for i in plain])
    return fresh


@torch.no_grad()
def copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copies in place: a sharded weight that is given other storage is not the one that its module gathers.

    Part by part: torch has no rule for copying lists of sharded tensors.
    """
    if targets:
        torch._foreach_copy_(local_parts(targets), local_parts(sources))


def copy_by_kind(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copies in place, tensors of mixed kinds: an accelerator would copy those in one operation one by one."""
    kinds: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        sources_of_kind, targets_of_kind = kinds.setdefault((target.dtype, target.device), ([], []))
        sources_of_kind.append(source)
        targets_of_kind.append(target)
    for pair in kinds.values():
        copy(*pair)
