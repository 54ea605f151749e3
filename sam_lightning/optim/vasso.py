"""VaSSO: climbs along a smoothed gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_lightning.optim.parameter_groups import BaseOptimizer, Params
from sam_lightning.optim.sharpness_aware import SharpnessAware
from sam_lightning.tensors.vectors import Scaled, add_, multiply_, unit_vector


class VaSSO(SharpnessAware):
    r"""Variance-suppressed SAM: $e = \rho \, d / \|d\|$ with $d \leftarrow (1 - \theta) d + \theta g$, from 0 on.

    The batch's noise in the direction is averaged out: the opposite of what `FriendlySAM` does.

    State: d, one tensor per parameter, in the base's state. Cost: two passes; four copies of the weights. In
    several processes the first gradient must be the mean over all of them.

    Args:
        params: Parameters, `(name, parameter)` pairs, or group dictionaries.
        base: The optimizer that descends, a class or a callable that makes one from parameters.
        rho: Radius in weight space, L2, at least 0.
        theta: How much of the new gradient enters, in (0, 1]; 1 is SAM. The authors tune it between 0.2 and 0.9.
        every: Perturb in every k-th step only.
        base_options: Options of `base`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> optimizer = VaSSO([weight], torch.optim.SGD, lr=0.1, rho=1.0, theta=0.5)
        >>> for gradient in ([4.0, 0.0], [0.0, 2.0]):
        ...     weight.grad = torch.tensor(gradient)
        ...     with optimizer.perturbed():
        ...         e = weight.detach().clone()
        ...     _ = weight.grad.zero_()
        ...     optimizer.step()
        >>> e  # d = (2, 0), then (1, 1)
        tensor([0.7071, 0.7071])

    Reference:
        Li, Giannakis. Enhancing Sharpness-Aware Optimization Through Variance Suppression. NeurIPS 2023.
        arXiv 2309.15639, algorithm 2.

    Differs from the paper's code in: that restores weights by subtraction, and its memory is not saved.
    """

    keeps_first_gradient = True
    needs_mean_gradient = True
    memory = "smoothed_gradient"

    def __init__(
        self,
        params: Params,
        base: BaseOptimizer,
        rho: float = 0.05,
        theta: float = 0.9,
        every: int = 1,
        **base_options: Any,
    ) -> None:
        if not 0 < theta <= 1:
            raise ValueError(f"theta must be above 0 and at most 1, got {theta!r}.")
        self.theta = theta
        super().__init__(params, base, rho, every, **base_options)

    def displacement(self, weights: list[Tensor], grads: list[Tensor]) -> Sequence[Tensor]:
        """Gives d / ||d||."""
        d = list(torch._foreach_mul(grads, self.theta))
        add_(d, Scaled(self.recall(weights), self.loss_scale), 1 - self.theta)
        return unit_vector(d)

    def remember(self, memory: list[Tensor], first: list[Tensor]) -> None:
        """Renews d."""
        torch._foreach_mul_(memory, 1 - self.theta)
        multiply_(first, 1 / self.loss_scale)
        torch._foreach_add_(memory, first, alpha=self.theta)
