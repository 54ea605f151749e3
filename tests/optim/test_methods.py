"""What each method promises beside its formula: neutral settings, one more or one less pass, memory."""

import copy
import math
import re
from functools import partial

import pytest
import torch
from torch import nn

from cases import BASES, CASES, SGD, Net, displaced, every_case, length, ready, same, step
from sam_lightning import GSAM, MSAM, SAM, WSAM, FriendlySAM, LookSAM, VaSSO, norm_layers_only

NEUTRAL = [
    (partial(SAM, every=1), SAM),
    (partial(GSAM, alpha=0.0), SAM),
    (partial(WSAM, gamma=0.5), SAM),
    (partial(FriendlySAM, sigma=0.0), SAM),
    (partial(VaSSO, theta=1.0), SAM),
    (partial(LookSAM, every=1), SAM),
    (partial(LookSAM, every=3, alpha=0.0), partial(SAM, every=3)),
]


def ten_steps(make, base, dtype=torch.float32, **options):
    net = Net(dtype)
    optimizer = make(net.named_parameters(), BASES[base][0], **{"rho": 0.3, **options})
    for _ in range(10):
        step(optimizer, net)
    return net.weights()


@pytest.mark.parametrize(("neutral", "plain"), NEUTRAL)
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_neutral_settings_are_sam_bit_for_bit(neutral, plain, base):
    assert same(ten_steps(neutral, base), ten_steps(plain, base))


def test_wsam_without_sharpness_is_its_base_in_one_pass():
    net = Net()
    optimizer = WSAM(net.parameters(), SGD, rho=0.3, gamma=0.0)
    assert not optimizer.will_perturb()
    for _ in range(5):
        step(optimizer, net)
    plain = Net()
    base = SGD(plain.parameters())
    for _ in range(5):
        base.zero_grad()
        plain.loss().backward()
        base.step()
    assert same(net.weights(), plain.weights())


@every_case
@pytest.mark.parametrize("rho", [0.3, 0.0])
def test_gradients_per_step(case, rho):
    net = Net()
    optimizer = case.make(net.named_parameters(), SGD, rho=rho)
    calls = []
    loss, net.loss = net.loss, lambda: calls.append(1) or loss()
    counts = []
    for _ in range(7):
        will_perturb = optimizer.will_perturb()
        step(optimizer, net)
        counts.append(len(calls))
        assert will_perturb == (counts[-1] - (counts[-2] if counts[1:] else 0) == 2 or not case.has_first_pass)
    counts = [b - a for a, b in zip([0, *counts], counts, strict=False)]
    assert counts == (case.passes if rho else [1] * 7)


@every_case
def test_a_second_gradient_that_nobody_asked_for_changes_nothing(case):
    """The five-line loop that looks at no flag."""
    net, other = Net(), Net()
    optimizer, reference = (case.make(n.named_parameters(), SGD, rho=0.3) for n in (net, other))
    for _ in range(7):
        optimizer.zero_grad()
        net.loss().backward()
        with optimizer.perturbed():
            optimizer.zero_grad()
            net.loss().backward()
        optimizer.step()
        step(reference, other)
    assert same(net.weights(), other.weights())


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, None])
def test_every_is_checked(bad):
    with pytest.raises(ValueError, match=re.escape(f"every must be an integer >= 1, got {bad!r}")):
        SAM(Net().parameters(), SGD, every=bad)


@pytest.mark.parametrize(
    ("method", "option", "bad"),
    [
        (WSAM, "gamma", (1.0, -0.1, math.nan)),
        (GSAM, "alpha", (-0.1, math.inf, math.nan)),
        (FriendlySAM, "sigma", (-0.1, math.nan)),
        (FriendlySAM, "lmbda", (1.0, -0.1, math.nan)),
        (VaSSO, "theta", (0.0, 1.1, math.nan)),
        (LookSAM, "alpha", (-0.1, math.nan)),
    ],
)
def test_options_are_checked(method, option, bad):
    for value in bad:
        with pytest.raises(ValueError, match=f"{option} must be .*, got {value!r}"):
            method(Net().parameters(), SGD, **{option: value})


# GSAM, WSAM.


def test_gsam_keeps_the_part_along_the_perturbed_gradient():
    ends = {}
    for alpha in (0.0, 0.4):
        net = Net()
        optimizer = GSAM(net.parameters(), SGD, rho=0.3, alpha=alpha)
        net.loss().backward()
        with optimizer.perturbed():
            optimizer.zero_grad()
            net.loss().backward()
        ends[alpha] = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert (ends[0.4] - ends[0.0]).norm() > 1e-3
    assert abs((ends[0.4] - ends[0.0]) @ ends[0.0]) < 1e-14


def drop_gradients(net):
    for p in net.parameters():
        p.grad = None


@pytest.mark.parametrize("clear", [nn.Module.zero_grad, drop_gradients])
def test_wsam_tells_a_first_gradient_that_was_thrown_away(clear):
    net = Net()
    optimizer = WSAM(net.parameters(), SGD, gamma=0.7)
    before = net.weights()

    def second_pass(*clearings):
        optimizer.zero_grad()
        net.loss().backward()
        with optimizer.perturbed():
            for clearing in clearings:
                clearing()
                net.loss().backward()

    with pytest.raises(RuntimeError, match=r"call optimizer.zero_grad\(\) there"):
        second_pass(partial(clear, net))
    assert same(net.weights(), before)
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) twice"):
        second_pass(optimizer.zero_grad, optimizer.zero_grad)
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())  # outside it clears again
    step(optimizer, net)


