"""What a method gives: its displacement, and where it needs more, what descends and what is remembered."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sam_lightning.optim.step_state import StepState


class Method(ABC):
    """The hooks that the shell calls, and what they may read.

    Attributes:
        needs_first_gradient: Whether the displacement is made of the gradient at w; else there is one pass.
        keeps_first_gradient: Whether a copy of it is kept for `descent` and `remember`.
        needs_mean_gradient: Whether it must be the mean over all processes, which would drift apart otherwise.
        memory: The name in the state of what lasts from step to step, one tensor per parameter; "": nothing does.
    """

    needs_first_gradient: ClassVar[bool] = True
    keeps_first_gradient: ClassVar[bool] = False
    needs_mean_gradient: ClassVar[bool] = False
    memory: ClassVar[str] = ""

    state: Any
    _now: StepState

    @abstractmethod
    def displacement(self, weights: list[Tensor], grads: list[Tensor]) -> Sequence[Tensor]:
        """The displacement e for rho = 1, in the simplest case where the linearised loss is largest in the unit ball.

        Args:
            weights: The perturbed parameters themselves, w.
            grads: Their gradients at w, of the same shapes, times `loss_scale`; neither list may be changed. Empty
                if `needs_first_gradient` is False.

        Returns:
            One tensor per weight, as a list, `Scaled` or `Deferred`; the weights move to w + rho * e, rho being their
            group's.
        """

    @property
    def blend(self) -> tuple[float, float]:
        """(a, b): a times the gradient at w plus b times the one at w + e descends."""
        return (0.0, 1.0)

    def descent(  # noqa: B027  # most methods need none
        self, weights: list[Tensor], first: list[Tensor] | None, grads: list[Tensor]
    ) -> None:
        """Changes `grads` in place into what descends, at w, before unscaling and clipping.

        Args:
            weights: The parameters that have a gradient, perturbed or not; in a step that perturbs and keeps the
                first gradient those that have one in both passes.
            first: Copies of the gradients at w, for any use; `remember` gets what is left in them. `None` in a
                step that does not perturb, or if `keeps_first_gradient` is False.
            grads: The gradients that the last pass left.
        """

    def remember(self, memory: list[Tensor], first: list[Tensor]) -> None:  # noqa: B027  # as above
        """Renews `memory` in place after the base's step, if that was perturbed; `first` as `descent` left it."""

    def recall(self, weights: list[Tensor]) -> list[Tensor]:
        """The memory of each of the weights, zeros where there is none yet; not to be changed."""
        found = [self.state.get(weight, {}).get(self.memory) for weight in weights]
        return [torch.zeros_like(w) if m is None else m for w, m in zip(weights, found, strict=True)]

    def movable(self, params: list[Tensor]) -> list[Tensor]:
        """Those that are among the weights of `displacement`: by default, those that have a gradient."""
        return [p for p in params if p.grad is not None]

    @property
    def loss_scale(self) -> float | Tensor:
        """What the gradients of this step are multiplied by; a memory must not contain it."""
        return self._now.loss_scale
