"""All passes of one step in one call, for loops of one's own."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from sam_lightning.optim.gradients import gradients
from sam_lightning.replay import Replay
from sam_lightning.tensors.norms import global_norm

if TYPE_CHECKING:
    from sam_lightning.optim.sharpness_aware import SharpnessAware

Losses = Callable[[], Tensor | Iterable[Tensor]]


def run_passes(
    optimizer: "SharpnessAware",
    losses: Losses,
    backward: Callable[[Tensor], object] | None,
    model: nn.Module | None,
    scaler: torch.amp.GradScaler | None,
    second_pass: Literal["replay", "fresh"],
) -> Tensor:
    """What `SharpnessAware.passes` does and documents."""
    if second_pass not in ("replay", "fresh"):
        raise ValueError(f"second_pass must be 'replay' or 'fresh', got {second_pass!r}.")
    replay = _replay_of(optimizer, model, second_pass)

    def one_pass(factor: Tensor | None = None) -> Tensor:
        made = losses()
        total: list[Tensor] = []
        for loss in [made] if isinstance(made, Tensor) else made:
            total.append(loss.detach())
            scaled = loss if factor is None else loss * factor
            if backward is not None:
                backward(scaled)
            else:
                (scaled if scaler is None else scaler.scale(scaled)).backward()
        if not total:
            raise ValueError("losses() must return a loss or yield at least one, got none.")
        return torch.stack(total).sum()

    def loss_scale() -> Tensor | float:
        if scaler is None:
            return 1.0
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        return scaler.scale(torch.ones((), device=device))

    optimizer.zero_grad()
    if not optimizer.needs_first_gradient:
        with optimizer.perturbed(loss_scale=loss_scale()):
            optimizer.zero_grad()
            return one_pass()
    perturbs = optimizer.will_perturb()
    if perturbs:
        replay.begin()
    first = one_pass()
    # Under loss scaling an overflow in the first pass must skip the step, too.
    factor = None if scaler is None else 1 + 0 * global_norm(gradients(optimizer._with_gradient()))
    with optimizer.perturbed(loss_scale=loss_scale()) as computes:
        if computes:
            optimizer.zero_grad()
            with replay.again() if perturbs else nullcontext():
                one_pass(factor)
    return first


def _replay_of(optimizer: "SharpnessAware", model: nn.Module | None, second_pass: str) -> Replay:
    """The same one in every step: what it has learned of the model saves copies."""
    kept = optimizer._now.replay
    key = (id(model), second_pass)
    if kept is None or kept[0] != key:

        def trained() -> list[Tensor]:
            return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

        kept = optimizer._now.replay = key, Replay(model, trained, second_pass == "replay")
    return kept[1]
