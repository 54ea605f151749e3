"""Networks and batches of many kinds: each measured as the same function written out, or refused."""

import collections
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from classifier import Classifier, batches, data
from measures import MEASURES
from regression import assert_same
from sam_lightning.sharpness import (
    Adaptive,
    average_case_sharpness,
    hessian_trace,
    largest_eigenvalues,
    worst_case_sharpness,
)
from sam_lightning.sharpness.adaptive import units
from sam_lightning.sharpness.hessian import hessian_of

SCALES = [None, Adaptive()]


def product_and_difference(network, loss, given):
    """A product with the Hessian, and the same from the gradients at both sides of w."""
    with hessian_of(network, loss, given, Adaptive(), "running", seed=0) as hessian:
        v = hessian.normal()
        product = hessian @ v
        objective = hessian.objective
        parts = v.split([w.numel() for w in objective.weights])
        parts = [part.view_as(w) for part, w in zip(parts, objective.weights, strict=True)]
        sides = [objective.value_and_gradient([h * part for part in parts])[1] for h in (1e-5, -1e-5)]
        flat = [torch.cat([part.flatten() for part in side]) for side in sides]
    return product, (flat[0] - flat[1]) / 2e-5


def attention():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(4, 5, 8, dtype=torch.float64)


def recurrent(kind):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind(3, 4, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0][:, -1]

    return Last(), torch.randn(5, 6, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "make",
    [attention, lambda: recurrent(nn.LSTM), lambda: recurrent(nn.GRU)],
    ids=["attention", "lstm", "gru"],
)
def test_curvature_is_the_gradients_difference(make):
    torch.manual_seed(0)
    network, x = make()
    network.double()
    product, difference = product_and_difference(network, lambda b: network(b).square().mean(), [x])
    torch.testing.assert_close(product, difference, rtol=1e-5, atol=1e-7 * product.norm().item())


def test_attention_is_left_to_its_kernels_outside_the_hessian():
    """Only second derivatives need the slow one."""
    seen = {"fused": [], "plain": []}
    network, x = attention()
    network.double()

    def loss(batch):
        seen[kind].append(torch.backends.cuda.flash_sdp_enabled())
        return network(batch).square().mean()

    kind = "fused"
    worst_case_sharpness(network, loss, [x], rho=0.1)
    kind = "plain"
    hessian_trace(network, loss, [x], draws=2)
    assert all(seen["fused"])
    assert not any(seen["plain"])
    assert torch.backends.cuda.flash_sdp_enabled()


def test_transformers_compute_the_same_with_and_without_gradients():
    """torch's fast path gives padded positions another output."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(4, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4], [2]])

    def loss(batch):
        return network(batch, src_key_padding_mask=padding[: len(batch)]).square().mean()

    assert worst_case_sharpness(network, loss, [x], rho=0.0) == 0.0  # one pass with gradients, one without
    assert torch.backends.mha.get_fastpath_enabled()


def test_recurrent_layers_do_without_cudnn():
    """Which has no gradient in evaluation mode; torch's own code has."""
    network, x = recurrent(nn.LSTM)
    network.double()
    seen = []

    def loss(batch):
        seen.append(torch.backends.cudnn.enabled)
        return network(batch).square().mean()

    before = torch.backends.cudnn.enabled
    worst_case_sharpness(network, loss, [x], rho=0.1)
    assert not any(seen)
    assert torch.backends.cudnn.enabled == before


# Second derivatives that are wrong.


