"""A module's training loss as a function of a batch, for measures: it logs nothing and leaves no trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from sam_lightning.replay.batch_copies import rebuilt
from sam_lightning.replay.module_state import ModuleState
from sam_lightning.replay.random_states import random_states, set_random_states
from sam_lightning.training.step_logs import StepLogs


@contextmanager
def measured_loss(module: LightningModule) -> Iterator[Callable[[Any], Tensor]]:
    """Gives the loss that `module.training_step` computes of a batch.

    Every call draws the same random numbers, so that the loss is a function of the weights. Afterwards all is as
    before: metrics, counters, lists, buffers and random states.

    Args:
        module: Any LightningModule with a `training_step` that returns its loss, or a dictionary with it.

    Raises:
        TypeError: In a call, if `training_step` returns no loss.
    """
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    state = ModuleState(module, lambda: (p for p in module.parameters() if p.requires_grad))
    random_before = random_states()
    state.take()
    logs = StepLogs(module._trainer, module)
    vars(module)["_is_measured"] = True

    def loss(batch: Any) -> Tensor:
        random_now = random_states()
        set_random_states(random_before)
        copied = rebuilt(batch, torch.clone)
        output = module.training_step(copied, 0) if takes_index else module.training_step(copied)
        state.restore_attributes()
        set_random_states(random_now)
        found = output["loss"] if isinstance(output, dict) else output
        if not isinstance(found, Tensor):
            name = type(module).__name__
            raise TypeError(f"{name}.training_step must return its loss to be measured, got {type(found).__name__}.")
        return found

    try:
        with logs.silent():
            yield loss
    finally:
        vars(module).pop("_is_measured", None)
        logs.remove()
        state.rewind()
        set_random_states(random_before)
