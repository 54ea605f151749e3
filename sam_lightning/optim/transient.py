"""What lives from a perturbation to the step after it: copies of the weights, and how far things have come."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sam_lightning.optim.blend import Blend
from sam_lightning.replay import Replay
from sam_lightning.tensors.shards import local_parts


class Copies:
    """Copies of tensors, in the same memory every time: fresh memory costs more than the copying."""

    def __init__(self) -> None:
        self._like: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def take(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of `tensors`, good until the next call; sharded ones stay sharded."""
        like = [(t.shape, t.dtype, t.device) for t in tensors]
        if self._like != like:
            self._like, self._copies = like, [torch.empty_like(t) for t in tensors]
        copy(tensors, self._copies)
        return self._copies


@torch.no_grad()
def copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copies in place: a sharded weight that is given other storage is not the one that its module gathers.

    Part by part: torch has no rule for copying lists of sharded tensors.
    """
    if targets:
        torch._foreach_copy_(local_parts(targets), local_parts(sources))


@dataclass
class Transient:
    """What lives between two steps at most.

    An object of its own: Lightning's optimizer wrapper reads attributes through to the optimizer, but
    what is assigned to the wrapper stays there.

    Attributes:
        is_perturbed: Whether the weights are at w + e.
        has_ascended: Whether `perturbed()` has been left without an error since the last step.
        has_warned: Whether the user has been told of steps without `perturbed()`.
        loss_scale: What the gradients of this step are multiplied by.
        blend: The mixture of both gradients that is under way, if it is one.
        both: Parameters with a gradient in both passes, and what `descent` left in the copies of the first one.
        replay: What makes the second pass the same function as the first, for `passes`, and for which model.
        weights: Memory for the weights at w.
        gradients: Memory for the gradients at w.
    """

    is_perturbed: bool = False
    has_ascended: bool = False
    has_warned: bool = False
    loss_scale: float | Tensor = 1.0
    blend: Blend | None = None
    both: tuple[list[Tensor], list[Tensor]] | None = None
    replay: tuple[tuple[int, str], Replay] | None = None
    weights: Copies = field(default_factory=Copies)
    gradients: Copies = field(default_factory=Copies)
