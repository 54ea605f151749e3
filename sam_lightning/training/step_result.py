"""What the passes of one batch came to."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class StepResult:
    """What the passes of one batch came to; tensors stay on their device."""

    loss: Tensor | None = None  # at w
    loss_perturbed: Tensor | None = None  # at w + e
    grad_norm: Tensor | None = None  # ||g|| at w, before clipping; in steps that are logged

    @property
    def passes(self) -> int:
        """The number of gradients."""
        return (self.loss is not None) + (self.loss_perturbed is not None)
