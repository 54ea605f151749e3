"""Norms over many tensors, and the branch that never reads from the device, here run on the CPU."""

import math

import pytest
import torch

from sam_lightning.tensors import norms
from sam_lightning.tensors.vectors import Scaled, add_


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("bad", [None, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("in_place", [True, False])
def test_division_by_the_norm(monkeypatch, on_host, bad, in_place):
    monkeypatch.setattr(norms, "_is_on_host", lambda tensor: on_host)
    vectors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    if bad is not None:
        vectors[0][1] = bad
    before = [v.clone() for v in vectors]
    unit = norms.divide_by_norm(vectors, norms.global_norm(vectors), in_place=in_place)
    if not in_place:
        torch.testing.assert_close(vectors, before, equal_nan=True, rtol=0, atol=0)
    elif bad is None:
        assert all(a is b for a, b in zip(unit, vectors, strict=True))
    expected = [0.6, 0.0, 0.8] if bad is None else [0.0, 0.0, 0.0]
    assert torch.cat([u.flatten() for u in unit]).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("on_host", [True, False])
def test_zero_gives_zero(monkeypatch, on_host):
    monkeypatch.setattr(norms, "_is_on_host", lambda tensor: on_host)
    zeros = [torch.zeros(3)]
    assert norms.divide_by_norm(zeros, norms.global_norm(zeros))[0].tolist() == [0.0] * 3


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
