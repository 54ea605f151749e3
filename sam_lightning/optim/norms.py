"""Norms over many tensors together, and division by them."""

import torch
from torch import Tensor

from sam_lightning.optim.shards import whole

TINY = 1e-12  # added to every norm: a zero gradient gives a zero displacement, not NaN
_LOW_PRECISION = (torch.float16, torch.bfloat16)


def global_norm(tensors: list[Tensor]) -> Tensor:
    """The L2 norm of all entries together, 0-dimensional; half precision is summed in float32.

    Of sharded tensors, over all their shards: every process must call this.
    """
    return whole(torch.nn.utils.get_total_norm([t.float() if t.dtype in _LOW_PRECISION else t for t in tensors]))


def divide_by_norm(vectors: list[Tensor], norm: Tensor, in_place: bool = False) -> list[Tensor]:
    """Each vector divided by `norm` + TINY; zeros if `norm` is not finite.

    With `in_place` in the memory of `vectors`, which are then of no more use, or in new memory if `norm` is not finite.
    Nothing is read back from an accelerator, which would make the host wait for it.
    """
    finite = norm.isfinite()
    factor: Tensor | float = torch.where(finite, 1 / (norm + TINY), 0.0)
    if _is_on_host(norm):
        if not finite:
            return [torch.zeros_like(vector) for vector in vectors]
        factor = float(factor)  # for large tensors faster than a 0-dimensional tensor
    if in_place:
        torch._foreach_mul_(vectors, factor)
    else:
        vectors = list(torch._foreach_mul(vectors, factor))
    if not _is_on_host(norm):  # 0 * inf is NaN
        for vector in vectors:
            vector.nan_to_num_(0.0, 0.0, 0.0)
    return vectors


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
