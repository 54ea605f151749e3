"""What half precision leaves of a displacement, measured in the first perturbed step."""

import warnings
from functools import partial

import pytest
import torch

from sam_lightning import ASAM, SAM
from sam_lightning.optim import rounding

SGD = partial(torch.optim.SGD, lr=0.1)


def weight(dtype, size=1000):
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter((0.02 * torch.randn(size, generator=generator)).to(dtype))
    w.grad = torch.randn(size, generator=generator).to(dtype)
    return w


def told(optimizer, steps=1):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            with optimizer.perturbed():
                pass
            optimizer.step()
    return [str(found.message) for found in caught]


@pytest.mark.parametrize(("dtype", "rho"), [(torch.bfloat16, 1e-3), (torch.half, 1e-4)])
def test_the_share_is_that_of_the_written_out_displacement(dtype, rho):
    w = weight(dtype)
    e = rho * w.grad.double() / w.grad.double().norm()
    moved = (w.detach().double() + e).to(dtype).double() - w.detach().double()
    (message,) = told(SAM([w], SGD, rho=rho), steps=3)  # once
    share = float(message.split("||fl(w + e) - w|| is ")[1].split("%")[0]) / 100
    assert share == pytest.approx((moved.norm() / e.norm()).item(), abs=2e-2)
    cosine = float(message.split("both ")[1].split(",")[0])
    assert cosine == pytest.approx(torch.cosine_similarity(moved, e, dim=0).item(), abs=2e-2)
    assert cosine < 0.97
    moving = float(message.split(", and ")[1].split("%")[0]) / 100
    assert moving == pytest.approx((moved != 0).double().mean().item(), abs=2e-2)
    assert "Trainer(precision='bf16-mixed')" in message


def test_a_displacement_of_which_nothing_is_left():
    w = weight(torch.bfloat16)
    (message,) = told(ASAM([w], SGD, rho=0.01, eta=0.0, normalize_bias=True))
    assert "||fl(w + e) - w|| is 0.0% of" in message
    assert "0.00% of the weights move" in message


@pytest.mark.parametrize(("dtype", "rho"), [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
def test_what_survives_is_not_told(dtype, rho):
    assert not told(SAM([weight(dtype)], SGD, rho=rho))


def test_only_the_first_displacement_is_measured(monkeypatch):
    calls = []
    real = rounding.warn_of_rounding

    def counted(*args):
        calls.append(real(*args))
        return calls[-1]

    monkeypatch.setattr("sam_lightning.optim.perturbation.warn_of_rounding", counted)
    w = weight(torch.bfloat16)
    optimizer, gradient = SAM([w], SGD, rho=0.5), w.grad.clone()
    for factor in (float("nan"), 0.0, 1.0, 1.0, 1.0):
        w.grad = gradient * factor
        with optimizer.perturbed():
            pass
    assert calls == [False, False, True]
