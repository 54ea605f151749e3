"""The largest eigenvalues of the Hessian."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from sam_lightning.sharpness.adaptive import Adaptive
from sam_lightning.sharpness.hessian import Hessian, hessian_of
from sam_lightning.sharpness.lanczos import largest
from sam_lightning.sharpness.objective import Loss, Objective, mean_over_parts
from sam_lightning.sharpness.preserved_state import BatchNorm


def largest_eigenvalues(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    count: int = 1,
    scale: Adaptive | None = None,
    m: int | None = None,
    batch_norm: BatchNorm = "running",
    tolerance: float = 1e-4,
    seed: int = 0,
) -> tuple[float, ...]:
    r"""The largest eigenvalues of the Hessian, $\lambda_1 \ge \lambda_2 \ge \dots$ of $T \, \nabla^2 L(w) \, T$.

    At a minimum of a smooth loss, for small ρ, $\max_{\|u\| \le \rho} L(w + T u) - L(w) \approx \rho^2 \lambda_1 / 2$.
    Largest means largest in value, not in magnitude: a strongly negative eigenvalue is a way down and no sharpness.

    Args:
        network: The network, whose P weights are its parameters with `requires_grad`.
        loss: The mean loss of a batch.
        batches: The data of this process.
        count: How many, from 1 to P.
        scale: Adaptive, or plain if None.
        m: Samples per part, for the mean of each eigenvalue over parts; `None`: the whole data.
        batch_norm: What normalisation layers use, see `preserved_state`.
        tolerance: The iteration ends when an eigenvalue lies within this share of each value, in (0, 1).
        seed: Seed of the iteration's start.

    Returns:
        `count` values, the largest first.

    Raises:
        ValueError: If `count` or `tolerance` is outside what is allowed.
        CurvatureError: If the Hessian is not finite, torch differentiates the network wrongly, or the iteration does
            not converge.

    Cost: 8 products with the Hessian over all data on the trained digits network and 22 on the untrained one, each as
    much as about three gradients. Memory at the peak: 18 to 19 copies of the weights, and two more for each further
    value.

    What it does not tell: a ReLU network can be rescaled to any plain λ without changing what it computes (Dinh,
    Pascanu, Bengio, Bengio. Sharp Minima Can Generalize For Deep Nets. ICML 2017); at weights far from a minimum the
    curvature is not the loss that a ball around them reaches.

    Reference:
        K. Wu, H. Simon. Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems. SIAM Journal on Matrix
        Analysis and Applications 22, 2000.
        Ghorbani, Krishnan, Xiao. An Investigation into Neural Net Optimization via Hessian Eigenvalue Density.
        ICML 2019. arXiv 1901.10159.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance!r}.")
    with hessian_of(network, loss, batches, scale, batch_norm, seed) as hessian:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= hessian.size:
            raise ValueError(f"count must be an integer from 1 to the {hessian.size} weights, got {count!r}.")

        def measure(part: Objective) -> list[float]:
            of_part = hessian if part is hessian.objective else Hessian(part, seed)
            return largest(of_part.__matmul__, of_part.normal(), count, tolerance, of_part.inner)

        return tuple(mean_over_parts(measure, hessian.objective, m))
