"""Products with the Hessian, batch by batch; apart, since it needs curvlinops."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():  # of a package that curvlinops imports: nothing a user could act on
    warnings.filterwarnings("ignore", r"`torch\.jit\.script.*` is deprecated", category=Warning)
    from curvlinops import HessianLinearOperator, hutchinson_trace

__all__ = ["BackwardTwice", "MeanLoss", "hutchinson_trace"]


class BackwardTwice(HessianLinearOperator):  # type: ignore[misc]  # curvlinops ships no types
    """Products by differentiating backwards twice.

    curvlinops differentiates the gradient forwards, which torch does wrongly, without a word, through normalisation
    by batch statistics (github.com/pytorch/pytorch/issues/196699), and not at all through GroupNorm.
    """

    def _matmat_batch(self, X: Any, y: Tensor, M: list[Tensor]) -> list[Tensor]:
        loss = self._model_func(X)
        gradient = torch.autograd.grad(loss, self._params, create_graph=True, materialize_grads=True)
        curved = [i for i, part in enumerate(gradient) if part.requires_grad]  # others are constant: no curvature
        columns = []
        for k in range(M[0].shape[-1]):
            along = [M[i][..., k] for i in curved]
            columns.append(
                torch.autograd.grad(
                    [gradient[i] for i in curved], self._params, along, retain_graph=True, materialize_grads=True
                )
                if curved
                else [torch.zeros_like(weight) for weight in self._params]
            )
        return [torch.stack(parts, dim=-1) for parts in zip(*columns, strict=True)]


class MeanLoss(nn.Module):
    """The loss function that curvlinops asks for, where the network's output is its mean loss already."""

    reduction = "mean"
