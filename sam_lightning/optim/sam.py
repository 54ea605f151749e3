"""SAM: the ball is round."""

from torch import Tensor

from sam_lightning.optim.base import BaseOptimizer, Params, SharpnessAware
from sam_lightning.optim.norms import divide_by_norm, global_norm


class SAM(SharpnessAware):
    r"""Sharpness-aware minimization: $e = \rho \, g / \|g\|$, with one L2 norm over all parameters.

    Args:
        params: Parameters, `(name, parameter)` pairs, or group dictionaries.
        base: Makes the optimizer that descends, from parameters.
        rho: Radius in weight space, L2, at least 0; 0.05 is the authors' value for CIFAR.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = SAM([weight], base=partial(torch.optim.SGD, lr=0.1), rho=0.5)
        >>> weight.square().sum().div(2).backward()
        >>> with optimizer.perturbed():
        ...     weight.data
        tensor([3.3000, 4.4000])
        >>> weight.data
        tensor([3., 4.])

    Reference:
        Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
        Generalization. ICLR 2021. arXiv 2010.01412, eq. (2).

    Differs from the paper: weight decay belongs to the base optimizer and acts at w; the authors' code
    puts it into the differentiated loss, where it also turns the direction of the ascent.
    """

    def __init__(self, params: Params, base: BaseOptimizer, rho: float = 0.05) -> None:
        super().__init__(params, base, rho)

    def displacement(self, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Gives g / ||g||."""
        return divide_by_norm(grads, global_norm(grads))
