"""Batches of any structure: how many samples they hold, and their parts."""

from typing import Any

from torch import Tensor


def samples_in(batch: Any) -> int:
    """The number of samples: the length of the first tensor with a first dimension.

    Raises:
        TypeError: If there is no such tensor.
    """
    for tensor in _tensors(batch):
        if tensor.ndim:
            return len(tensor)
    raise TypeError(f"a batch must hold a tensor whose first dimension counts samples, got {type(batch).__name__}.")


def parts_of(batch: Any, m: int) -> list[Any]:
    """The batch cut into parts of `m` samples; the last one has what is left."""
    return [_slice(batch, slice(i, i + m)) for i in range(0, samples_in(batch), m)]


def share_of(batch: Any, rank: int, world: int) -> Any:
    """One process's samples of a batch, of `world` processes; perhaps none."""
    return _slice(batch, slice(rank, None, world))


def moved(batch: Any, like: Tensor) -> Any:
    """The batch on the device of a tensor."""
    return _apply(batch, lambda tensor: tensor.to(like.device, non_blocking=True))


def _slice(batch: Any, positions: slice) -> Any:
    return _apply(batch, lambda tensor: tensor[positions] if tensor.ndim else tensor)


def _apply(batch: Any, function: Any) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: _apply(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)([_apply(value, function) for value in batch])
    return batch


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _apply(batch, found.append)
    return found
