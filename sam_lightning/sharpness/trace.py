"""The trace of the Hessian."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sam_lightning.optim.checks import check_integer
from sam_lightning.sharpness.adaptive import Adaptive
from sam_lightning.sharpness.hessian import hessian_of
from sam_lightning.sharpness.lanczos import inner
from sam_lightning.sharpness.objective import Estimate, Loss
from sam_lightning.sharpness.preserved_state import BatchNorm


def hessian_trace(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    draws: int = 30,
    scale: Adaptive | None = None,
    batch_norm: BatchNorm = "running",
    seed: int = 0,
) -> Estimate:
    r"""The trace of the Hessian, $\mathrm{tr}(T \, \nabla^2 L(w) \, T) = E[v^\top T \, \nabla^2 L(w) \, T v]$.

    With v of independent signs, $E[v v^\top] = I$. It is the sum of all eigenvalues. Where the loss is smooth, half
    of σ² times it is the average-case sharpness for small σ. It is linear in L: the mean over parts of the data is
    the trace of the whole.

    Args:
        network: The network; its weights are its parameters with `requires_grad`.
        loss: The mean loss of a batch.
        batches: The data of this process.
        draws: Number of v, at least 2.
        scale: Adaptive, or plain if None.
        batch_norm: What normalisation layers use, see `preserved_state`.
        seed: Seed of v.

    Returns:
        The mean over draws with its standard error.

    Raises:
        ValueError: If `draws` is less than 2.
        CurvatureError: If the Hessian is not finite, or torch differentiates the network wrongly.

    Cost: one gradient over all data, and as many products with the Hessian as draws.

    What it does not tell: which directions are sharp, and negative eigenvalues cancel positive ones; the plain trace
    changes when layers of a ReLU network are rescaled.

    Reference:
        M. F. Hutchinson. A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines.
        Communications in Statistics 18, 1989.
    """
    check_integer("draws", draws, least=2, note=", for a standard error")
    with hessian_of(network, loss, batches, scale, batch_norm, seed) as hessian:
        forms = torch.zeros(draws, dtype=torch.float64, device=hessian.device)
        state = hessian.generator.get_state()
        for share, gradient in hessian.gradients():
            hessian.generator.set_state(state)  # the same v for every batch, without keeping them
            for k in range(draws):
                v = hessian.signs()
                forms[k] += share * inner(v[None], hessian.add_product(torch.zeros_like(v), gradient, v))[0]
        return Estimate.of(hessian.objective.sum_over_processes([forms])[0].tolist())
