"""GSAM: descends along the perturbed gradient without raising the surrogate gap."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sam_lightning.optim.checks import check_non_negative
from sam_lightning.optim.parameter_groups import BaseOptimizer, Params
from sam_lightning.optim.sharpness_aware import SharpnessAware
from sam_lightning.tensors.norms import global_norm, reciprocal
from sam_lightning.tensors.vectors import add_, inner_product, multiply_, unit_vector


class GSAM(SharpnessAware):
    r"""Surrogate gap guided SAM: $g_e - \alpha \, (g - \langle g, \hat g_e \rangle \, \hat g_e)$, with SAM's e.

    The part of g orthogonal to $g_e$ is subtracted: to first order the perturbed loss falls as under SAM, and the
    surrogate gap $L(w + e) - L(w)$ falls besides. The decomposition is over all parameters with a gradient.

    State: none beside the base's. Cost: two passes; two copies of the weights. In several processes both gradients
    must be means over all of them.

    Args:
        params: Parameters, `(name, parameter)` pairs, or group dictionaries.
        base: The optimizer that descends, a class or a callable that makes one from parameters.
        rho: Radius in weight space, L2, at least 0. The authors let it follow the learning rate.
        alpha: Weight of the orthogonal part, at least 0; 0 is SAM.
        every: Perturb in every k-th step only.
        base_options: Options of `base`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = GSAM([weight], torch.optim.SGD, lr=0.1, rho=1.0, alpha=0.5)
        >>> weight.grad = torch.tensor([2.0, 1.0])
        >>> with optimizer.perturbed():
        ...     weight.grad = torch.tensor([3.0, 0.0])
        >>> weight.grad  # (3, 0) - 0.5 (0, 1)
        tensor([ 3.0000, -0.5000])

    Reference:
        Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu. Surrogate Gap Minimization Improves
        Sharpness-Aware Training. ICLR 2022. arXiv 2203.08065, algorithm 1.

    Differs from the paper's code in: in several processes the authors decompose per process and average the
    results; the radius's schedule is an option of training, not of the optimizer.
    """

    keeps_first_gradient = True
    needs_mean_gradient = True

    def __init__(
        self,
        params: Params,
        base: BaseOptimizer,
        rho: float = 0.05,
        alpha: float = 0.4,
        every: int = 1,
        **base_options: Any,
    ) -> None:
        self.alpha = check_non_negative("alpha", alpha)
        super().__init__(params, base, rho, every, **base_options)

    def displacement(self, weights: list[Tensor], grads: list[Tensor]) -> Sequence[Tensor]:
        """Gives g / ||g||."""
        return unit_vector(grads)

    def descent(self, weights: list[Tensor], first: list[Tensor] | None, grads: list[Tensor]) -> None:
        """(1 + alpha <g, g_e> / ||g_e||^2) g_e - alpha g."""
        if first is None or self.alpha == 0:
            return
        inverse = reciprocal(global_norm(grads))
        along = inner_product(first, grads) * inverse * inverse
        multiply_(grads, 1 + self.alpha * along)
        add_(grads, first, -self.alpha)
