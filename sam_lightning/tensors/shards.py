"""Sharded tensors (FSDP2's DTensor) beside plain ones; told by what they can do, since importing DTensor is slow."""

from typing import Any

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter}  # by far the most, and told much faster than by what they cannot do


def are_sharded(tensors: list[Tensor]) -> list[bool]:
    """For each tensor, whether a process may hold a part of it only."""
    if {type(t) for t in tensors} <= PLAIN:
        return [False] * len(tensors)
    return [hasattr(t, "to_local") for t in tensors]


@torch.no_grad()  # a part is written to, which is no step of the network's computation
def local_parts(tensors: list[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor, in the same memory: a sharded one's part, a plain one itself."""
    found: list[Any] = tensors
    sharded = are_sharded(tensors)
    return [t.to_local() if s else t for t, s in zip(found, sharded, strict=True)] if any(sharded) else tensors


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor put together from all processes, which must all call this; a plain one itself."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
