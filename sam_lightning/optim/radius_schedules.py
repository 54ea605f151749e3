"""Schedules of the radius: functions of training's progress, without a state, so that a resumed run goes on exactly.

A schedule gives a factor of each group's own rho. In plain PyTorch:

    rho = optimizer.param_groups[0]["rho"]
    for step in range(total_steps):
        optimizer.param_groups[0]["rho"] = rho * schedule(Progress(step, total_steps))
        ...
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from sam_lightning.optim.checks import check_integer


@dataclass(frozen=True)
class Progress:
    """Where training is, before a step.

    Attributes:
        step: Steps taken.
        total_steps: Steps of the whole training; infinite where nobody knows.
        lr: The learning rate of the step.
        initial_lr: The learning rate that schedules take for 1: the largest one so far.
    """

    step: int
    total_steps: float = math.inf
    lr: float = 1.0
    initial_lr: float = 1.0


RadiusSchedule: TypeAlias = Callable[[Progress], float]


def late(start: float) -> RadiusSchedule:
    """Nothing before the share `start` of all steps is done, then the whole radius: SAM for the last steps only.

    Where the radius is 0 a step is the base's and takes one pass.

    Args:
        start: A share of the training, in [0, 1]; 0.9 is the last tenth.

    Example:
        >>> [late(0.5)(Progress(step, total_steps=4)) for step in range(4)]
        [0.0, 0.0, 1.0, 1.0]

    Reference:
        Zhou, Wang, Mao, Li. Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training.
        ICLR 2025. arXiv 2410.10373.
    """
    if not 0 <= start <= 1:
        raise ValueError(f"start must be a share of the training, from 0 to 1, got {start!r}.")
    return partial(_late, start)


def warm_up(steps: int, gradual: bool = True) -> RadiusSchedule:
    """Grows in equal parts from 0 to the whole radius in the first `steps` steps, or is 0 throughout them.

    Args:
        steps: Length of the warm-up, at least 1.
        gradual: Whether the radius grows; False keeps it at 0, which saves the second pass.

    Example:
        >>> [warm_up(2)(Progress(step)) for step in range(4)]
        [0.0, 0.5, 1.0, 1.0]
        >>> [warm_up(2, gradual=False)(Progress(step)) for step in range(4)]
        [0.0, 0.0, 1.0, 1.0]

    Reference:
        Becker, Altrock, Risse. Momentum-SAM. arXiv 2401.12033, appendix: without a radius during warm-up, SAM and
        MSAM train a ViT-S better.
    """
    check_integer("steps", steps)
    return partial(_warm_up, steps, gradual)


def follow_lr(lowest: float = 0.0) -> RadiusSchedule:
    r"""Follows the learning rate: $c + (1 - c) \, \mathrm{lr} / \mathrm{lr}_0$, as GSAM's authors have it.

    Args:
        lowest: c, the factor where the learning rate is 0, in [0, 1].

    Example:
        >>> follow_lr(lowest=0.5)(Progress(step=7, lr=0.5, initial_lr=1.0))
        0.75

    Reference:
        Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. ICLR 2022. arXiv 2203.08065,
        section 4.
    """
    if not 0 <= lowest <= 1:
        raise ValueError(f"lowest must be a factor from 0 to 1, got {lowest!r}.")
    return partial(_follow_lr, lowest)


# Functions of the module, not of a call: they can be pickled with what holds them.


def _late(start: float, progress: Progress) -> float:
    if progress.total_steps == math.inf:
        raise ValueError("late() needs to know how long training is: set max_epochs or max_steps, not only max_time.")
    return float(progress.step >= start * progress.total_steps - 1e-6)  # 0.7 * 10 is a little more than 7


def _warm_up(steps: int, gradual: bool, progress: Progress) -> float:
    done = min(progress.step / steps, 1.0)
    return done if gradual else float(done == 1)


def _follow_lr(lowest: float, progress: Progress) -> float:
    if not progress.initial_lr > 0:
        raise ValueError(f"initial_lr must be > 0, got {progress.initial_lr!r}.")
    return lowest + (1 - lowest) * progress.lr / progress.initial_lr


def follow_schedule(optimizer: Any, schedule: RadiusSchedule, step: int, total_steps: float) -> None:
    """Sets every group's radius to its own times the schedule's factor.

    A group's own radius is kept in it as `initial_rho`, as learning rate schedulers keep `initial_lr`: a resumed run
    finds it in the checkpoint.

    Args:
        optimizer: A sharpness-aware optimizer.
        schedule: Gives the factor, at least 0.
        step: Steps taken.
        total_steps: Steps of the whole training.
    """
    for group in optimizer.param_groups:
        own = group.setdefault("initial_rho", optimizer.radius(group))
        lr = float(group.get("lr", 1.0))
        # A cycle begins with its lowest rate, and a warm-up may be anybody's: the largest so far counts.
        known = (group.get(key, 0.0) for key in ("max_lr", "initial_lr", "peak_lr"))
        group["peak_lr"] = max(lr, *map(float, known))
        group[optimizer.radius_key] = own * schedule(Progress(step, total_steps, lr, group["peak_lr"]))


def end_schedule(optimizer: Any) -> None:
    """Gives every group its own radius back, which a schedule may have left at another value in a checkpoint."""
    for group in optimizer.param_groups:
        if "initial_rho" in group:
            group[optimizer.radius_key] = group.pop("initial_rho")
