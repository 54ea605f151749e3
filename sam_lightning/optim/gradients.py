"""The gradients of parameters: which there are, and which have been written since."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sam_lightning.tensors.shards import local_parts


def gradients(weights: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of weights that have one."""
    return [weight.grad for weight in weights]  # type: ignore[misc]  # not None


def dense(weights: list[Tensor]) -> list[Tensor]:
    """The weights whose gradients can be computed with."""
    return [w for w, g in zip(weights, gradients(weights), strict=True) if g.layout == torch.strided]


def refuse_sparse(weights: list[Tensor]) -> None:
    """A RuntimeError that tells of a sparse gradient and what to do."""
    for shape in [g.shape for g in gradients(weights) if g.layout != torch.strided]:
        raise RuntimeError(
            f"sparse gradients cannot be perturbed, got one for a parameter of shape {tuple(shape)}: make its layer "
            "with sparse=False, or give its group rho=0."
        )


class GradientVersions:
    """What the gradients were, to tell which have been written since; sees what autograd writes, not a reduction."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._before = dict(zip(weights, self._of(weights), strict=True))

    def __contains__(self, weight: Tensor) -> bool:
        return weight in self._before

    def unchanged(self) -> list[Tensor]:
        """The weights whose gradients are as they were."""
        same = [w for w, (was, _) in self._before.items() if w.grad is was]
        return [w for w, (_, version) in zip(same, self._of(same), strict=True) if self._before[w][1] == version]

    def differ_from(self, weights: list[Tensor]) -> bool:
        """Whether any of the gradients, now those of `weights`, has been written, has come or has gone."""
        return self._before.keys() != set(weights) or len(self.unchanged()) < len(self._before)

    @staticmethod
    def _of(weights: list[Tensor]) -> list[tuple[Tensor, int]]:
        found = gradients(weights)
        return [(g, part._version) for g, part in zip(found, local_parts(found), strict=True)]