# MSAM.


def test_msam_with_the_radius_of_nesterovs_step_is_nesterov():
    """rho = lr mu ||v|| puts the gradient where Nesterov's momentum, in its old form, takes it."""
    net, other = Net(), Net()
    lr, mu = 0.05, 0.9
    optimizer = MSAM(net.parameters(), partial(torch.optim.SGD, lr=lr, momentum=mu), rho=1.0)
    nesterov = torch.optim.SGD(other.parameters(), lr=lr, momentum=mu, nesterov=True)
    for t in range(20):
        v = [optimizer.state[p]["momentum_buffer"] for p in net.parameters() if p in optimizer.state]
        optimizer.param_groups[0]["rho"] = lr * mu * length(v) if v else 0.0
        if t > 0:  # the new form holds w - lr mu v
            for p, q in zip(net.parameters(), other.parameters(), strict=True):
                shift = lr * mu * optimizer.state[p]["momentum_buffer"] if p in optimizer.state else 0
                torch.testing.assert_close(p - shift, q, rtol=0, atol=1e-13)
        step(optimizer, net)
        nesterov.zero_grad()
        other.loss().backward()
        nesterov.step()


@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
def test_msam_refuses_a_base_without_momentum(base):
    make = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}[base]
    net = Net()
    optimizer = MSAM(net.parameters(), make, lr=0.1)
    step(optimizer, net)
    with pytest.raises(RuntimeError, match=f"MSAM goes along its base's momentum, and {make.__name__} has none"):
        step(optimizer, net)


def test_msam_reaches_its_radius_and_ignores_a_first_gradient():
    net, optimizer = ready(next(case for case in CASES if case.name == "msam"))
    e = displaced(optimizer, net)
    assert length(e) == pytest.approx(0.3)
    drop_gradients(net)
    assert same(displaced(optimizer, net), e)


# Memory.


@pytest.mark.parametrize("case", [case for case in CASES if case.optimizer.memory], ids=lambda case: case.name)
def test_memory_comes_with_the_first_perturbed_step_and_no_other_touches_it(case):
    net = Net()
    optimizer = case.make(net.named_parameters(), BASES["adam"][0], rho=0.3)
    every = optimizer.every

    def memory():
        return [optimizer.state[p][case.optimizer.memory].clone() for p in net.parameters() if p in optimizer.state]

    with pytest.raises(RuntimeError), optimizer.perturbed():
        pass
    assert not optimizer.state
    step(optimizer, net)
    seen = [memory()]
    for _ in range(2 * every):
        step(optimizer, net)
        seen.append(memory())
    for t in range(1, 2 * every + 1):
        assert same(seen[t], seen[t - 1]) == (t % every != 0)


@pytest.mark.parametrize("has_looked", [False, True])
def test_looksam_adds_nothing_while_every_radius_is_0_or_it_has_looked_at_nothing(has_looked):
    net, plain = Net(), Net()
    optimizer = LookSAM(net.parameters(), SGD, rho=0.3, every=4, alpha=0.5)
    base = SGD(plain.parameters())
    if has_looked:
        step(optimizer, net)
        plain.load_state_dict(net.state_dict())
        base.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["rho"] = 0.0
    optimizer.param_groups[0]["sharpness_step"] = 1  # within an interval
    for _ in range(3):
        step(optimizer, net)
        base.zero_grad()
        plain.loss().backward()
        base.step()
    assert same(net.weights(), plain.weights())


# SAM-ON.


def test_norm_layers_are_told_by_their_class_and_moved_alone():
    net = nn.ModuleDict({"stem": nn.Linear(3, 4), "0": nn.Sequential(nn.BatchNorm1d(4)), "end": nn.Linear(4, 2)})
    net["norm_like"] = nn.Linear(2, 2)
    optimizer = SAM(norm_layers_only(net, rho=0.5), SGD)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    net["norm_like"](net["end"](net["0"](net["stem"](x)))).square().mean().backward()
    e = dict(zip([name for name, _ in net.named_parameters()], displaced(optimizer, net), strict=True))
    assert {name for name, part in e.items() if length([part]) > 0} == {"0.0.weight", "0.0.bias"}
    assert length(list(e.values())) == pytest.approx(0.5)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 6]
    assert len(norm_layers_only(nn.LayerNorm(3), rho=0.5)) == 1


def test_norm_layers_under_a_base_with_a_rho_of_its_own():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = SAM(norm_layers_only(net, rho=0.5), torch.optim.Adadelta)
    assert [(group["rho"], group["sam_rho"]) for group in optimizer.param_groups] == [(0.9, 0.5), (0.9, 0.0)]
    optimizer = SAM(net.parameters(), SGD)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "sam_rho": 0.3})
    assert (optimizer.param_groups[1]["rho"], "sam_rho" in optimizer.param_groups[1]) == (0.3, False)


def test_norm_layers_that_are_missing_are_refused_and_ones_own_are_taken():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.inside = nn.Linear(3, 3)  # no normalisation

    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), Own())
    with pytest.raises(ValueError, match="Sequential has no normalisation layer with parameters"):
        norm_layers_only(net, rho=0.5)
    groups = norm_layers_only(net, rho=0.5, layers=(Own,))
    assert [name for name, _ in groups[0]["params"]] == ["2.scale"]
