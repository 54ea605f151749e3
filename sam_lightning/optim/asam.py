"""ASAM: the ball is scaled by the size of the weights."""

from typing import Any

import torch
from torch import Tensor

from sam_lightning.optim.base import (
    BaseOptimizer,
    Params,
    SharpnessAware,
    check_radius,
)
from sam_lightning.optim.norms import divide_by_norm, global_norm


class ASAM(SharpnessAware):
    r"""Adaptive SAM: $e = \rho \, T^2 g / \|T g\|$ with $T = |w| + \eta$, element by element.

    Two methods are published under this name, with directions that can differ widely:

    - `normalize_bias=False, eta=0.01` (default): the ASAM authors' code, for layers whose parameters are
      called weight and bias. Biases keep T = 1 and so move by absolute amounts.
    - `normalize_bias=True, eta=0.0`: T = |w| for every parameter. Only this one leaves the perturbed loss
      of a ReLU network unchanged when its layers are rescaled; a parameter that is 0 never moves.

    A bias is a parameter whose own name (behind the last dot) contains "bias", so `normalize_bias=False`
    needs `model.named_parameters()`.

    Args:
        params: `(name, parameter)` pairs, or groups of them; bare parameters if `normalize_bias=True`.
        base: Makes the optimizer that descends, from parameters.
        rho: Radius in units of T, L2, at least 0; about ten times SAM's.
        eta: Added to |w|, so that small weights move too, at least 0.
        normalize_bias: Whether biases are scaled like every other parameter.

    Example:
        >>> from functools import partial
        >>> weight = torch.nn.Parameter(torch.tensor([2.0, 0.0]))
        >>> sgd = partial(torch.optim.SGD, lr=0.1)
        >>> optimizer = ASAM([weight], sgd, rho=1.0, eta=0.0, normalize_bias=True)
        >>> weight.sum().backward()
        >>> with optimizer.perturbed():
        ...     weight.data
        tensor([4., 0.])

    Reference:
        Kwon, Kim, Park, Choi. ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
        Deep Neural Networks. ICML 2021. arXiv 2102.11600, eq. (6) and section 4.
    """

    def __init__(
        self,
        params: Params,
        base: BaseOptimizer,
        rho: float = 0.5,
        eta: float = 0.01,
        normalize_bias: bool = False,
    ) -> None:
        self.eta = check_radius("eta", eta)
        self.normalize_bias = normalize_bias
        super().__init__(params, base, rho)
        if not normalize_bias:
            self._biases()

    def displacement(self, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """T^2 g / ||T g||."""
        T = self.units(weights)
        Tg = list(torch._foreach_mul(T, grads))
        e = divide_by_norm(Tg, global_norm(Tg), in_place=True)  # fresh memory costs more than the arithmetic
        torch._foreach_mul_(e, T)  # last: T^2 g may be beyond half precision
        return e

    def units(self, weights: list[Tensor]) -> list[Tensor]:
        """T of each of the weights, which are parameters of this optimizer."""
        T = list(torch._foreach_abs(weights))
        torch._foreach_add_(T, self.eta)
        if not self.normalize_bias:
            biases = self._biases()
            for weight, t in zip(weights, T, strict=True):
                if weight in biases:
                    t.fill_(1.0)
        return T

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "eta": self.eta, "normalize_bias": self.normalize_bias}

    def _biases(self) -> set[Tensor]:
        """The parameters that are biases by name (a tensor's hash is its identity)."""
        biases: set[Tensor] = set()
        for group in self.param_groups:
            if "param_names" not in group:
                raise ValueError(
                    "normalize_bias=False tells biases by their names: pass model.named_parameters() "
                    "instead of model.parameters(), or set normalize_bias=True."
                )
            named = zip(group["param_names"], group["params"], strict=True)
            biases.update(p for name, p in named if "bias" in name.rpartition(".")[2])
        return biases
