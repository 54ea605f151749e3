"""Whether a forward pass updates the running statistics of normalisation layers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sam_lightning.replay.module_state import is_running_statistic


@contextmanager
def frozen_running_stats(module: nn.Module) -> Iterator[None]:
    """Forward passes inside leave the running statistics of `module` as they were.

    SAM's second pass sees perturbed weights, whose activations should not enter the statistics that
    evaluation uses. Every buffer named `running_*` or `num_batches_tracked` is copied on entry and copied
    back on exit. Unlike switching layers' flags or their momentum, that covers layers of any class,
    `momentum=None`, nesting and exceptions, keeps NaN out, and does not make a compiled network recompile.

    Args:
        module: Network whose normalisation layers are protected.
    """
    saved = RunningStats(module)
    try:
        yield
    finally:
        saved.restore()


class RunningStats:
    """A copy of the running statistics of `module`, to be put back."""

    @torch.no_grad()
    def __init__(self, module: nn.Module) -> None:
        self._saved = [
            (layer, name, buffer.clone())
            for layer in module.modules()
            for name, buffer in layer.named_buffers(recurse=False)
            if is_running_statistic(name) and not is_lazy(buffer)
        ]

    @torch.no_grad()
    def restore(self, unless: Tensor | None = None) -> None:
        """Puts the copy back; with a 0-dimensional bool only where it is False, without a wait for the device."""
        for layer, name, before in self._saved:
            buffer = layer.get_buffer(name)
            buffer.copy_(before if unless is None else torch.where(unless, buffer, before))
