"""Sharded tensors (FSDP2's DTensor) beside plain ones; told by what they can do, since importing DTensor is slow."""

import torch
from torch import Tensor


@torch.no_grad()  # a part is written to, which is no step of the network's computation
def local_parts(tensors: list[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor, in the same memory: a sharded one's part, a plain one itself."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together from all processes, which must all call this; a plain one itself."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
