"""LookSAM: the flat direction of one perturbed step is used in the steps after it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_lightning.optim.checks import check_non_negative
from sam_lightning.optim.parameter_groups import BaseOptimizer, Params
from sam_lightning.optim.sharpness_aware import SharpnessAware
from sam_lightning.tensors.copies import copy
from sam_lightning.tensors.norms import global_norm, reciprocal
from sam_lightning.tensors.vectors import Scaled, add_, divide_by_norm, inner_product, multiply_, unit_vector


class LookSAM(SharpnessAware):
    r"""LookSAM: SAM in every k-th step, between them $g + \alpha \, \|g\| \, \hat g_v$.

    $g_v = g_e - \langle g_e, \hat g \rangle \, \hat g$ is what SAM's gradient had beside the plain one, in the last
    step that perturbed; norms and products are over all parameters with a gradient.

    A trap: no alpha is right for all of training. The true $\|g_v\| / \|g\|$ grows with rho and as the loss falls.
    The authors' 0.7 belongs to vision transformers with a large rho and hardly lets a ResNet train; 0.1 is what
    others found to work there.

    State: the unit vector of g_v, one tensor per parameter, in the base's state. Cost: 1 + 1 / k passes; three
    copies of the weights. In several processes the first gradient must be the mean over all of them.

    Args:
        params: Parameters, `(name, parameter)` pairs, or group dictionaries.
        base: The optimizer that descends, a class or a callable that makes one from parameters.
        rho: Radius in weight space, L2, at least 0.
        every: k; 1 is SAM.
        alpha: How much of the flat direction is added, at least 0; 0 is SAM in every k-th step.
        base_options: Options of `base`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> optimizer = LookSAM([weight], torch.optim.SGD, lr=0.1, rho=1.0, every=2, alpha=0.5)
        >>> for first, second in (([2.0, 0.0], [2.0, 3.0]), ([4.0, 0.0], None)):
        ...     weight.grad = torch.tensor(first)
        ...     with optimizer.perturbed() as perturbs:
        ...         if perturbs:
        ...             weight.grad = torch.tensor(second)
        ...     optimizer.step()
        >>> weight.grad  # (4, 0) + 0.5 * 4 (0, 1)
        tensor([4., 2.])

    Reference:
        Liu, Mai, Chen, Hsieh, You. Towards Efficient and Scalable Sharpness-Aware Minimization. CVPR 2022.
        arXiv 2203.02714, algorithm 1. For alpha: Becker et al., arXiv 2401.12033, appendix.

    Differs from the paper's code in: there is none. Other implementations take norms tensor by tensor.
    """

    keeps_first_gradient = True
    needs_mean_gradient = True
    memory = "flat_direction"

    def __init__(
        self,
        params: Params,
        base: BaseOptimizer,
        rho: float = 0.05,
        every: int = 5,
        alpha: float = 0.1,
        **base_options: Any,
    ) -> None:
        self.alpha = check_non_negative("alpha", alpha)
        super().__init__(params, base, rho, every, **base_options)

    def displacement(self, weights: list[Tensor], grads: list[Tensor]) -> Sequence[Tensor]:
        """Gives g / ||g||."""
        return unit_vector(grads)

    def descent(self, weights: list[Tensor], first: list[Tensor] | None, grads: list[Tensor]) -> None:
        """Turns `first` into the unit vector of g_v; in a step without it adds the last one's to `grads`."""
        if first is not None:
            inverse = reciprocal(global_norm(first))
            multiply_(first, -(inner_product(grads, first) * inverse * inverse))
            torch._foreach_add_(first, grads)
            first[:] = divide_by_norm(first, global_norm(first))
        elif self.alpha > 0 and any(self.radius(group) > 0 for group in self.param_groups):
            known = [(w, g) for w, g in zip(weights, grads, strict=True) if self.memory in self.state.get(w, {})]
            direction = Scaled(self.recall([w for w, _ in known]), global_norm(grads))
            add_([g for _, g in known], direction, self.alpha)

    def remember(self, memory: list[Tensor], first: list[Tensor]) -> None:
        """Renews the direction."""
        copy(first, memory)
