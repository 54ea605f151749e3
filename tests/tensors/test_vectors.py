"""Algebra over lists of tensors, with factors that the host knows and with those that it does not."""

import math

import pytest
import torch

from sam_lightning.tensors import norms, vectors
from sam_lightning.tensors.vectors import Scaled, add_, divide_by_norm, in_pieces, inner_product

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)


def make(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("factor", [0.37, -2.0, 0.0])
def test_targets_get_a_multiple_of_vectors(dtype, as_tensor, factor):
    targets, vectors = make(dtype, (3, 4), (5,), ()), make(dtype, (3, 4), (5,), ())
    before, given = [t.clone() for t in targets], [v.clone() for v in vectors]
    known = torch.tensor(factor, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    add_(targets, Scaled(vectors, known if as_tensor else factor), 0.5)
    exact = torch.float64 if dtype is not torch.complex64 else torch.complex128
    for t, b, v, g in zip(targets, before, vectors, given, strict=True):
        assert torch.equal(v, g)
        assert t.dtype is dtype
        torch.testing.assert_close(t.to(exact), b.to(exact) + 0.5 * factor * v.to(exact), rtol=1e-2, atol=1e-2)
        if factor == 0:
            assert torch.equal(t, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_factor_of_0_is_nothing_even_of_what_is_not_finite(dtype, as_tensor, bad):
    targets, vectors = make(dtype, (3,)), make(dtype, (3,))
    vectors[0][1] = bad
    before = targets[0].clone()
    scaled = Scaled(vectors, torch.tensor(0.0) if as_tensor else 0.0)
    add_(targets, scaled, 0.5)
    assert torch.equal(targets[0], before)
    assert scaled[0].abs().max() == 0


@pytest.mark.parametrize("as_tensor", [False, True])
def test_float16_takes_factors_beyond_its_range(as_tensor):
    targets, vectors = [torch.ones(3, dtype=torch.half)], [torch.full((3,), 1e-6, dtype=torch.half)]
    add_(targets, Scaled(vectors, torch.tensor(5e5) if as_tensor else 5e5), 1.0)
    assert targets[0].tolist() == pytest.approx([1 + vectors[0][0].item() * 5e5] * 3, rel=1e-3)


def test_a_scaled_list_is_a_list_of_products():
    vectors = make(torch.float64, (3,), (2, 2))
    scaled = Scaled(vectors, 0.25)
    assert len(scaled) == 2
    for product, vector in zip(scaled, vectors, strict=True):
        assert torch.equal(product, 0.25 * vector)
    assert torch.equal(scaled[1:][0], 0.25 * vectors[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_inner_products(dtype):
    a, b = make(dtype, (30, 4), (5,)), [t.flip(0) for t in make(dtype, (30, 4), (5,))]
    if dtype.is_complex:
        a, b = [t * (1 + 2j) for t in a], [t * (3 - 1j) for t in b]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = sum((u.to(wide) * v.to(wide).conj()).real.sum().item() for u, v in zip(a, b, strict=True))
    assert inner_product(a, b).item() == pytest.approx(exact, rel=1e-4)
    assert inner_product([], []).item() == 0.0


def test_half_products_neither_vanish_nor_overflow():
    for value in (1e-5, 3e2):
        x = [torch.full((100,), value, dtype=torch.half)]
        assert inner_product(x, x).item() == pytest.approx(100 * x[0][0].item() ** 2, rel=1e-4)


LIKE = {
    "dense": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1),
}


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_pieces_cover_every_entry_once_and_are_views(monkeypatch, like, count):
    monkeypatch.setattr(vectors, "_PIECE", 50)
    tensors = [LIKE[like](torch.zeros(2 + i, 3, 2, 2)) for i in range(count)]
    others = [LIKE[like](torch.randn(2 + i, 3, 2, 2)) for i in range(count)]
    most = 0
    for index, (parts, theirs) in in_pieces(tensors, others):
        assert len(index) == len(parts) == len(theirs)
        most = max(most, sum(part.numel() for part in parts))
        for i, part, other in zip(index, parts, theirs, strict=True):
            assert part.untyped_storage().data_ptr() == tensors[i].untyped_storage().data_ptr()
            part.add_(other)
    assert most <= 50
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def test_pieces_are_of_one_kind_and_whole_where_memory_differs(monkeypatch):
    monkeypatch.setattr(vectors, "_PIECE", 50)
    whole, apart = torch.zeros(4, 5, 2, 2), torch.zeros(4, 5, 4)[..., :2]
    last = torch.zeros(4, 5, 2, 2).to(memory_format=torch.channels_last)
    lists = [whole, torch.zeros(3), torch.zeros(3).double(), torch.zeros(3), apart], [last, *torch.zeros(3, 3), apart]
    found = [(index, parts) for index, (parts, _) in in_pieces(*lists)]
    assert [index for index, _ in found] == [[0], [1], [2], [3, 4]]
    assert found[0][1][0] is whole
    assert found[3][1][1] is apart


@pytest.mark.parametrize("on_host", [True, False])  # else the branch that never reads from the device
@pytest.mark.parametrize("bad", [None, math.inf, -math.inf, math.nan])
def test_division_by_the_norm(monkeypatch, on_host, bad):
    monkeypatch.setattr(norms, "_is_on_host", lambda tensor: on_host)
    vectors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    if bad is not None:
        vectors[0][1] = bad
    unit = divide_by_norm(vectors, norms.global_norm(vectors))
    if bad is None:
        assert all(a is b for a, b in zip(unit, vectors, strict=True))
    expected = [0.6, 0.0, 0.8] if bad is None else [0.0, 0.0, 0.0]
    assert torch.cat([u.flatten() for u in unit]).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("on_host", [True, False])
def test_zero_gives_zero(monkeypatch, on_host):
    monkeypatch.setattr(norms, "_is_on_host", lambda tensor: on_host)
    zeros = [torch.zeros(3)]
    assert divide_by_norm(zeros, norms.global_norm(zeros))[0].tolist() == [0.0] * 3
