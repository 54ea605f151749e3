"""Norms over many tensors, and additions of strided ones."""

import pytest
import torch

from sam_lightning.tensors import norms
from sam_lightning.tensors.vectors import Scaled, add_


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    value = norms.global_norm([torch.full((1000,), 3e4, dtype=dtype), torch.full((1000,), 3e4, dtype=dtype)])
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(torch.tensor(3e4, dtype=dtype).item() * 2000**0.5, rel=1e-6)


def test_addition_looks_at_strides():
    """A transposed memory beside a contiguous weight, as after a change of layout."""
    target, vector = torch.zeros(2, 3), torch.arange(6.0).reshape(3, 2).t()
    add_([target], Scaled([vector], torch.tensor(1.0)), 1.0)
    assert torch.equal(target, vector)


@pytest.mark.parametrize("shape", [(70, 60, 8, 8), (70, 60, 1, 65), (300_000,)])
def test_a_long_tensor_is_cut_without_a_copy(shape):
    tensor = torch.randn(shape)
    layouts = [tensor, tensor.t()] if tensor.ndim < 3 else [tensor, tensor.to(memory_format=torch.channels_last)]
    for laid in layouts:
        pieces = norms._pieces([laid])
        assert len(pieces) == 2
        assert pieces[0].data_ptr() == laid.data_ptr()
        assert torch.cat(pieces).norm().item() == pytest.approx(laid.norm().item(), rel=1e-5)
