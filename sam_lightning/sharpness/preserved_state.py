"""Measuring leaves no trace: what is changed to measure a network is restored."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from sam_lightning.sharpness.batches import HALF

BatchNorm: TypeAlias = Literal["running", "batch"]


@contextmanager
def preserved_state(network: nn.Module, batch_norm: BatchNorm = "running", seed: int = 0) -> Iterator[None]:
    """Inside, the network is in evaluation mode and in single precision or better; afterwards it is as before.

    On leaving, also by an exception, every parameter and buffer has its value bit for bit, every module its mode, and
    the random states of torch on the CPU and on the network's devices are what they were. `.grad` is not protected:
    what is measured by `torch.autograd.grad` never touches it.

    Inside, float16 and bfloat16 parameters and buffers are float32, since half precision rounds a small displacement
    away, and autocast is off, since it would go on using copies of weights that have moved.

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
    storages = [tensor.data for tensor in tensors]
    values = [None if tensor.dtype in HALF else tensor.detach().clone() for tensor in tensors]
    modes = [(module, module.training) for module in network.modules()]
    tracking = [(m, m.track_running_stats) for m in network.modules() if hasattr(m, "track_running_stats")]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device in {"cpu", *(tensor.device.type for tensor in tensors)}:
                stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(_without_fast_path())
            if any(isinstance(module, nn.RNNBase) for module in network.modules()):
                stack.enter_context(_without_cudnn())
            if any(module._compiled_call_impl is not None for module in network.modules()):
                # Compiled code has no second derivatives. Only then: what compiles takes seconds to import.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(seed)
            for tensor in tensors:
                if tensor.dtype in HALF:
                    tensor.data = tensor.data.float()
            network.eval()
            if batch_norm == "batch":
                for module, _ in tracking:
                    # In training mode without running statistics to update, which functional transforms forbid.
                    module.training, module.track_running_stats = True, False  # type: ignore[assignment]
            yield
    finally:
        with torch.no_grad():
            for tensor, storage, before in zip(tensors, storages, values, strict=True):
                if before is None:
                    tensor.data = storage  # never written to
                else:
                    _without_repeats(tensor, like=tensor).copy_(_without_repeats(before, like=tensor))
        for module, training in modes:
            module.training = training
        for module, tracks in tracking:
            module.track_running_stats = tracks


def _without_repeats(tensor: Tensor, like: Tensor) -> Tensor:
    """The part with every entry of `like` once: torch writes to no view that `expand` made, whose stride is 0."""
    for dim, stride in enumerate(like.stride()):
        if stride == 0 and tensor.size(dim) > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Transformer layers compute the same with and without gradients.

    Their fast path, for evaluation without gradients, rounds otherwise and gives padded positions another output.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """CuDNN's recurrent layers have no gradient in evaluation mode and no second derivatives; torch's own have."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