class WrongTwice(torch.autograd.Function):
    """x^2 with a gradient that is right, and a second derivative that leaves out half of it."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return gradient * y, gradient * x.detach()


@pytest.mark.parametrize("measure", [largest_eigenvalues, hessian_trace])
def test_a_hessian_that_is_not_symmetric_is_refused(measure):
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
    network.register_parameter("scale", scale)

    def loss(batch):
        return cross_entropy(WrongTwice.apply(network(batch[0]), scale), batch[1])

    with pytest.raises(RuntimeError, match=r"second derivatives of this network are wrong: a\^T H b = .*weight_norm"):
        measure(network, loss, batches(10))


@pytest.mark.parametrize("seed", range(10))
def test_weight_norm_is_refused(seed):
    """torch differentiates it twice wrongly; when it does so no more, this test goes."""
    torch.manual_seed(seed)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double()
    with torch.no_grad():
        layer.parametrizations.weight.original1.add_(torch.randn(3, 4) / 2)
    with pytest.raises(RuntimeError, match="second derivatives of this network are wrong"):
        hessian_trace(layer, lambda b: cross_entropy(layer(b[0]), b[1]), batches(10))
    assert worst_case_sharpness(layer, lambda b: cross_entropy(layer(b[0]), b[1]), batches(10), rho=0.1) > 0


# Complex weights.


class Complex(nn.Module):
    """A complex layer, or the same with real and imaginary parts as weights."""

    def __init__(self, w, is_real):
        super().__init__()
        self.w = nn.Parameter(torch.view_as_real(w).clone() if is_real else w.clone())
        self.bias = nn.Parameter(torch.full((3,), 0.3, dtype=torch.float64))

    def loss(self, batch):
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        return ((batch[0].to(w.dtype) @ w).abs() + self.bias - batch[1]).square().mean()


@pytest.mark.parametrize("name", MEASURES)
def test_complex_weights_are_their_real_and_imaginary_parts(name):
    torch.manual_seed(0)
    w = torch.randn(4, 3, dtype=torch.complex128)
    given = [(torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)) for _ in range(2)]
    networks = [Complex(w, is_real) for is_real in (False, True)]
    found = [MEASURES[name](network, network.loss, given) for network in networks]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert torch.equal(networks[0].w, w)


def test_both_parts_of_a_complex_weight_have_its_modulus_as_unit():
    network = Complex(torch.tensor([[3 + 4j]], dtype=torch.complex128), is_real=False)
    assert units(network, Adaptive(eta=1.0))[0].tolist() == [[[6.0, 6.0]]]
    assert units(network, None)[0].tolist() == [[[1.0, 1.0]]]


# Half precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MEASURES)
def test_half_precision_is_measured_in_single(name, dtype):
    """In half precision w + T u would be rounded: the worst case is 8 % off, the average case 22 %."""
    half, single = Classifier(norm=True).to(dtype), Classifier(norm=True).float()
    half.loss((data()[0].to(dtype), data()[1])).backward()
    single.load_state_dict(half.state_dict())
    state = {key: value.clone() for key, value in half.state_dict().items()}
    pointers = [(p.data_ptr(), None if p.grad is None else p.grad.data_ptr()) for p in half.parameters()]
    given = [(x.to(dtype), y) for x, y in batches(10)]
    found = MEASURES[name](half, half.loss, given)
    assert found == MEASURES[name](single, single.loss, [(x.float(), y) for x, y in given])
    assert_same(half.state_dict(), state)
    assert [(p.data_ptr(), None if p.grad is None else p.grad.data_ptr()) for p in half.parameters()] == pointers


def test_autocast_around_a_measure_is_off_inside():
    """It keeps copies of weights, which do not see them move: the sharpness would be 0."""
    network = Classifier().float()
    given = [(x.float(), y) for x, y in batches(10)]
    alone = worst_case_sharpness(network, network.loss, given, rho=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert worst_case_sharpness(network, network.loss, given, rho=0.1) == alone
        assert torch.is_autocast_enabled("cpu")


# Batches.

Named = collections.namedtuple("Named", "x y")


@dataclasses.dataclass(frozen=True)
class Data:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "kept"


class Encoding(collections.UserDict):
    """Such as tokenizers give."""


@pytest.mark.parametrize("make", [Named, Data, lambda x, y: Encoding(x=x, y=y), lambda x, y: {"in": [Named(x, y)]}])
def test_batches_of_structures(make):
    network = Classifier()
    x, y = data()
    given = make(x, y)

    def loss(found):
        assert type(found) is type(given)
        found = found["in"][0] if isinstance(found, dict) else found
        if isinstance(found, Data):
            assert found.name == "kept"
        return network.loss((found["x"], found["y"]) if isinstance(found, Encoding) else (found.x, found.y))

    found = worst_case_sharpness(network, loss, [given], rho=0.1, m=8)
    assert found == worst_case_sharpness(network, network.loss, [(x, y)], rho=0.1, m=8)


# What the measures say of one another.


@pytest.mark.parametrize(("activation", "is_smooth"), [(nn.Tanh, True), (nn.ReLU, False)])
def test_small_noise_is_half_the_trace_of_a_smooth_loss_only(activation, is_smooth):
    """The Hessian does not see where a ReLU's slope jumps, and noise crosses there however small it is."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 40), activation(), nn.Linear(40, 1)).double()
    x, y = torch.randn(60, 4, dtype=torch.float64), torch.randn(60, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        mse_loss(network(x), y).backward()
        optimizer.step()
    what = (network, lambda b: mse_loss(network(b[0]), b[1]), [(x, y)])
    trace, sigma = hessian_trace(*what, draws=200), 1e-3
    noise = average_case_sharpness(*what, sigma=sigma, draws=200)
    half = sigma**2 * trace.mean / 2
    spread = math.hypot(noise.standard_error, sigma**2 * trace.standard_error / 2)
    assert (abs(noise.mean - half) < 4 * spread) == is_smooth
    assert is_smooth or noise.mean > 10 * half
