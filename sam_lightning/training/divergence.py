"""Ends a training whose weights are not finite, before a checkpoint of them takes the place of a good one."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from sam_lightning.tensors.shards import local_parts


class DivergedError(ArithmeticError):
    """Weights that are not finite: nothing that training could still save would be of use."""


@torch.no_grad()
def refuse_diverged(weights: Iterable[Tensor], epoch: int, step: int) -> None:
    """Looks at the weights, not at a loss: in data-parallel training all processes come to the same answer.

    Args:
        weights: What the optimizer moves. Frozen parameters may hold what they like, such as a mask of -inf.
        epoch: The current epoch, from 0, for the message.
        step: Optimizer steps so far, for the message.

    Raises:
        DivergedError: If any of the weights is not finite.
    """
    numbers = [weight.detach() for weight in weights if weight.is_floating_point() or weight.is_complex()]
    parts = [part for part in local_parts(numbers) if part.numel()]
    norms = torch._foreach_norm(parts, math.inf)  # a sum of squares may overflow
    largest = [norm.to(parts[0].device, torch.float32) for norm in norms]
    is_finite = torch.stack(largest).isfinite().all() if parts else torch.tensor(True)
    if any(hasattr(number, "to_local") for number in numbers):  # each process has looked at its own shards
        flag = is_finite.float().to(numbers[0].device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        is_finite = flag.bool()
    if is_finite:
        return
    raise DivergedError(
        f"training diverged: the weights are not finite in epoch {epoch + 1}, step {step}. Lower the learning rate or "
        "rho, set the trainer's gradient_clip_val, or look for data that are not finite. The checkpoints of earlier "
        "epochs are as they were."
    )
