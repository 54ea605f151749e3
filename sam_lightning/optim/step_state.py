"""What an optimizer keeps while it works: copies of the weights, and how far the step has come."""

from dataclasses import dataclass, field

from torch import Tensor

from sam_lightning.optim.blend import Blend
from sam_lightning.replay import Replay
from sam_lightning.tensors.copies import Copies


@dataclass
class StepState:
    """What an optimizer keeps while it works; no checkpoint has it, and a copy of the optimizer begins without it.

    An object of its own: Lightning's wrapper reads attributes of the optimizer, but keeps those that it is assigned.

    Attributes:
        is_perturbed: Whether the weights are at w + e.
        has_ascended: Whether `perturbed()` has been left without an error since the last step.
        has_warned: Whether the user has been told of steps without `perturbed()`.
        knows_rounding: Whether a displacement was compared with what half precision leaves of it.
        loss_scale: What the gradients of this step are multiplied by.
        blend: The mixture of both gradients that is under way, if it is one.
        both: Parameters with a gradient in both passes, and what `descent` left in the copies of the first one.
        replay: What makes the second pass the same function as the first, for `passes`, and for which model.
        weights: Copies of the weights at w, whose memory is used again in the next step.
        gradients: Copies of the gradients at w, likewise.
    """

    is_perturbed: bool = False
    has_ascended: bool = False
    has_warned: bool = False
    knows_rounding: bool = False
    loss_scale: float | Tensor = 1.0
    blend: Blend | None = None
    both: tuple[list[Tensor], list[Tensor]] | None = None
    replay: tuple[tuple[int, str], Replay] | None = None
    weights: Copies = field(default_factory=Copies)
    gradients: Copies = field(default_factory=Copies)

    def free(self) -> None:
        """Forgets all copies."""
        self.weights, self.gradients, self.replay = Copies(), Copies(), None
