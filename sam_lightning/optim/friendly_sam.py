"""FriendlySAM: climbs along what is this batch's own in the gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_lightning.optim.checks import check_non_negative
from sam_lightning.optim.parameter_groups import BaseOptimizer, Params
from sam_lightning.optim.sharpness_aware import SharpnessAware
from sam_lightning.tensors.vectors import Scaled, add_, multiply_, unit_vector


class FriendlySAM(SharpnessAware):
    r"""F-SAM: $e = \rho \, u / \|u\|$ with $u = g - \sigma \, m$ and $m \leftarrow \lambda m + (1 - \lambda) g$.

    m, a moving mean over the steps that perturb, stands for the gradient of the whole data; it begins at 0 and is
    renewed before it is subtracted. What remains is the batch's own part.

    State: m, one tensor per parameter, in the base's state. Cost: two passes; four copies of the weights (w, g, m
    and u). In several processes the first gradient must be the mean over all of them.

    Args:
        params: Parameters, `(name, parameter)` pairs, or group dictionaries.
        base: The optimizer that descends, a class or a callable that makes one from parameters.
        rho: Radius in weight space, L2, at least 0; the authors take 0.1 to 0.2 for CIFAR.
        sigma: How much of the mean is subtracted, at least 0; 0 is SAM.
        lmbda: How slowly the mean changes, in [0, 1); the authors take 0.6 for ResNet-18, 0.9 else.
        every: Perturb in every k-th step only.
        base_options: Options of `base`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> optimizer = FriendlySAM([weight], torch.optim.SGD, lr=0.1, rho=1.0, lmbda=0.5)
        >>> for gradient in ([2.0, 0.0], [2.0, 4.0]):
        ...     weight.grad = torch.tensor(gradient)
        ...     with optimizer.perturbed():
        ...         e = weight.detach().clone()
        ...     _ = weight.grad.zero_()
        ...     optimizer.step()
        >>> e  # m = (1, 0), then (1.5, 2); u = (0.5, 2)
        tensor([0.2425, 0.9701])

    Reference:
        Li, Zhou, He, Cheng, Huang. Friendly Sharpness-Aware Minimization. CVPR 2024. arXiv 2403.12350,
        algorithm 1.

    Differs from the paper's code in: that subtracts the mean before it is renewed (the same direction for sigma 1)
    and begins it with the first gradient; its memory is not saved.
    """

    keeps_first_gradient = True
    needs_mean_gradient = True
    memory = "gradient_mean"

    def __init__(
        self,
        params: Params,
        base: BaseOptimizer,
        rho: float = 0.1,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        every: int = 1,
        **base_options: Any,
    ) -> None:
        self.sigma = check_non_negative("sigma", sigma)
        if not 0 <= lmbda < 1:
            raise ValueError(f"lmbda must be at least 0 and below 1, got {lmbda!r}.")
        self.lmbda = lmbda
        super().__init__(params, base, rho, every, **base_options)

    def displacement(self, weights: list[Tensor], grads: list[Tensor]) -> Sequence[Tensor]:
        """Gives u / ||u||, u = (1 - sigma (1 - lambda)) g - sigma lambda m with the m of the step before."""
        u = list(torch._foreach_mul(grads, 1 - self.sigma * (1 - self.lmbda)))
        add_(u, Scaled(self.recall(weights), self.loss_scale), -self.sigma * self.lmbda)
        return unit_vector(u)

    def remember(self, memory: list[Tensor], first: list[Tensor]) -> None:
        """Renews m."""
        torch._foreach_mul_(memory, self.lmbda)
        multiply_(first, 1 / self.loss_scale)
        torch._foreach_add_(memory, first, alpha=1 - self.lmbda)
