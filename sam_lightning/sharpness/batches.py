"""Batches of any structure: how many samples they hold, cut into parts, moved to a device."""

import copy
import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def samples_in(batch: Any) -> int:
    """The number of samples: the length of the first tensor with a first dimension.

    Raises:
        TypeError: If there is no such tensor.
    """
    for tensor in _tensors(batch):
        if tensor.ndim:
            return len(tensor)
    raise TypeError(
        f"a batch must hold a tensor whose first dimension counts samples, got {type(batch).__name__}. Tensors are "
        "found in tuples, lists, mappings and dataclasses."
    )


def split(batch: Any, m: int) -> list[Any]:
    """The batch cut into parts of `m` samples; the last one has what is left."""
    return [_slice(batch, slice(i, i + m)) for i in range(0, samples_in(batch), m)]


def shard(batch: Any, rank: int, world_size: int) -> Any:
    """The samples of one process among `world_size`: every `world_size`-th from `rank` on; perhaps none."""
    return _slice(batch, slice(rank, None, world_size))


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on a device."""
    return _map(batch, lambda tensor: tensor.to(device, non_blocking=True))


def to_single_precision(batch: Any) -> Any:
    """The batch with float16 and bfloat16 tensors as float32."""
    return _map(batch, lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)


def _slice(batch: Any, positions: slice) -> Any:
    return _map(batch, lambda tensor: tensor[positions] if tensor.ndim else tensor)


def _map(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same structure with `function` of every tensor in it; what is no tensor stays."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, tuple | list):
        values = [_map(value, function) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    if isinstance(batch, MutableMapping):
        mapped: Any = copy.copy(batch)
        for key, value in batch.items():
            mapped[key] = _map(value, function)
        return mapped
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        mapped = copy.copy(batch)
        for field in dataclasses.fields(batch):  # frozen ones, too
            object.__setattr__(mapped, field.name, _map(getattr(batch, field.name), function))
        return mapped
    return batch


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(batch, found.append)
    return found
