"""The perturbation: save the weights, move them, put them back, and make what descends."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sam_lightning.optim.blend import Blend
from sam_lightning.optim.gradients import dense, gradients, refuse_sparse
from sam_lightning.optim.method import Method
from sam_lightning.optim.parameter_groups import RadiusGroups
from sam_lightning.optim.rounding import is_rounded, warn_of_rounding
from sam_lightning.tensors.copies import copy
from sam_lightning.tensors.shards import local_parts
from sam_lightning.tensors.vectors import add_


class Perturbation(Method, RadiusGroups):
    """What happens between the first gradient and the step."""

    every: int

    def will_perturb(self) -> bool:
        """Whether the next `perturbed()` wants a gradient computed inside; known before the first pass.

        Read on the host from what is the same in every process.
        """
        if not self.needs_first_gradient:
            return True
        is_due = self.steps % self.every == 0 and self.blend[1] != 0
        return is_due and any(self.radius(group) > 0 for group in self.param_groups)

    @contextmanager
    def perturbed(self, loss_scale: float | Tensor = 1.0) -> Iterator[bool]:
        """Moves the weights to w + e, and on leaving back to w, bit for bit, whatever happens inside.

        Gives whether a gradient is to be computed inside: not where every rho is 0, nor between the steps of
        `every`. To compute one all the same, at w, changes nothing. Nothing moves where the gradient is zero or not
        finite. The gradients are left as they are: call `zero_grad()` inside before the second backward pass. A
        module under FSDP2 keeps the weights that it gathered in a forward pass until a backward pass: after one
        without the other call its `reshard()`.

        Args:
            loss_scale: What the loss is multiplied by (`GradScaler.get_scale()`). Needed by methods with a memory and
                by those whose e grows with the gradient.

        Raises:
            RuntimeError: If entered while perturbed, if no parameter has a gradient, or if one is sparse.
        """
        self._check("perturbed()")
        now, perturbs = self._now, self.will_perturb()
        groups = self._groups_to_move() if perturbs else []
        with_first = self._with_gradient()
        if self.needs_first_gradient and not with_first:
            raise RuntimeError("no parameter has a gradient: call backward() before perturbed().")
        kept = dense(with_first) if perturbs and self.keeps_first_gradient else None
        first = None if kept is None else now.gradients.take(gradients(kept))
        parts = local_parts([weight for _, group in groups for weight in group])
        saved = now.weights.take(parts)
        now.loss_scale, now.both = loss_scale, None
        a, b = self.blend
        try:
            now.is_perturbed = True
            now.blend = Blend(a, b, with_first) if perturbs and a != 0 else None
            self._move(groups, saved)
            yield perturbs
            if now.blend is not None:
                now.blend.finish(self._with_gradient())
        finally:
            copy(saved, parts)
            torch.clear_autocast_cache()
            now.is_perturbed, now.blend = False, None
        self._combine(kept, first)
        now.has_ascended = True

    def _groups_to_move(self) -> list[tuple[float, list[Tensor]]]:
        """(signed radius, parameters that can move) for every group with a radius."""
        groups = []
        for group in self.param_groups:
            rho = self.radius(group)
            weights = self.movable(group["params"]) if rho > 0 else []
            if not weights:
                continue
            if self.needs_first_gradient:
                refuse_sparse(weights)
                rho = -rho if group.get("maximize") else rho  # the base minimises -L
            groups.append((rho, weights))
        return groups

    @torch.no_grad()
    def _move(self, groups: list[tuple[float, list[Tensor]]], saved: list[Tensor]) -> None:
        weights = [weight for _, group in groups for weight in group]
        if not weights:
            return
        e = self.displacement(weights, gradients(weights) if self.needs_first_gradient else [])
        now = self._now
        now.knows_rounding = now.knows_rounding or not is_rounded(weights)
        wanted = [] if now.knows_rounding else list(e)  # before the weights move, of which it may be made
        rest = e
        for rho, group in groups:  # in the order of weights
            add_(group, rest[: len(group)], rho)
            rest = rest[len(group) :]
        torch.clear_autocast_cache()  # autocast keeps copies of the weights, and does not see that they moved
        if not now.knows_rounding:
            radii = [rho for rho, group in groups for _ in group]
            moved, wanted = local_parts(weights), local_parts(wanted)
            now.knows_rounding = warn_of_rounding(type(self).__name__, saved, moved, wanted, radii)

    @torch.no_grad()
    def _combine(self, kept: list[Tensor] | None, first: list[Tensor] | None) -> None:
        """Makes what descends; where a gradient exists in one pass only, what the second pass left stands."""
        if type(self).descent is Method.descent and first is None:
            return
        weights = dense(self._with_gradient())
        if kept is not None and first is not None:
            now_too = set(weights)
            pairs = [(w, f) for w, f in zip(kept, first, strict=True) if w in now_too]
            weights, first = [w for w, _ in pairs], [f for _, f in pairs]
            self._now.both = weights, first
        self.descent(weights, first, gradients(weights))

    def _with_gradient(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients; inside `perturbed()` it leaves the first one's share in a `blend`."""
        if self._now.blend is None:
            super().zero_grad(set_to_none)
        else:
            self._now.blend.keep(self._with_gradient())

    def free_copies(self) -> None:
        """Gives up the memory of copies that are kept from step to step; the next step takes it anew."""
        self._now.free()

    def _check(self, what: str) -> None:
        if self._now.is_perturbed:
            raise RuntimeError(f"{what} while the weights are perturbed: leave `with perturbed():` first.")
