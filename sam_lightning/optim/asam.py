"""ASAM: the ball is scaled by the size of the weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_lightning.optim.checks import check_non_negative
from sam_lightning.optim.parameter_groups import BaseOptimizer, Params
from sam_lightning.optim.sharpness_aware import SharpnessAware
from sam_lightning.tensors.norms import global_norm, reciprocal
from sam_lightning.tensors.vectors import Scaled, divide_by_norm, parts_of


class ASAM(SharpnessAware):
    r"""Adaptive SAM: $e = \rho \, T^2 g / \|T g\|$ with $T = |w| + \eta$, element by element.

    Two methods are published under this name, with directions that can differ widely:

    - `normalize_bias=False, eta=0.01` (default): the ASAM authors' code, for layers whose parameters are
      called weight and bias. Biases keep T = 1 and so move by absolute amounts.
    - `normalize_bias=True, eta=0.0`: T = |w| for every parameter. Only this one leaves the perturbed loss
      of a ReLU network unchanged when its layers are rescaled; a parameter that is 0 never moves.

    A bias is a parameter whose own name (behind the last dot) contains "bias", so `normalize_bias=False`
    needs `model.named_parameters()`.

    State: none beside the base's. Cost: two passes; two copies of the weights, of which one, w, is
    kept through the second pass, and T of about a million entries at a time.

    Args:
        params: `(name, parameter)` pairs, or groups of them; bare parameters if `normalize_bias=True`.
        base: The optimizer that descends, a class or a callable that makes one from parameters.
        rho: Radius in units of T, L2, at least 0; about ten times SAM's.
        eta: Added to |w|, so that small weights move too, at least 0.
        normalize_bias: Whether biases are scaled like every other parameter.
        every: Perturb in every k-th step only.
        base_options: Options of `base`.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0, 0.0]))
        >>> optimizer = ASAM([weight], torch.optim.SGD, lr=0.1, rho=1.0, eta=0.0, normalize_bias=True)
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
        every: int = 1,
        **base_options: Any,
    ) -> None:
        self.eta = check_non_negative("eta", eta)
        self.normalize_bias = normalize_bias
        super().__init__(params, base, rho, every, **base_options)
        for group in self.param_groups:
            self._are_biases(group["params"])

    def displacement(self, weights: list[Tensor], grads: list[Tensor]) -> Sequence[Tensor]:
        """T^2 g / ||T g||."""
        last = any(weight.dtype is torch.float16 for weight in weights)  # T^2 g may be beyond half precision
        e: list[Tensor] = []
        norms: list[Tensor] = []
        for part in parts_of(weights):  # T and T g of one part are small and stay in the cache
            T = self.units(weights[part])
            Tg = list(torch._foreach_mul(T, grads[part]))
            norms.append(global_norm(Tg).to(weights[0].device))
            if not last:
                torch._foreach_mul_(Tg, T)
            e += Tg
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if not last:
            return Scaled(e, reciprocal(norm))
        e = divide_by_norm(e, norm)
        for part in parts_of(weights):
            torch._foreach_mul_(e[part], self.units(weights[part]))
        return e

    def units(self, weights: list[Tensor]) -> list[Tensor]:
        """T of each of the weights, which are parameters of this optimizer."""
        T = list(torch._foreach_abs(weights))
        torch._foreach_add_(T, self.eta)
        for t, is_bias in zip(T, self._are_biases(weights), strict=True):
            if is_bias:
                t.fill_(1.0)
        return T

    def _are_biases(self, weights: list[Tensor]) -> list[bool]:
        """Whether each of the weights keeps T = 1: the biases by name, unless they are scaled."""
        if self.normalize_bias:
            return [False] * len(weights)
        if not all(weight in self.names for weight in weights):
            raise ValueError(
                "normalize_bias=False tells biases by their names: pass model.named_parameters() instead of "
                "model.parameters() (to around: names=model), or set normalize_bias=True."
            )
        return ["bias" in self.names[weight].rpartition(".")[2] for weight in weights]
