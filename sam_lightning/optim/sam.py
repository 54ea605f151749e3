"""SAM: the ball is round."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sam_lightning.optim.parameter_groups import BaseOptimizer, Params
from sam_lightning.optim.sharpness_aware import SharpnessAware
from sam_lightning.tensors.vectors import unit_vector


class SAM(SharpnessAware):
    r"""Sharpness-aware minimization: $e = \rho \, g / \|g\|$, with one L2 norm over all parameters.

    State: none beside the base's. Cost: two passes; one copy of the weights.

    Args:
        params: Parameters, `(name, parameter)` pairs, or group dictionaries.
        base: The optimizer that descends, a class or a callable that makes one from parameters.
        rho: Radius in weight space, L2, at least 0; 0.05 is the authors' value for CIFAR.
        every: Perturb in every k-th step only.
        base_options: Options of `base`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = SAM([weight], torch.optim.SGD, lr=0.1, rho=0.5)
        >>> weight.square().sum().div(2).backward()
        >>> with optimizer.perturbed():
        ...     weight.data
        tensor([3.3000, 4.4000])
        >>> weight.data
        tensor([3., 4.])

    Reference:
        Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
        Generalization. ICLR 2021. arXiv 2010.01412, eq. (2).

    Differs from the paper's code in: weight decay belongs to the base optimizer and acts at w; the authors' code
    puts it into the differentiated loss, where it also turns the direction of the ascent.
    """

    def __init__(
        self, params: Params, base: BaseOptimizer, rho: float = 0.05, every: int = 1, **base_options: Any
    ) -> None:
        super().__init__(params, base, rho, every, **base_options)

    def displacement(self, weights: list[Tensor], grads: list[Tensor]) -> Sequence[Tensor]:
        """Gives g / ||g||."""
        return unit_vector(grads)
