"""Whether a forward pass updates the running statistics of normalisation layers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
    owners = [
        (layer, name)
        for layer in module.modules()
        for name, buffer in layer.named_buffers(recurse=False)
        if name.startswith("running_") or name == "num_batches_tracked"
    ]

    def current() -> list[Tensor]:
        return [layer.get_buffer(name) for layer, name in owners]

    with torch.no_grad():
        saved = [buffer.clone() for buffer in current()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(current(), saved, strict=True):
                buffer.copy_(before)
