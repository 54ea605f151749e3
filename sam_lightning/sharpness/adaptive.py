"""The unit T in which each weight is measured: 1, or the weight's own size."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Adaptive:
    r"""ASAM's unit $T = |w| + \eta$, element by element; plain measures have $T = 1$.

    An adaptive measure is the plain one of $u \mapsto L(w + T u)$.

    Args:
        eta: Added to |w|, at least 0. With 0 and scaled biases, measures do not change when the layers of a ReLU
            network are rescaled without changing what it computes.
        normalize_bias: Whether biases are scaled too, or have T = 1 as in the ASAM authors' code.

    Reference:
        Kwon, Kim, Park, Choi. ASAM. ICML 2021. arXiv 2102.11600, section 3.
    """

    eta: float = 0.0
    normalize_bias: bool = True


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as real and imaginary parts, in a last dimension of 2 and the same memory; others as is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@torch.no_grad()
def units(network: nn.Module, scale: Adaptive | None) -> list[Tensor]:
    """T of every parameter with `requires_grad`, in the shape of `real(parameter)`; of ones without a scale.

    Both parts of a complex weight have its modulus as their unit.

    Raises:
        ValueError: If there is no such parameter.
    """
    T = []
    for name, weight in network.named_parameters():
        if not weight.requires_grad:
            continue
        is_scaled = scale is not None and (scale.normalize_bias or "bias" not in name.rpartition(".")[2])
        unit = weight.abs() + scale.eta if scale is not None and is_scaled else real(weight).new_ones(())
        T.append((unit.unsqueeze(-1) if unit.ndim and weight.is_complex() else unit).expand_as(real(weight)))
    if not T:
        raise ValueError("the network has no parameter with requires_grad=True: there is nothing to move.")
    return T
