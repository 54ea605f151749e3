"""The Lanczos iteration against full decompositions of matrices that are hard for it."""

import math

import pytest
import torch

from sam_lightning.sharpness import lanczos
from sam_lightning.sharpness.lanczos import inner, largest


def rotated(values, dtype=torch.float64):
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (basis @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ basis.T).to(dtype)


def start(size, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


SPECTRA = {
    "close together": torch.linspace(0.99, 1.0, 200).tolist(),
    "few large ones": [5.0, 4.9, 4.0, *torch.linspace(-0.1, 0.1, 200).tolist()],
    "a negative one that is larger": [-50.0, 1.0, 0.9, 0.8] + [0.0] * 100,
    "all negative": torch.linspace(-3, -1, 60).tolist(),
    "several times the same": [2.0, 2.0, 2.0] + [1.0] * 100,
    "of low rank": [3.0, 1.0] + [0.0] * 100,
    "zero": [0.0] * 50,
    "fewer than the basis holds": [1.0, 3.0, 2.0],
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_of_matrices(name, count):
    matrix = rotated(SPECTRA[name])
    found = largest(lambda v: matrix @ v, start(len(matrix)), count, tolerance=1e-8)
    expected = sorted(SPECTRA[name], reverse=True)[:count]
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-9])
def test_single_precision_ends_at_what_it_can_resolve(tolerance):
    matrix = rotated(SPECTRA["few large ones"], torch.float32)
    found = largest(lambda v: matrix @ v, start(len(matrix), torch.float32), 3, tolerance)
    assert found == pytest.approx([5.0, 4.9, 4.0], rel=max(tolerance, 1e-6))


def test_tolerance_bounds_the_error_and_saves_products():
    matrix, products = rotated(SPECTRA["close together"]), {}
    for tolerance in (1e-3, 1e-6):
        calls = []
        found = largest(lambda v: (calls.append(0), matrix @ v)[1], start(len(matrix)), 1, tolerance)  # noqa: B023
        assert abs(found[0] - 1) <= tolerance
        products[tolerance] = len(calls)
    assert products[1e-3] < products[1e-6]


def test_a_matrix_that_is_not_finite_is_an_error():
    with pytest.raises(RuntimeError, match="not finite"):
        largest(lambda v: v * math.nan, start(20), 1, 1e-4)


def test_products_are_bounded(monkeypatch):
    monkeypatch.setattr(lanczos, "_MOST_PRODUCTS", 12)
    matrix = rotated(SPECTRA["close together"])
    with pytest.raises(RuntimeError, match=r"12 products .* 1 largest eigenvalues: raise the tolerance, now 1e-08"):
        largest(lambda v: matrix @ v, start(len(matrix)), 1, 1e-8)


def test_inner_products_of_long_vectors_keep_their_digits():
    """Added up in single precision, digits of 2e7 equal numbers are lost."""
    vector = torch.full((20_000_000,), 0.1)
    assert inner(vector[None], vector).item() == pytest.approx(20_000_000 * vector[0].double().item() ** 2, rel=1e-10)
