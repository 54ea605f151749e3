"""Average-case sharpness: how high the loss rises under random noise on the weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sam_lightning.optim.checks import check_integer, check_non_negative
from sam_lightning.sharpness.adaptive import Adaptive
from sam_lightning.sharpness.objective import Estimate, Loss, objective_of
from sam_lightning.sharpness.preserved_state import BatchNorm


def average_case_sharpness(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    sigma: float,
    draws: int = 30,
    scale: Adaptive | None = None,
    batch_norm: BatchNorm = "running",
    seed: int = 0,
) -> Estimate:
    r"""$E_{u \sim N(0, \sigma^2 I)}[L(w + T u)] - L(w)$, by draws of u and -u together.

    $\frac{1}{2}[L(w + T u) + L(w - T u)] - L(w)$ has the same mean, without the noise of the gradient's part. For
    small σ it is half of σ² times the trace of the Hessian where the loss is smooth. Of a ReLU network it stays far
    above that: noise moves inputs across the kinks, which the Hessian does not see. It is linear in L: the mean over
    parts of the data is the value of the whole.

    Args:
        network: The network; its weights are its parameters with `requires_grad`.
        loss: The mean loss of a batch.
        batches: The data of this process.
        sigma: Standard deviation of the noise on each weight, in units of T, at least 0. Over P weights the noise has
            a length of about σ√P.
        draws: Number of u, at least 2.
        scale: Adaptive, or plain if None.
        batch_norm: What normalisation layers use, see `preserved_state`.
        seed: Seed of u.

    Returns:
        The mean over draws with its standard error, in the loss's own unit.

    Raises:
        ValueError: If `sigma` or `draws` is outside what is allowed.

    Cost: no gradient; the loss 2 `draws` + 1 times over all data.

    What it does not tell: random directions in many dimensions are mostly flat, so that few sharp ones hardly show;
    and whether it goes with generalisation depends on the setting (Andriushchenko et al., ICML 2023, arXiv
    2302.07011). Plain values change when layers are rescaled.

    Reference:
        Neyshabur, Bhojanapalli, McAllester, Srebro. Exploring Generalization in Deep Learning. NeurIPS 2017.
        arXiv 1706.08947.
    """
    check_non_negative("sigma", sigma)
    check_integer("draws", draws, least=2, note=", for a standard error")
    with objective_of(network, loss, batches, scale, batch_norm, seed) as objective:
        origin = objective.value()
        rises = []
        for _ in range(draws):
            u = [sigma * torch.randn_like(weight) for weight in objective.weights]
            rises.append((objective.value(u) + objective.value([-part for part in u])) / 2 - origin)
        return Estimate.of(rises)
