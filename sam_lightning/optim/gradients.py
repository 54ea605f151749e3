"""The gradients of parameters: which there are, and which have been written since."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sam_lightning.optim.shards import local_parts


def gradient(weight: Tensor) -> Tensor:
    """The gradient of a weight that has one."""
    assert weight.grad is not None
    return weight.grad


def dense(weights: Iterable[Tensor]) -> list[Tensor]:
    """The weights whose gradients can be computed with."""
    return [weight for weight in weights if gradient(weight).layout == torch.strided]


def refuse_sparse(weights: list[Tensor]) -> None:
    """A RuntimeError that tells of a sparse gradient and what to do."""
    for weight in weights:
        if gradient(weight).layout != torch.strided:
            raise RuntimeError(
                f"sparse gradients cannot be perturbed, got one for a parameter of shape "
                f"{tuple(weight.shape)}: make its layer with sparse=False, or give its group rho=0."
            )


class Marks:
    """What the gradients were, to tell which have been written since; sees what autograd writes, not a reduction."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._before = {weight: self._of(weight) for weight in weights}

    def __contains__(self, weight: Tensor) -> bool:
        return weight in self._before

    def unchanged(self) -> list[Tensor]:
        """The weights whose gradients are as they were."""
        return [w for w, (was, version) in self._before.items() if w.grad is was and self._of(w)[1] == version]

    def differ_from(self, weights: list[Tensor]) -> bool:
        """Whether any of the gradients, now those of `weights`, has been written, has come or has gone."""
        return self._before.keys() != set(weights) or len(self.unchanged()) < len(self._before)

    @staticmethod
    def _of(weight: Tensor) -> tuple[Tensor, int]:
        return gradient(weight), local_parts([gradient(weight)])[0]._version
