"""ASAM: the ball is scaled by the size of the weights."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from sam_lightning.optim.checks import check_non_negative
from sam_lightning.optim.parameter_groups import BaseOptimizer, Params
from sam_lightning.optim.sharpness_aware import SharpnessAware
from sam_lightning.tensors.norms import norm_of_pieces, reciprocal
from sam_lightning.tensors.vectors import Deferred, Scaled, add_, divide_by_norm, in_pieces


class ASAM(SharpnessAware):
    r"""Adaptive SAM: $e = \rho \, T^2 g / \|T g\|$ with $T = |w| + \eta$, element by element.

    Two methods are published under this name, with directions that can differ widely:

    - `normalize_bias=False, eta=0.01` (default): the ASAM authors' code, for layers whose parameters are
      called weight and bias. Biases keep T = 1 and so move by absolute amounts.
    - `normalize_bias=True, eta=0.0`: T = |w| for every parameter. Only this one leaves the perturbed loss
      of a ReLU network unchanged when its layers are rescaled; a parameter that is 0 never moves.

    A bias is a parameter whose own name (behind the last dot) contains "bias", so `normalize_bias=False`
    needs `model.named_parameters()`.

    State: none beside the base's. Cost: two passes; one copy of the weights, since e is computed when w moves,
    some entries at a time.

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
        return _SquaredUnits(weights, grads, self._are_biases(weights), self.eta)

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


class _SquaredUnits(Deferred):
    """T^2 g / ||T g|| of weights that have not moved yet.

    Args:
        weights: The weights w.
        grads: Their gradients g.
        are_biases: Whether each keeps T = 1.
        eta: Added to |w| for T.
        norm: ||T g|| over more weights than these; `None`: over these.
    """

    def __init__(
        self, weights: list[Tensor], grads: list[Tensor], are_biases: list[bool], eta: float, norm: Tensor | None = None
    ) -> None:
        self._weights, self._grads, self._are_biases, self._eta = weights, grads, are_biases, eta
        self._norm = self._length() if norm is None else norm

    def __len__(self) -> int:
        return len(self._weights)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> "_SquaredUnits": ...

    def __getitem__(self, index: int | slice) -> "Tensor | _SquaredUnits":
        if isinstance(index, slice):
            mine = self._weights[index], self._grads[index], self._are_biases[index]
            return _SquaredUnits(*mine, self._eta, self._norm)
        zero = torch.zeros_like(self._weights[index])
        self[index : index + 1].add_to_([zero], 1.0)
        return zero

    def add_to_(self, targets: list[Tensor], factor: float) -> None:
        inverse = reciprocal(self._norm)
        if not isinstance(inverse, Tensor) and inverse == 0:
            return
        for index, (target, w, g) in in_pieces(targets, self._weights, self._grads):
            T = self._units(index, w)
            if w[0].dtype is torch.float16:  # T^2 and T^2 g may be beyond it
                e = divide_by_norm(list(torch._foreach_mul(T, g)), self._norm.to(w[0].device))
                torch._foreach_mul_(e, T)
                add_(target, e, factor)
                continue
            torch._foreach_mul_(T, T)
            if isinstance(inverse, Tensor):
                add_(target, Scaled(list(torch._foreach_mul(T, g)), inverse.to(w[0].device)), factor)
            else:
                # From the left, so that g / ||T g|| comes first: T^2 / ||T g|| may be beyond the type.
                torch._foreach_addcmul_(target, g, T, value=factor * inverse)

    def _length(self) -> Tensor:
        def pieces() -> Iterator[list[Tensor]]:
            for index, (w, g) in in_pieces(self._weights, self._grads):
                yield list(torch._foreach_mul(self._units(index, w), g))

        return norm_of_pieces(pieces)

    def _units(self, index: list[int], weights: list[Tensor]) -> list[Tensor]:
        """T of pieces of the weights of these indices."""
        T = list(torch._foreach_abs(weights))
        torch._foreach_add_(T, self._eta)
        for i, t in zip(index, T, strict=True):
            if self._are_biases[i]:
                t.fill_(1.0)
        return T
