"""Norms over many tensors together."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sam_lightning.tensors.shards import are_sharded, full_tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_PIECE = 2**18  # torch sums a long float32 tensor on the CPU in a few lanes: 1 % is lost at 1e8 entries


def global_norm(tensors: list[Tensor]) -> Tensor:
    """The L2 norm of all entries together, 0-dimensional; half precision is summed in float32.

    Of sharded tensors, over all their shards: every process must call this. On the CPU it is right for all entries
    that the type can hold; on an accelerator squares overflow above 1e19 and vanish below 1e-22.
    """
    return norm_of_pieces(lambda: [tensors])


@torch.no_grad()
def norm_of_pieces(pieces: Callable[[], Iterable[list[Tensor]]]) -> Tensor:
    """`global_norm` of tensors that are not in memory all at once.

    Args:
        pieces: Gives them, some at a time; called again where squares leave what the type can hold.
    """
    norm = _joint(pieces())
    if _is_on_host(norm) and not math.sqrt(torch.finfo(norm.dtype).tiny) * 1e4 < norm < math.inf:
        largest = _joint(pieces(), math.inf)
        if 0 < largest < math.inf:
            unit, dtype = float(largest), norm.dtype
            return largest * _joint([t.to(torch.promote_types(t.dtype, dtype)) / unit for t in p] for p in pieces())
    return norm


def _joint(pieces: Iterable[list[Tensor]], order: float = 2.0) -> Tensor:
    return _together([_norm(piece, order) for piece in pieces], order)


def _norm(tensors: list[Tensor], order: float) -> Tensor:
    if not tensors:
        return torch.zeros(())
    norms: list[Tensor] = []
    kinds = list(zip([t.device for t in tensors], [t.dtype for t in tensors], are_sharded(tensors), strict=True))
    different = dict.fromkeys(kinds)
    for kind in different:
        same = [t for t, k in zip(tensors, kinds, strict=True) if k == kind] if len(different) > 1 else tensors
        _, dtype, sharded = kind
        if sharded and dtype in _LOW_PRECISION:  # torch has no rule for norms of sharded tensors in another type
            same, dtype = [t.float() for t in same], torch.float32
        if not sharded and _is_on_host(same[0]):
            same = _pieces(same)
        norms += torch._foreach_norm(same, order, dtype=torch.float32 if dtype in _LOW_PRECISION else None)
    return full_tensor(_together(norms, order))


def _together(norms: list[Tensor], order: float) -> Tensor:
    """The norm of what has these norms, on the first one's device."""
    device = norms[0].device
    if any(norm.device != device for norm in norms):
        norms = [norm.to(device) for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), order)


def _pieces(tensors: list[Tensor]) -> list[Tensor]:
    if max(t.numel() for t in tensors) <= _PIECE:
        return tensors
    return [piece for t in tensors for piece in torch.split(_flat(t), _PIECE)]


def _flat(tensor: Tensor) -> Tensor:
    """Its entries as they lie in memory: no copy of a tensor whose channels lie last."""
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).reshape(-1)


def reciprocal(norm: Tensor) -> Tensor | float:
    """1 / `norm`, or 0 where `norm` is 0 or not finite; a number if it is known to the host.

    Nothing is read back from an accelerator, which would make the host wait for it.
    """
    if _is_on_host(norm):
        length = float(norm)
        return 1 / length if 0 < length < math.inf else 0.0
    inverse = 1 / norm
    return torch.where(inverse.isfinite() & norm.isfinite(), inverse, 0.0)


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
