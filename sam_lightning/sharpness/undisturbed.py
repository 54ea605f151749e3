"""A network that is measured is afterwards as it was."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, TypeAlias

import torch
from torch import nn

BatchNorm: TypeAlias = Literal["running", "batch"]


@contextmanager
def undisturbed(network: nn.Module, batch_norm: BatchNorm = "running", seed: int = 0) -> Iterator[None]:
    """In evaluation mode inside, with gradients and random numbers of `seed`; afterwards as before, bit for bit.

    On leaving, also by an exception, every parameter and buffer has its value, every module its mode, and the random
    states of torch on the CPU and on the network's devices are what they were. `.grad` is not protected: what is
    measured by `torch.autograd.grad` never touches it.

    Args:
        network: The network.
        batch_norm: What layers with running statistics normalise by: `running`, their running statistics, as in
            evaluation, which makes the loss of a sample independent of its batch; or `batch`, the statistics of
            each batch, as in training, which makes every measure depend on how the data are cut into batches.
        seed: Seed of the random numbers inside, at least 0.

    Raises:
        ValueError: If `batch_norm` is neither.
    """
    if batch_norm not in ("running", "batch"):
        raise ValueError(f"batch_norm must be 'running' or 'batch', got {batch_norm!r}.")
    tensors = [*network.parameters(), *network.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    modes = [(module, module.training) for module in network.modules()]
    tracking = [(m, m.track_running_stats) for m in network.modules() if hasattr(m, "track_running_stats")]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    try:
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            _not_compiled(network),
        ):
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(seed)
            network.eval()
            if batch_norm == "batch":
                for module, _ in tracking:
                    # In training mode without running statistics to update, which functional transforms forbid.
                    module.training, module.track_running_stats = True, False  # type: ignore[assignment]
            yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, saved, strict=True):
                tensor.copy_(before)
        for module, training in modes:
            module.training = training
        for module, tracks in tracking:
            module.track_running_stats = tracks


def _not_compiled(network: nn.Module) -> AbstractContextManager[None]:
    """A compiled network has no second derivatives: inside it runs as it is."""
    if any(module._compiled_call_impl is not None for module in network.modules()):
        eager: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return eager
    return nullcontext()  # what compiles takes seconds to import
