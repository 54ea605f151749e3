"""Products with the Hessian of an objective, by differentiating backwards twice."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_lightning.sharpness.adaptive import Adaptive, real
from sam_lightning.sharpness.batches import samples_in
from sam_lightning.sharpness.lanczos import CurvatureError, inner
from sam_lightning.sharpness.objective import Loss, Objective, objective_of
from sam_lightning.sharpness.preserved_state import BatchNorm

_ASYMMETRY = 1e-2  # what float32 rounds is far below, what is wrong mostly far above

Gradient = tuple[Tensor, ...]  # of one batch's loss by every parameter, with the graph that differentiates it again


class Hessian:
    r"""$T \, \nabla^2 L(w) \, T$ of an objective, a (P, P) operator on all weights laid out behind one another.

    Backwards twice: differentiated forwards, torch's gradient is wrong without a word through normalisation by batch
    statistics (github.com/pytorch/pytorch/issues/196699), and missing through GroupNorm.

    Args:
        objective: The loss; its weights stay at w.
        seed: Seed of all random vectors, which are the same in every process.
    """

    def __init__(self, objective: Objective, seed: int) -> None:
        objective.move_to(None)
        self.objective = objective
        self.size = sum(weight.numel() for weight in objective.weights)
        self._dtype = reduce(torch.promote_types, (weight.dtype for weight in objective.weights))
        self.device = objective.weights[0].device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._kept: Gradient | None = None

    def __matmul__(self, u: Tensor) -> Tensor:
        """The product with (P,), over the data of all processes."""
        product = torch.zeros_like(u)
        for share, gradient in self.gradients():
            self.add_product(product, gradient, u, share)
        return self.objective.sum_over_processes([product])[0]

    def gradients(self) -> Iterator[tuple[float, Gradient]]:
        """For every batch its share of the samples of all processes, and its gradient."""
        objective = self.objective
        for batch in objective.batches:
            gradient = self._kept
            if gradient is None:
                loss = objective.batch_loss(batch)
                gradient = torch.autograd.grad(loss, objective.parameters, create_graph=True, materialize_grads=True)
            if len(objective.batches) == 1:  # its graph would be made again for every product, at the same peak
                self._kept = gradient
            yield samples_in(batch) / objective.samples, gradient

    def add_product(self, product: Tensor, gradient: Gradient, u: Tensor, share: float = 1.0) -> Tensor:
        """Adds a share of the product of one batch's Hessian with u (P,) to `product` (P,), in place."""
        objective = self.objective
        curved = [i for i, part in enumerate(gradient) if part.requires_grad]  # others are constant: no curvature
        if not curved:
            return product
        sizes = [weight.numel() for weight in objective.weights]
        v = [(t * part.view_as(t)).to(t.dtype) for t, part in zip(objective.T, torch.split(u, sizes), strict=True)]
        parts = torch.autograd.grad(
            [gradient[i] for i in curved],
            objective.parameters,
            [torch.view_as_complex(v[i]) if gradient[i].is_complex() else v[i] for i in curved],
            retain_graph=True,
            materialize_grads=True,
        )
        with torch.no_grad():  # torch 2.8 refuses to change a view that was made without gradients
            for sum_, t, part in zip(torch.split(product, sizes), objective.T, parts, strict=True):
                sum_.view_as(t).addcmul_(t, real(part), value=share)
        return product

    def inner(self, vectors: Tensor, vector: Tensor) -> Tensor:
        """Inner products (K,); all processes get those of the first, so that all decide alike what to do next."""
        return self.objective.of_first_process(inner(vectors, vector))

    def normal(self) -> Tensor:
        """A vector (P,) of independent standard normals."""
        return torch.randn(self.size, generator=self.generator, dtype=self._dtype, device=self.device)

    def signs(self) -> Tensor:
        """A vector (P,) of independent signs, 1 or -1."""
        bits = torch.randint(2, (self.size,), generator=self.generator, dtype=torch.int8, device=self.device)
        return bits.to(self._dtype).mul_(2).sub_(1)

    def check_symmetric(self) -> None:
        r"""Compares $a^\top H b$ with $b^\top H a$ for a and b of independent standard normals.

        Their difference has the root mean square $\|H - H^\top\|_F$, since $E[(a^\top M b)^2] = \|M\|_F^2$ for
        every M, and $\|H a\|$ has $\|H\|_F$.

        Raises:
            CurvatureError: If the difference is not small against $\|H a\|$, or if H is not finite.
        """
        a, b = self.normal(), self.normal()
        Ha, Hb = torch.zeros_like(a), torch.zeros_like(b)
        for share, gradient in self.gradients():
            self.add_product(Ha, gradient, a, share)
            self.add_product(Hb, gradient, b, share)
        self.objective.sum_over_processes([Ha, Hb])
        aHb, bHa, square = (float(self.inner(x[None], y)) for x, y in ((a, Hb), (b, Ha), (Ha, Ha)))
        if not all(map(isfinite, (aHb, bHa, square))):
            raise CurvatureError("the Hessian is not finite: the loss or its gradient overflows at these weights.")
        if abs(aHb - bHa) > _ASYMMETRY * sqrt(square):
            raise CurvatureError(
                f"torch's second derivatives of this network are wrong: a^T H b = {aHb:.6g} and b^T H a = {bHa:.6g} "
                "for random a and b, which are equal for every Hessian H. weight_norm is known for it: remove it from "
                "the layers that have it (torch.nn.utils.parametrize.remove_parametrizations), or measure "
                "worst_case_sharpness and average_case_sharpness, which need no second derivatives."
            )


@contextmanager
def hessian_of(
    network: nn.Module, loss: Loss, batches: Iterable[Any], scale: Adaptive | None, batch_norm: BatchNorm, seed: int
) -> Iterator[Hessian]:
    """The checked Hessian of all processes' data; the network is as before when the context is left."""
    # The fused kernels of attention have no second derivatives.
    with objective_of(network, loss, batches, scale, batch_norm, seed) as objective, sdpa_kernel(SDPBackend.MATH):
        hessian = Hessian(objective, seed)
        hessian.check_symmetric()
        yield hessian
