"""Where training goes on from a checkpoint, and with which radius."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn


def go_on_with_the_next_epoch(checkpoint: dict[str, Any], max_epochs: int | None, max_steps: int) -> None:
    """Makes Lightning go on with the next epoch behind one that has ended, also if `max_steps` is set.

    With `max_steps` Lightning takes a finished epoch for an open one, and either trains it once more or not at all:
    the state is written here as one in which the next epoch begins. An epoch that was cut short, by `max_steps`,
    `max_time` or an early stop, has ended, too: what was left of it is not caught up, and a warning says so.

    Args:
        checkpoint: What is resumed from, changed in place.
        max_epochs: The trainer's; `None` or -1: no limit.
        max_steps: The trainer's; -1: no limit.
    """
    fit = checkpoint["loops"]["fit_loop"]
    epochs, batches = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
    steps = fit["epoch_loop.state_dict"].get("_batches_that_stepped", 0)
    has_ended = epochs["current"]["processed"] == epochs["current"]["ready"]
    if not has_ended or not steps:
        return
    is_done = steps >= max_steps if max_steps != -1 else epochs["current"]["processed"] >= (max_epochs or 0) > 0
    if not batches["is_last_batch"] and not is_done:
        rank_zero_warn(
            f"this checkpoint's run was ended within epoch {epochs['current']['processed']}, after "
            f"{batches['current']['processed']} of its batches: the rest of that epoch is left out, and training goes "
            "on with the next one."
        )
    if max_steps == -1:
        return
    for count in (epochs["total"], epochs["current"]):
        count["completed"] = count["processed"]
    if not is_done:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


def tell_of_other_radii(asked: list[float], restored: list[float]) -> None:
    """Warns where a checkpoint has brought other radii than the module and its callback asked for."""
    if {*asked} != {*restored}:  # a finetuning adds groups
        in_checkpoint, here = (", ".join(f"{rho:g}" for rho in dict.fromkeys(radii)) for radii in (restored, asked))
        rank_zero_warn(
            f"rho is {in_checkpoint} in the checkpoint and {here} here: training goes on with the checkpoint's. For "
            "another one start a new training, or set it in the optimizer's param_groups."
        )
