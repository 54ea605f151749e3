"""The shell that every sharpness-aware optimizer shares: perturb, restore, descend."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_lightning.optim.shards import local_parts

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
BaseOptimizer: TypeAlias = Callable[[Params], Optimizer]


@dataclass
class _Transient:
    """What lives between two steps at most.

    An object of its own: Lightning's optimizer wrapper reads attributes through to the optimizer, but
    what is assigned to the wrapper stays there.
    """

    is_perturbed: bool = False
    has_ascended: bool = False  # since the last step
    has_warned: bool = False
    saved: list[Tensor] = field(default_factory=list)


class SharpnessAware(Optimizer, ABC):
    r"""Sharpness-aware minimization around any torch optimizer.

    Minimises the worst loss in a ball around the weights, $\min_w \max_{\|e\| \le \rho} L(w + e)$, by
    the gradient at $w + e$ instead of the gradient at $w$; the ball, and so $e$, is the variant's.

        loss_fn(model(x), y).backward()                # gradient at w
        with optimizer.perturbed():                    # w + e
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()            # gradient at w + e
        optimizer.step()                               # the base optimizer's step, at w
        optimizer.zero_grad()

    Parameter groups, state and state dict are the base optimizer's own objects, so that learning rate
    schedulers, checkpoints and warm-up act on the one truth. `rho` is a key of every parameter group:
    a group may bring its own, and a group with `rho=0` is not perturbed.

    A variant is one method, `displacement`.

    Args:
        params: Parameters, `(name, parameter)` pairs, or group dictionaries, as torch optimizers take them.
        base: Makes the optimizer that descends from `params`, such as
            `functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)`.
        rho: Radius of the ball in weight space (finite, at least 0).

    Raises:
        ValueError: If `rho` is negative or not finite.
        TypeError: If `base` is not a callable that returns a torch optimizer.
    """

    def __init__(self, params: Params, base: BaseOptimizer, rho: float) -> None:
        if not callable(base):  # an optimizer that is already built is not, either
            raise TypeError(
                "base must be a callable from parameters to a torch optimizer, such as "
                f"functools.partial(torch.optim.SGD, lr=0.1), got {type(base).__name__}."
            )
        self.rho = check_radius("rho", rho)
        self.base = base([self._with_rho(p) if isinstance(p, dict) else p for p in params])  # type: ignore[arg-type]
        if not isinstance(self.base, Optimizer) or isinstance(self.base, SharpnessAware):
            raise TypeError(f"base must return a plain torch optimizer, got {type(self.base).__name__}.")
        for group in self.base.param_groups:
            group.setdefault("rho", self.rho)
        self._now = _Transient()
        # Unpickling is torch's own way to equip an optimizer whose groups and state already exist; its
        # constructor would replace them.
        super().__setstate__({})

    @abstractmethod
    def displacement(self, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """The displacement e for rho = 1: the point of the unit ball where the linearised loss is largest.

        Args:
            weights: The perturbed parameters themselves, w.
            grads: Their gradients at w, of the same shapes; neither list may be changed.

        Returns:
            One tensor per weight; the weights move to w + rho * e, rho being their group's.
        """

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Moves the weights to w + e, and on leaving back to w, bit for bit, whatever happens inside.

        Nothing moves where the gradient is zero or not finite. The gradients are left as they are: call
        `zero_grad()` inside before the second backward pass. A module under FSDP2 keeps the weights that it
        gathered in a forward pass until a backward pass: after one without the other call its `reshard()`.

        Raises:
            RuntimeError: If entered while perturbed, if no parameter has a gradient, or if one is sparse.
        """
        self._refuse_if_perturbed("perturbed()")
        groups = self._perturbed_groups()
        weights = [weight for _, group in groups for weight in group]
        # In place: a sharded weight that is given other storage is not the one that its module gathers.
        # Part by part: torch has no rule for copying lists of sharded tensors.
        parts = local_parts(weights)
        saved = self._save(parts)
        try:
            self._now.is_perturbed = True
            self._ascend(groups, weights)
            yield
        finally:
            _copy(saved, parts)
            self._now.is_perturbed = False
        self._now.has_ascended = True

    def _save(self, parts: list[Tensor]) -> list[Tensor]:
        """Copies of the weights, since w + e - e is not w; fresh memory would cost more than the copying."""
        like = [(part.shape, part.dtype, part.device) for part in parts]
        if [(s.shape, s.dtype, s.device) for s in self._now.saved] != like:
            self._now.saved = [torch.empty_like(part) for part in parts]
        _copy(parts, self._now.saved)
        return self._now.saved

    @torch.no_grad()
    def _ascend(self, groups: list[tuple[float, list[Tensor]]], weights: list[Tensor]) -> None:
        grads = [weight.grad for weight in weights if weight.grad is not None]
        displacement = self.displacement(weights, grads) if weights else []
        for rho, group in groups:  # in the order of weights
            here, displacement = displacement[: len(group)], displacement[len(group) :]
            torch._foreach_add_(group, here, alpha=rho)

    def _perturbed_groups(self) -> list[tuple[float, list[Tensor]]]:
        """(rho, parameters with a gradient) for every group that is perturbed."""
        groups = []
        found = False
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            found = found or bool(weights)
            rho = check_radius("rho", group["rho"])
            if rho == 0 or not weights:
                continue
            groups.append((rho, weights))
            for weight in weights:
                if weight.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"sparse gradients cannot be perturbed, got one for a parameter of shape "
                        f"{tuple(weight.shape)}: make its layer with sparse=False, or give its group rho=0."
                    )
        if not found:
            raise RuntimeError("no parameter has a gradient: call backward() before perturbed().")
        return groups

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Descends: the base optimizer's step at w, with the gradients that are there.

        A closure is evaluated by the base optimizer, at w. It does not perturb: Lightning and GradScaler
        call `step` in ways in which a closure may not run the second pass.
        """
        self._refuse_if_perturbed("step()")
        if not (self._now.has_ascended or self._now.has_warned) and any(
            # A step at lr = 0 is torch.distributed.checkpoint's, by which it has state made to load into.
            group["rho"] > 0 and group.get("lr") != 0 and any(p.grad is not None for p in group["params"])
            for group in self.param_groups
        ):
            self._now.has_warned = True
            warnings.warn(
                f"{type(self).__name__}.step() without perturbed() before it is a plain "
                f"{type(self.base).__name__} step. Run the second backward pass inside "
                "`with optimizer.perturbed():` (in Lightning: subclass SharpnessAwareModule).",
                stacklevel=2,
            )
        self._now.has_ascended = False
        return self.base.step(closure)

    # The base optimizer owns groups, state and defaults.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # torch declares a plain attribute
        """The base optimizer's parameter groups."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, with this optimizer's `rho` where it brings none."""
        self._refuse_if_perturbed("add_param_group()")
        self.base.add_param_group(self._with_rho(param_group))

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict; there is no other state to save."""
        self._refuse_if_perturbed("state_dict()")
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer or of its plain base, which keeps the present `rho`."""
        self._refuse_if_perturbed("load_state_dict()")
        radii = [group["rho"] for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, rho in zip(self.param_groups, radii, strict=True):
            group.setdefault("rho", rho)

    def __getstate__(self) -> dict[str, Any]:
        return {"rho": self.rho, "base": self.base, "_now": _Transient()}

    def _with_rho(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "rho": check_radius("rho", group.get("rho", self.rho))}

    def _refuse_if_perturbed(self, what: str) -> None:
        if self._now.is_perturbed:
            raise RuntimeError(f"{what} while the weights are perturbed: leave `with perturbed():` first.")


def check_radius(name: str, value: float) -> float:
    """`value` if it is a finite number of at least 0, else a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")
    return float(value)


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
