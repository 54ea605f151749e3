"""MSAM: momentum is the direction, so one pass is enough."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sam_lightning.optim.parameter_groups import BaseOptimizer, Params
from sam_lightning.optim.sharpness_aware import SharpnessAware
from sam_lightning.tensors.norms import global_norm, reciprocal
from sam_lightning.tensors.vectors import Scaled


class MSAM(SharpnessAware):
    r"""Momentum-SAM: $e = -\rho \, v / \|v\|$ with v the base's momentum before this step's gradient.

    v is `momentum_buffer` or, in the Adam family, `exp_avg`. The weights go along -v next: e looks ahead. Under a
    warm-up of the learning rate the authors keep rho at 0. The first step has no momentum and moves nothing.

        with optimizer.perturbed():                    # w + e
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()            # the only gradient
        optimizer.step()

    State: none beside the base's. Cost: one pass; one copy of the weights. Normalisation layers and logs see w + e.

    Args:
        params: Parameters, `(name, parameter)` pairs, or group dictionaries.
        base: The optimizer that descends, with momentum; a class or a callable that makes one from parameters.
        rho: Radius in weight space, L2, at least 0; about ten times SAM's.
        base_options: Options of `base`.

    Raises:
        RuntimeError: From the second step on, in `perturbed()` and `will_perturb()`, if the base has no momentum.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = MSAM([weight], torch.optim.SGD, lr=1.0, momentum=0.9, rho=0.5)
        >>> for step in range(2):
        ...     with optimizer.perturbed():
        ...         seen = weight.detach().clone()
        ...         optimizer.zero_grad()
        ...         weight.square().sum().div(2).backward()
        ...     optimizer.step()
        >>> seen  # w was 0 and v was (3, 4)
        tensor([-0.3000, -0.4000])

    Reference:
        Becker, Altrock, Risse. Momentum-SAM: Sharpness Aware Minimization without Computational Overhead.
        arXiv 2401.12033, algorithm 1.

    Differs from the paper's code in: weights between steps are w, not w + e, so checkpoints and evaluation need no
    care; they are put back bit for bit; weight decay acts at w; groups may have their own rho.
    """

    needs_first_gradient = False

    def __init__(self, params: Params, base: BaseOptimizer, rho: float = 3.0, **base_options: Any) -> None:
        if base_options.pop("every", 1) != 1:
            raise ValueError("MSAM takes no `every`: it has one pass in every step, which could not be left out.")
        super().__init__(params, base, rho, **base_options)

    def displacement(self, weights: list[Tensor], grads: list[Tensor]) -> Sequence[Tensor]:
        """Gives -v / ||v||."""
        v = [momentum for weight in weights if (momentum := self._momentum(weight)) is not None]
        factor = reciprocal(global_norm(v))
        return Scaled(v, -factor)

    def movable(self, params: list[Tensor]) -> list[Tensor]:
        """Those for which the base has momentum."""
        return [p for p in params if self._momentum(p) is not None]

    def will_perturb(self) -> bool:
        """True: the gradient is always computed inside."""
        moving = [p for group in self.param_groups if self.radius(group) > 0 for p in group["params"]]
        if self.steps > 0 and moving and not self.movable(moving):
            raise RuntimeError(
                f"MSAM goes along its base's momentum, and {type(self.base).__name__} has none: set its momentum, or "
                "take a base with momentum_buffer or exp_avg in its state."
            )
        return True

    def _momentum(self, weight: Tensor) -> Tensor | None:
        state = self.state.get(weight, {})
        momentum: Tensor | None = state.get("momentum_buffer", state.get("exp_avg"))
        return momentum
