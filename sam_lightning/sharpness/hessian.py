"""The curvature of the loss: largest eigenvalues and trace of its Hessian."""

from collections.abc import Iterable
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lightning.runs.extras import require
from sam_lightning.sharpness.batches import samples_in
from sam_lightning.sharpness.objective import Estimate, Loss, Objective, mean_over_parts, objective_of
from sam_lightning.sharpness.scale import Adaptive
from sam_lightning.sharpness.undisturbed import BatchNorm


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

    Near a minimum $\max_{\|u\| \le \rho} L(w + T u) - L(w) \approx \rho^2 \lambda_1 / 2$. Largest means largest in
    value, not in magnitude: a strongly negative eigenvalue is a way down and no sharpness.

    Args:
        network: The network, whose P weights are its parameters with `requires_grad`, of one dtype.
        loss: The mean loss of a batch.
        batches: The data of this process.
        count: How many, at least 1 and less than P.
        scale: Adaptive, or plain if None.
        m: Samples per part, for the mean of each eigenvalue over parts; `None`: the whole data.
        batch_norm: What normalisation layers use, see `undisturbed`.
        tolerance: Relative accuracy at which the Lanczos iteration ends, in (0, 1).
        seed: Seed of the iteration's start.

    Returns:
        `count` values, the largest first.

    Raises:
        ValueError: If `count` or `tolerance` is outside what is allowed.
        RuntimeError: If the Hessian is not finite, or the iteration does not converge.

    Cost: about 20 to 60 products with the Hessian over all data, each as much as two gradients.

    What it does not tell: a ReLU network can be rescaled to any plain λ without changing what it computes (Dinh,
    Pascanu, Bengio, Bengio. Sharp Minima Can Generalize For Deep Nets. ICML 2017); at weights far from a minimum the
    curvature is not the loss that a ball around them reaches.

    Reference:
        R. B. Lehoucq, D. C. Sorensen, C. Yang. ARPACK Users' Guide. 1998 (implicitly restarted Lanczos).
        Ghorbani, Krishnan, Xiao. An Investigation into Neural Net Optimization via Hessian Eigenvalue Density.
        ICML 2019. arXiv 1901.10159.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance!r}.")
    with objective_of(network, loss, batches, scale, batch_norm, seed) as objective:
        size = sum(weight.numel() for weight in objective.weights)
        if not 1 <= count < size:
            raise ValueError(f"count must be at least 1 and less than the {size} weights, got {count!r}.")
        return tuple(mean_over_parts(lambda part: _eigenvalues(part, count, tolerance), objective, m))


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

    With v of independent signs, $E[v v^\top] = I$. The sum of all eigenvalues; for small σ, half of σ² times it is
    the average-case sharpness. It is linear in L, so its mean over parts of any size m is the trace of the whole.

    Args:
        network: The network; its weights are its parameters with `requires_grad`, of one dtype.
        loss: The mean loss of a batch.
        batches: The data of this process.
        draws: Number of v, at least 2.
        scale: Adaptive, or plain if None.
        batch_norm: What normalisation layers use, see `undisturbed`.
        seed: Seed of v.

    Returns:
        The mean over draws with its standard error.

    Raises:
        ValueError: If `draws` is less than 2.

    Cost: as many products with the Hessian over all data as draws, each as much as two gradients.

    What it does not tell: which directions are sharp, and negative eigenvalues cancel positive ones; the plain trace
    changes when layers of a ReLU network are rescaled.

    Reference:
        M. F. Hutchinson. A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines.
        Communications in Statistics 18, 1989.
    """
    if draws < 2:
        raise ValueError(f"draws must be an integer >= 2, for a standard error, got {draws!r}.")
    require("sharpness", "The trace of the Hessian", "curvlinops")
    from sam_lightning.sharpness.products import hutchinson_trace

    with objective_of(network, loss, batches, scale, batch_norm, seed) as objective:
        hessian = ScaledHessian(objective)
        return Estimate.of([float(hutchinson_trace(hessian, num_matvecs=1)) for _ in range(draws)])


class ScaledHessian:
    r"""$T \, \nabla^2 L(w) \, T$ of an objective, a (P, P) operator on its u laid out behind one another."""

    def __init__(self, objective: Objective) -> None:
        require("sharpness", "The Hessian", "curvlinops")
        from sam_lightning.sharpness.products import BackwardTwice, MeanLoss

        objective.move(None)
        self._objective = objective
        self._T = torch.cat([t.flatten() for t in objective.T])
        self._hessian = BackwardTwice(
            objective.batch_loss,
            MeanLoss(),
            objective.weights,
            [(batch, torch.empty(0)) for batch in objective.batches],
            check_deterministic=False,  # four passes over the data, and it refuses a weight that the loss does not use
            num_data=objective.samples,  # of all processes, so that their sum is the mean
            batch_size_fn=samples_in,
        )
        self.shape: tuple[int, int] = self._hessian.shape
        self.device = self._T.device
        self.dtype = self._T.dtype

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with (P, K) or (P,)."""
        T = self._T.view(-1, *[1] * (vectors.ndim - 1))
        return T * self._objective.over_processes([self._hessian @ (T * vectors)])[0]


def _eigenvalues(objective: Objective, count: int, tolerance: float) -> list[float]:
    require("sharpness", "The largest eigenvalues", "scipy")
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    hessian = ScaledHessian(objective)

    def product(vector: np.ndarray) -> np.ndarray:
        found = (hessian @ torch.as_tensor(vector, dtype=hessian.dtype, device=hessian.device)).double().cpu().numpy()
        if not np.isfinite(found).all():
            raise RuntimeError("the Hessian is not finite: the loss or its gradient overflows at these weights.")
        return found

    start = torch.randn(hessian.shape[0], dtype=torch.float64).numpy()  # of the seed: the same in every process
    if not product(start).any():  # the Hessian is zero, where ARPACK gives up
        return [0.0] * count
    # Where the iteration must begin anew; the same in every process, as SciPy before 1.17 has it by itself.
    restart = {"rng": np.random.default_rng(0)} if "rng" in signature(eigsh).parameters else {}
    try:
        found = eigsh(
            LinearOperator(hessian.shape, product, dtype=np.float64),
            count,
            which="LA",
            v0=start,
            tol=tolerance,
            return_eigenvectors=False,
            **restart,
        )
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"the Lanczos iteration found {len(error.eigenvalues)} of {count} eigenvalues: raise tolerance, now "
            f"{tolerance}, or lower count."
        ) from error
    return sorted(found.tolist(), reverse=True)
