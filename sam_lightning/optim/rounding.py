"""How much of a displacement is left when the moved weights are rounded to half precision."""

import warnings
from math import sqrt

import torch
from torch import Tensor, distributed

_HALF = (torch.float16, torch.bfloat16)
_TOO_MUCH = 0.25  # of the length; the cosine between both displacements is then about 0.97


def is_rounded(weights: list[Tensor]) -> bool:
    """Whether a sum with one of these weights is rounded to half precision."""
    return any(weight.dtype in _HALF for weight in weights)


@torch.no_grad()
def warn_of_rounding(
    method: str, before: list[Tensor], after: list[Tensor], e: list[Tensor], radii: list[float]
) -> bool:
    r"""Warns if $\|fl(w + e) - (w + e)\| > \|e\| / 4$, where fl rounds to the weights' own type.

    bfloat16 rounds by up to |w| / 256, and e spread evenly over P weights has $\rho / \sqrt P$ in each: a weight moves
    by whole units of its last place, or not at all. What is compared lies on this process; the host waits for it.

    Args:
        method: Who moves the weights, for the message.
        before: The local parts of the weights w.
        after: Those of the moved weights, fl(w + e), in the same order.
        e: The local parts of the displacement for a radius of 1, in the same order.
        radii: The signed radius of each weight.

    Returns:
        Whether there is nothing more to measure; False after a step that displaces nothing.
    """
    moved_square = square = product = 0.0
    moving = weights = 0
    dtype = next(weight.dtype for weight in after if weight.dtype in _HALF)
    for old, new, vector, rho in zip(before, after, e, radii, strict=True):
        if new.dtype in _HALF:
            moved = new.float() - old.float()
            wanted = vector.float() * rho
            moved_square += float(moved.square().sum())
            square += float(wanted.square().sum())
            product += float((moved * wanted).sum())
            moving += int(moved.count_nonzero())
            weights += new.numel()
    if not 0 < square < float("inf"):
        return False
    share, cosine = sqrt(moved_square / square), product / (sqrt(moved_square * square) or 1.0)
    error = sqrt(max(moved_square - 2 * product + square, 0.0) / square)
    is_first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    if error > _TOO_MUCH and is_first:
        warnings.warn(
            f"{method}: weights in {str(dtype).removeprefix('torch.')} round the displacement e: ||fl(w + e) - w|| is "
            f"{share:.1%} of ||e|| = {sqrt(square):.3g}, the cosine between both {cosine:.2f}, and "
            f"{moving / weights:.2%} of the weights move. Keep the weights in float32 and compute in half precision: "
            "Trainer(precision='bf16-mixed'), or torch.autocast.",
            stacklevel=2,
        )
    return True
