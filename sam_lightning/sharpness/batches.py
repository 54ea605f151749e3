"""Batches of any structure: how many samples they hold, cut into parts, moved to a device."""

from typing import Any

import torch

from sam_lightning.replay.batch_copies import rebuilt, tensors_in

HALF = (torch.float16, torch.bfloat16)


def samples_in(batch: Any) -> int:
    """The number of samples: the length of the first tensor with a first dimension.

    Raises:
        TypeError: If there is no such tensor.
    """
    for tensor in tensors_in(batch):
        if tensor.ndim:
            return len(tensor)
    raise TypeError(
        f"a batch must hold a tensor whose first dimension counts samples, got {type(batch).__name__}. Tensors are "
        "found in tuples, lists, mappings, dataclasses and other objects' attributes."
    )


def split(batch: Any, m: int) -> list[Any]:
    """The batch cut into parts of `m` samples; the last one has what is left."""
    return [_slice(batch, slice(i, i + m)) for i in range(0, samples_in(batch), m)]


def shard(batch: Any, rank: int, world_size: int) -> Any:
    """The samples of one process among `world_size`: every `world_size`-th from `rank` on; perhaps none."""
    return _slice(batch, slice(rank, None, world_size))


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on a device."""
    return rebuilt(batch, lambda tensor: tensor.to(device, non_blocking=True))


def to_single_precision(batch: Any) -> Any:
    """The batch with float16 and bfloat16 tensors as float32."""
    return rebuilt(batch, lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)


def _slice(batch: Any, positions: slice) -> Any:
    return rebuilt(batch, lambda tensor: tensor[positions] if tensor.ndim else tensor)
