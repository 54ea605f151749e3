"""A fixed mixture of both gradients, without a copy of the first one."""

import torch
import torch.distributed as dist
from torch import Tensor

from sam_lightning.optim.gradients import GradientVersions, dense, gradients


class Blend:
    """a g + b g_e in the memory of .grad: g is scaled by a / b and left for g_e to be added to; the sum times b.

    In data-parallel training that is right whether g is one process's or the mean of all: the one reduction of the
    second pass is linear. A parameter with a gradient in one pass only is left as the second pass left it, as far
    as one process can tell: where several share gradients, a missing one counts as 0.

    Args:
        first: a, not 0.
        second: b, not 0.
        weights: The parameters that have a gradient.
    """

    def __init__(self, first: float, second: float, weights: list[Tensor]) -> None:
        self._ratio, self._second = first / second, second
        self._is_kept = False
        self._versions = GradientVersions(weights)

    def keep(self, weights: list[Tensor]) -> None:
        """What `zero_grad()` does instead of clearing the first gradient."""
        if self._is_kept:
            raise RuntimeError("zero_grad() twice inside perturbed(): the first gradient's share would be lost.")
        self._is_kept = True
        _scale(weights, self._ratio)
        self._versions = GradientVersions(weights)

    def finish(self, weights: list[Tensor]) -> None:
        """Turns what both passes left into the mixture; `weights` have a gradient now."""
        if self._is_kept:
            if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
                for weight in self._versions.unchanged():
                    weight.grad = None
            _scale([w for w in weights if w.grad is not None and w in self._versions], self._second)
        elif self._versions.differ_from(weights):
            raise RuntimeError(
                "the gradient was replaced inside perturbed() without the optimizer's zero_grad(), which keeps "
                "the first one's share: call optimizer.zero_grad() there, not the module's."
            )


@torch.no_grad()
def _scale(weights: list[Tensor], factor: float) -> None:
    together = dense(weights)
    if together:
        torch._foreach_mul_(gradients(together), factor)
    for gradient in gradients(set(weights).difference(together)):
        gradient.mul_(factor)
