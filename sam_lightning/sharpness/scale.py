"""The unit in which each weight moves: 1, or its own size."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sam_lightning.optim import ASAM


@dataclass(frozen=True)
class Adaptive:
    r"""ASAM's unit $T = |w| + \eta$, element by element; plain measures have $T = 1$.

    A measure is adaptive by being taken in $u = e / T$: of $u \mapsto L(w + T u)$ instead of $e \mapsto L(w + e)$.

    Args:
        eta: Added to |w|, at least 0. With 0 and scaled biases, measures do not change when the layers of a ReLU
            network are rescaled without changing what it computes.
        normalize_bias: Whether biases are scaled too, or have T = 1 as in the ASAM authors' code.

    Reference:
        Kwon, Kim, Park, Choi. ASAM. ICML 2021. arXiv 2102.11600, section 3.
    """

    eta: float = 0.0
    normalize_bias: bool = True


@torch.no_grad()
def units(network: nn.Module, scale: Adaptive | None) -> list[Tensor]:
    """T of every trained parameter: ones without a scale."""
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("the network has no parameter with requires_grad=True: there is nothing to move.")
    weights: list[Tensor] = [parameter for _, parameter in named]
    if scale is None:
        return [torch.ones_like(weight) for weight in weights]
    ball = ASAM(named, partial(torch.optim.SGD, lr=0.0), eta=scale.eta, normalize_bias=scale.normalize_bias)
    return ball.units(weights)
