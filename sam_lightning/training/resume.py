"""What a checkpoint says of Lightning's loops, and where training can go on from it."""

from typing import Any

from sam_lightning.runs.directory import CheckpointError


def prepare_resume(checkpoint: dict[str, Any], max_epochs: int | None, max_steps: int) -> None:
    """Makes Lightning go on with the next epoch behind a finished one, also if `max_steps` is set.

    With `max_steps` Lightning takes a finished epoch for an open one, and either trains it once more or not at all:
    the state is written here as one in which the next epoch begins.

    Args:
        checkpoint: What is resumed from, changed in place.
        max_epochs: The trainer's; `None` or -1: no limit.
        max_steps: The trainer's; -1: no limit.

    Raises:
        CheckpointError: If it was saved where Lightning would lose a part of the epoch unseen.
    """
    fit = checkpoint["loops"]["fit_loop"]
    epochs, batches = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
    is_over = epochs["current"]["processed"] == epochs["current"]["ready"]
    if not is_over and batches["is_last_batch"]:
        raise CheckpointError(
            "this checkpoint was saved behind an epoch's last batch and before the epoch's end, whose validation, "
            "schedules and logs would be left out. Resume from one of an epoch's end (last.ckpt) or from its middle."
        )
    if not is_over:
        return
    steps = fit["epoch_loop.state_dict"]["_batches_that_stepped"]
    is_done = steps >= max_steps if max_steps != -1 else epochs["current"]["processed"] >= (max_epochs or 0) > 0
    if not batches["is_last_batch"] and not is_done:
        raise CheckpointError(
            f"this checkpoint's run was ended within an epoch, after {steps} steps, by max_steps or an early stop; the "
            "rest of that epoch cannot be caught up. Start a longer run anew, without a checkpoint."
        )
    if max_steps != -1:
        for count in (epochs["total"], epochs["current"]):
            count["completed"] = count["processed"]
        if not is_done:
            batches["current"] = dict.fromkeys(batches["current"], 0)
            batches["is_last_batch"] = False
