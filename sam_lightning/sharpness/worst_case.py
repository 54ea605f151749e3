"""Worst-case sharpness: how high the loss rises within a ball around the weights."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sam_lightning.optim.checks import check_integer, check_non_negative
from sam_lightning.sharpness.adaptive import Adaptive
from sam_lightning.sharpness.objective import Loss, Objective, mean_over_parts, objective_of
from sam_lightning.sharpness.preserved_state import BatchNorm
from sam_lightning.tensors import global_norm
from sam_lightning.tensors.vectors import divide_by_norm


def worst_case_sharpness(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    rho: float,
    steps: int = 1,
    scale: Adaptive | None = None,
    m: int | None = None,
    batch_norm: BatchNorm = "running",
    seed: int = 0,
) -> float:
    r"""$\max_{\|u\| \le \rho} L(w + T u) - L(w)$, found by gradient ascent: SAM's ball, or ASAM's if adaptive.

    From $u_0 = 0$,
    $u_{k+1} = \Pi(u_k + \rho \, \nabla_u L / \|\nabla_u L\|)$, with Π the projection $u \min(1, \rho / \|u\|)$ onto
    the ball and one L2 norm over all weights. The result is the largest $L(w + T u_k) - L(w)$, k from 1 to `steps`:
    a lower bound of the maximum. One step is the point that SAM or ASAM trains at, and its result may be negative.

    Args:
        network: The network; its weights are its parameters with `requires_grad`.
        loss: The mean loss of a batch.
        batches: The data of this process.
        rho: Radius of the ball in units of T, L2, at least 0.
        steps: Number of gradient steps, at least 1.
        scale: Adaptive, or plain if None.
        m: Samples per part: the mean over parts, each with a maximum of its own, which is what SAM minimises with
            batches of m (m-sharpness); `None`: one maximum for the whole data.
        batch_norm: What normalisation layers use, see `preserved_state`.
        seed: Seed of the direction that several steps begin with where the gradient is exactly zero. A single step
            does not move there.

    Returns:
        The rise of the loss, in its own unit. A loss that is not finite in the ball is returned as it is.

    Raises:
        ValueError: If `rho`, `steps` or `m` is outside what is allowed.

    Cost: `steps` gradients and one evaluation of the loss, over all data.

    What it does not tell: a small value at one radius says nothing about another. In Andriushchenko et al. (ICML
    2023, arXiv 2302.07011) worst-case sharpness does not go with generalisation across training settings, and often
    goes against it; see `sam_lightning.sharpness`. Plain values change when layers are rescaled.

    Reference:
        Foret, Kleiner, Mobahi, Neyshabur. SAM. ICLR 2021. arXiv 2010.01412, eq. (1) and section 4.1 (m-sharpness).
        Kwon, Kim, Park, Choi. ASAM. ICML 2021. arXiv 2102.11600, definition 1.
    """
    check_non_negative("rho", rho)
    check_integer("steps", steps)
    with objective_of(network, loss, batches, scale, batch_norm, seed) as objective:
        return mean_over_parts(lambda part: [_ascend(part, rho, steps)], objective, m)[0]


def _ascend(objective: Objective, rho: float, steps: int) -> float:
    u = [torch.zeros_like(weight) for weight in objective.weights]
    origin, gradient = objective.value_and_gradient()
    highest = -math.inf
    for k in range(1, steps + 1):
        norm = global_norm(gradient)
        if norm == 0 and steps > 1:
            gradient = [torch.randn_like(part) for part in gradient]
            norm = global_norm(gradient)
        torch._foreach_add_(u, divide_by_norm(gradient, norm), alpha=rho)
        length = global_norm(u)
        if length > rho:
            torch._foreach_mul_(u, rho / length)
        height, gradient = objective.value_and_gradient(u) if k < steps else (objective.value(u), gradient)
        if not math.isfinite(height):
            return height
        highest = max(highest, height - origin)
    return highest
