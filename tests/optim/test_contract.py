"""The contract that every row of `cases` keeps."""

import copy
import io
import math
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from cases import (
    BASES,
    SGD,
    Net,
    crossed,
    displaced,
    every_base,
    every_case,
    every_two_pass_case,
    length,
    name_of,
    ready,
    same,
    step,
)
from sam_lightning import FriendlySAM, LookSAM, VaSSO


@every_case
@every_base
def test_rho_zero_is_the_base_optimizer_and_its_state_can_be_loaded(case, base):
    net, plain = Net(), Net()
    optimizer = case.make(net.named_parameters(), BASES[base][0], rho=0.0)
    other = BASES[base][0](plain.parameters())
    for i in range(6):
        step(optimizer, net)
        other.zero_grad()
        plain.loss().backward()
        other.step()
        assert same(net.weights(), plain.weights())
        if i == 2:  # go on from the state of the plain one, which knows neither rho nor names
            optimizer = case.make(net.named_parameters(), BASES[base][0], rho=0.0)
            optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
            assert optimizer.param_groups[0]["rho"] == 0.0


@every_case
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, torch.OutOfMemoryError, GeneratorExit])
def test_weights_come_back_bit_for_bit_whatever_happens(case, error):
    net, optimizer = ready(case, dtype=torch.float32)
    net.last.bias.data[0] = -0.0
    before, storage = net.weights(), net.pointers()

    def body():
        with optimizer.perturbed():
            assert not same(net.weights(), before)
            assert net.pointers() == storage
            with torch.no_grad():
                for p in [*net.first.parameters(), *net.last.parameters()]:
                    p.fill_(math.nan)
            if error is not None:
                raise error

    for _ in range(2):
        with pytest.raises(error) if error else nullcontext():
            body()
        assert same(net.weights(), before)
        assert net.pointers() == storage
    step(optimizer, net)  # and it goes on
    assert not same(net.weights(), before)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_learning_rate_nothing_drifts(case, dtype):
    net = Net(dtype)
    optimizer = case.make(net.named_parameters(), partial(torch.optim.SGD, lr=0.0, momentum=0.9), rho=0.5)
    before = net.weights()
    for _ in range(20):
        step(optimizer, net)
    assert same(net.weights(), before)  # and of the same dtype
    if case.has_first_pass:
        net.loss().backward()
    with optimizer.perturbed():
        assert not same(net.weights(), before)
        assert all(p.dtype is dtype for p in net.parameters())


@every_case
def test_gradients_in_one_pass_only(case):
    net, optimizer = ready(case, "sgd" if case.has_first_pass else "momentum")
    before = net.weights()
    with optimizer.perturbed():
        optimizer.zero_grad()
        (net.unused.weight.sum() + net.last.weight.sum()).backward()
    assert same(net.weights(), before)
    optimizer.step()
    changed = {n for (n, p), w in zip(net.named_parameters(), before, strict=True) if not torch.equal(p, w)}
    assert changed == {"unused.weight", "last.weight"}


@every_two_pass_case
def test_a_zero_gradient_moves_nothing(case):
    net, optimizer = ready(case, scale=0.0)
    assert length(displaced(optimizer, net)) == 0


@every_two_pass_case
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["last.weight", "first.bias"])
def test_a_gradient_that_is_not_finite_moves_nothing(case, bad, where):
    net, optimizer = ready(case)
    net.get_parameter(where).grad.view(-1)[0] = bad
    before = net.weights()
    with optimizer.perturbed():
        assert same(net.weights(), before)
    step(optimizer, net)
    assert all(p.isfinite().all() for p in net.parameters())


@every_two_pass_case
def test_the_norm_of_half_precision_gradients_does_not_overflow(case):
    net, double = Net(torch.float16), Net()
    for p, half in zip(double.parameters(), net.parameters(), strict=True):
        half.grad = torch.full_like(half, 3e4)  # its square is beyond float16
        p.data, p.grad = half.detach().double(), half.grad.double()
    e, reference = (displaced(case.make(n.named_parameters(), SGD, rho=0.3), n) for n in (net, double))
    for a, b in zip(e, reference, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=2e-3)  # float16 near 1: steps of 1e-3


@every_two_pass_case
def test_tied_parameters_move_once(case):
    net, twin = Net(), Net()
    net.again = net.last
    for n in (net, twin):
        n.loss().backward()
    e, reference = (displaced(case.make(n.named_parameters(), SGD, rho=0.3), n) for n in (net, twin))
    assert same(e, reference)


def usual(case, base, before):
    has_memory = case.optimizer in (FriendlySAM, LookSAM, VaSSO)  # in the base's state, whatever is there
    return base == "adam" or (before == 4 and (has_memory or case.name in ("sam", "msam")))


@pytest.mark.parametrize(
    ("case", "base", "before"),
    crossed([3, 4, 5], usual=usual),  # anywhere in an interval of 3
    ids=name_of,
)
def test_a_saved_state_goes_on_bit_for_bit(case, base, before):
    net, optimizer = ready(case, base)
    for _ in range(before):
        step(optimizer, net)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), net.state_dict()), file)
    for _ in range(4):
        step(optimizer, net)

    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    resumed = Net(seed=1)
    resumed.x, resumed.y = net.x, net.y
    resumed.load_state_dict(weights)
    other = case.make(resumed.named_parameters(), BASES[base][0], rho=0.9)  # the saved radius is the one
    other.load_state_dict(state)
    for _ in range(4):
        step(other, resumed)
    assert same(resumed.weights(), net.weights())


@every_case
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(case, how):
    net, optimizer = ready(case)
    step(optimizer, net)
    twin_net, twin = how((net, optimizer))
    assert twin.param_groups is twin.base.param_groups is not optimizer.param_groups
    before = net.weights()
    step(twin, twin_net)
    assert same(net.weights(), before)
    step(optimizer, net)
    assert same(net.weights(), twin_net.weights())
    assert not same(net.weights(), before)
