"""SAM and ASAM against written-out steps, and the contract that every row of `cases` keeps."""

import copy
import io
import math
import pickle
import re
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

import oracles
from cases import (
    BASES,
    CASES,
    SGD,
    Net,
    Quadratic,
    Rescaled,
    displaced,
    length,
    one_group,
    ready,
    same,
    several_groups,
    step,
)
from sam_lightning import ASAM, SAM, SharpnessAware

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_base = pytest.mark.parametrize("base", BASES)


# Oracles.


@every_case
@every_base
@pytest.mark.parametrize("loss", [Net, Quadratic])
@pytest.mark.parametrize("groups", [one_group, several_groups])
@pytest.mark.parametrize("steps", [1, 5])
def test_steps_equal_the_written_out_ones(case, base, loss, groups, steps):
    net, twin = loss(), loss()
    names = [name for name, _ in net.named_parameters()]
    factory, oracle = BASES[base]
    params, radii, rates = groups(list(net.named_parameters()))
    optimizer = case.make(params, factory, rho=0.3)
    for _ in range(steps):
        step(optimizer, net)
    options = {"names": names, **case.options} if case.optimizer is ASAM else {}
    oracles.sharpness_aware_steps(
        steps, list(twin.parameters()), twin.loss, case.displacements, oracle(), radii, rates, **options
    )
    for name, ours, reference in zip(names, net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12, msg=name)


def test_the_forms_are_different_methods():
    """What an oracle test would not see if all rows shared a mistake."""
    found = []
    for case in CASES:
        net, optimizer = ready(case)
        found.append(torch.cat([e.flatten() for e in displaced(optimizer, net)]))
    for i, a in enumerate(found):
        for b in found[:i]:
            assert torch.cosine_similarity(a, b, dim=0) < 0.999


# Properties.


@every_case
@pytest.mark.parametrize("scale", [1.0, 1e-4, 65536.0])
def test_the_displacement_reaches_the_ball_and_no_loss_scale_changes_it(case, scale):
    net, optimizer = ready(case)
    unscaled = displaced(optimizer, net)
    optimizer.zero_grad()
    (net.loss() * scale).backward()
    e = displaced(optimizer, net)
    assert length([a / t for a, t in zip(e, case.scales(net.named_parameters()), strict=True)]) == pytest.approx(0.3)
    assert length([a - b for a, b in zip(e, unscaled, strict=True)]) < 1e-6 * length(unscaled)
    assert sum((a * p.grad).sum() for a, p in zip(e, net.parameters(), strict=True) if p.grad is not None) > 0


@every_case
def test_grouping_changes_nothing(case):
    results = []
    for sizes in ([8], [3, 5], [1] * 8, None):
        net = Net()
        named = iter(list(net.named_parameters()))
        groups = [{"params": [next(named) for _ in range(size)]} for size in sizes or []]
        if sizes is None:  # bare tensors, where no names are needed
            groups = net.named_parameters() if case.name == "asam-authors" else net.parameters()
        optimizer = case.make(groups, SGD, rho=0.3)
        for _ in range(3):
            step(optimizer, net)
        results.append(net.weights())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_only_asam_without_eta_is_invariant_to_rescaling():
    def perturbed_loss(make, factor):
        net = Rescaled(factor)
        optimizer = make(net.named_parameters(), base=SGD, rho=0.3)
        net.loss().backward()
        with optimizer.perturbed():
            return net.loss().item()

    invariant = partial(ASAM, eta=0.0, normalize_bias=True)
    for factor in (4, 1 / 4):
        assert perturbed_loss(invariant, factor) == pytest.approx(perturbed_loss(invariant, 1), rel=1e-10)
        for make in (SAM, ASAM, partial(ASAM, eta=0.1, normalize_bias=True), partial(ASAM, eta=0.0)):
            assert perturbed_loss(make, factor) != pytest.approx(perturbed_loss(make, 1), rel=1e-3)


@every_case
def test_displacement_is_pure_and_leaves_the_gradients(case):
    net, optimizer = ready(case)
    weights = [p for p in net.parameters() if p.grad is not None]
    objects, grads = [p.grad for p in weights], [p.grad.clone() for p in weights]
    before, random = net.weights(), torch.get_rng_state()
    with torch.no_grad():
        unit, again = (optimizer.displacement(list(weights), list(objects)) for _ in range(2))
    assert same(unit, again)
    assert same(before, net.weights())
    assert same(objects, grads)
    assert torch.equal(random, torch.get_rng_state())
    moved = displaced(optimizer, net)
    for e, found in zip(
        unit, (e for e, p in zip(moved, net.parameters(), strict=True) if p in set(weights)), strict=True
    ):
        torch.testing.assert_close(found, 0.3 * e, rtol=0, atol=1e-15)
    assert all(p.grad is grad for p, grad in zip(weights, objects, strict=True))
    assert same(objects, grads)


def test_biases_are_told_by_their_own_name():
    module = nn.ModuleDict({"cell": nn.LSTM(3, 4), "bias_of_image": nn.Linear(3, 4)}).double()
    optimizer = ASAM(module.named_parameters(), SGD, rho=1.0)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    e = displaced(optimizer, module)
    found = {name for (name, _), a in zip(module.named_parameters(), e, strict=True) if a.max() - a.min() < 1e-12}
    assert found == {"cell.bias_ih_l0", "cell.bias_hh_l0", "bias_of_image.bias"}


def test_a_variant_is_one_formula_for_the_unit_ball():
    class Ones(SharpnessAware):
        def displacement(self, weights, grads):
            assert [w.shape for w in weights] == [g.shape for g in grads] == [(6, 4), (6,), (2, 6), (2,)]
            return [torch.ones_like(w) for w in weights]

    class Failing(Ones):
        def displacement(self, weights, grads):
            raise KeyError

    net = Net()
    radii = {"first": 0.1, "frozen": 0.5, "unused": 0.7, "last": 0.2}
    groups = [{"params": list(getattr(net, name).parameters()), "rho": rho} for name, rho in radii.items()]
    net.loss().backward()
    for a, rho in zip(displaced(Ones(groups, SGD, 0.0), net), [0.1, 0.1, 0, 0, 0, 0, 0.2, 0.2], strict=True):
        torch.testing.assert_close(a, torch.full_like(a, rho))
    before = net.weights()
    failing = Failing(groups, SGD, 0.0)
    with pytest.raises(KeyError), failing.perturbed():
        pass
    assert same(net.weights(), before)
    failing.state_dict()
    with pytest.raises(TypeError, match="abstract"):
        SharpnessAware(Net().parameters(), SGD, 0.1)


# The contract.


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
    net = Net(torch.float32)
    net.last.bias.data[0] = -0.0
    optimizer = case.make(net.named_parameters(), SGD, rho=0.3)
    net.loss().backward()
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
    optimizer = case.make(net.named_parameters(), partial(torch.optim.SGD, lr=0.0), rho=0.5)
    before = net.weights()
    for _ in range(1000 if dtype is torch.bfloat16 else 50):
        step(optimizer, net)
    assert same(net.weights(), before)  # and of the same dtype
    with optimizer.perturbed():
        assert not same(net.weights(), before)
        assert all(p.dtype is dtype for p in net.parameters())


@every_case
def test_gradients_in_one_pass_only(case):
    net, optimizer = ready(case, "sgd")
    before = net.weights()
    with optimizer.perturbed():
        optimizer.zero_grad()
        (net.unused.weight.sum() + net.last.weight.sum()).backward()
    assert same(net.weights(), before)
    optimizer.step()
    changed = {n for (n, p), w in zip(net.named_parameters(), before, strict=True) if not torch.equal(p, w)}
    assert changed == {"unused.weight", "last.weight"}


@every_case
def test_a_zero_gradient_moves_nothing(case):
    net, optimizer = ready(case, scale=0.0)
    assert length(displaced(optimizer, net)) == 0


@every_case
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


@every_case
def test_the_norm_of_half_precision_gradients_does_not_overflow(case):
    net, double = Net(torch.float16), Net()
    for p, half in zip(double.parameters(), net.parameters(), strict=True):
        half.grad = torch.full_like(half, 3e4)  # its square is beyond float16
        p.data, p.grad = half.detach().double(), half.grad.double()
    e, reference = (displaced(case.make(n.named_parameters(), SGD, rho=0.3), n) for n in (net, double))
    for a, b in zip(e, reference, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=2e-3)  # float16 near 1: steps of 1e-3


@every_case
def test_tied_parameters_move_once(case):
    net, twin = Net(), Net()
    net.again = net.last
    for n in (net, twin):
        n.loss().backward()
    e, reference = (displaced(case.make(n.named_parameters(), SGD, rho=0.3), n) for n in (net, twin))
    assert same(e, reference)


@every_case
@every_base
def test_a_saved_state_goes_on_bit_for_bit(case, base):
    net, optimizer = ready(case, base)
    for _ in range(3):
        step(optimizer, net)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), net.state_dict()), file)
    for _ in range(3):
        step(optimizer, net)

    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    resumed = Net(seed=1)
    resumed.x, resumed.y = net.x, net.y
    resumed.load_state_dict(weights)
    other = case.make(resumed.named_parameters(), BASES[base][0], rho=0.9)  # the saved radius is the one
    other.load_state_dict(state)
    for _ in range(3):
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


@every_case
def test_groups_and_state_are_the_bases_own_and_schedulers_and_hooks_act_on_them(case):
    (net, optimizer), seen = ready(case), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        step(optimizer, net)
        scheduler.step()
        assert optimizer.param_groups is optimizer.base.param_groups
        assert optimizer.state is optimizer.base.state
        assert optimizer.defaults is optimizer.base.defaults
        ours, base = optimizer.state_dict(), optimizer.base.state_dict()
        assert ours.keys() == {"state", "param_groups"}
        assert ours["param_groups"] == base["param_groups"]
        assert [list(state) for state in ours["state"].values()] == [["momentum_buffer"]] * 4  # and no weights
        optimizer.load_state_dict(ours)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert seen == ["before", "after"] * 2
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.025)
    assert optimizer.param_groups[0]["rho"] == 0.3
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_a_radius_may_follow_a_schedule_and_groups_may_join():
    net = Net()
    optimizer = SAM(net.first.named_parameters(), SGD, rho=0.3)
    optimizer.add_param_group({"params": list(net.last.named_parameters()), "rho": 0.0})
    optimizer.add_param_group({"params": list(net.unused.named_parameters())})
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.0, 0.3]
    optimizer.param_groups[0]["rho"] = 0.9
    net.loss().backward()
    assert length(displaced(optimizer, net)) == pytest.approx(0.9)


def test_a_step_without_ascent_warns_once():
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAM(net.parameters(), SGD).step()  # no gradients
        net.loss().backward()
        SAM(net.parameters(), SGD, rho=0.0).step()
        optimizer = SAM(net.parameters(), SGD)
        step(optimizer, net)
    with pytest.warns(UserWarning, match=r"SAM.step\(\) without perturbed\(\) before it is a plain SGD step"):
        optimizer.step()
    optimizer.step()  # warnings are errors here


def test_a_closure_is_evaluated_once_where_the_weights_are():
    net, plain = Net(), Net()
    optimizer, other = (SAM(net.parameters(), SGD), SGD(plain.parameters()))
    net.loss().backward()
    with optimizer.perturbed():
        pass
    losses = []

    def closure(of, by):
        by.zero_grad()
        losses.append(of.loss())
        losses[-1].backward()
        return losses[-1].item()

    with pytest.warns(UserWarning, match=r"SAM.step\(closure\) after perturbed\(\)"):
        value = optimizer.step(partial(closure, net, optimizer))
    assert value == other.step(partial(closure, plain, other))
    assert len(losses) == 2
    assert same(net.weights(), plain.weights())


# Refusals.


@every_case
def test_what_may_not_happen_while_perturbed(case):
    net, optimizer = ready(case)
    step(optimizer, net)
    state = optimizer.state_dict()
    joining = {"params": [("w", nn.Parameter(torch.zeros(1)))]}
    attempts = {
        r"perturbed\(\)": lambda: optimizer.perturbed().__enter__(),
        r"step\(\)": optimizer.step,
        r"state_dict\(\)": optimizer.state_dict,
        r"load_state_dict\(\)": lambda: optimizer.load_state_dict(state),
        r"add_param_group\(\)": lambda: optimizer.add_param_group(joining),
    }
    before = net.weights()
    with optimizer.perturbed():
        inside = net.weights()
        for name, attempt in attempts.items():
            with pytest.raises(RuntimeError, match=f"^{name} while the weights are perturbed"):
                attempt()
        assert same(net.weights(), inside)
    assert same(net.weights(), before)
    assert len(optimizer.param_groups) == 1
    with optimizer.perturbed():
        pass
    for name in list(attempts)[1:]:
        attempts[name]()
    assert len(optimizer.param_groups) == 2


@every_case
def test_missing_and_sparse_gradients_are_refused_and_dense_ones_go_on(case):
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = case.make(table.named_parameters(), partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(RuntimeError, match=r"call backward\(\) before perturbed\(\)"), optimizer.perturbed():
        pass
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"(weight|\(5, 3\)).*sparse=False"), optimizer.perturbed():
        pass
    table.weight.grad = table.weight.grad.to_dense()
    assert length(displaced(optimizer, table)) > 0


@every_case
@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, -math.inf, "0.1", None, True])
def test_radii_are_checked_wherever_they_enter(case, bad):
    message = re.escape(f"rho must be a finite number >= 0, got {bad!r}")
    net = Net()
    with pytest.raises(ValueError, match=message):
        case.make(net.named_parameters(), SGD, rho=bad)
    with pytest.raises(ValueError, match=message):
        case.make([{"params": list(net.named_parameters()), "rho": bad}], SGD)
    optimizer = case.make(net.first.named_parameters(), SGD)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": list(net.last.named_parameters()), "rho": bad})
    assert len(optimizer.param_groups) == 1
    if case.optimizer is ASAM:
        with pytest.raises(ValueError, match=re.escape(f"eta must be a finite number >= 0, got {bad!r}")):
            case.make(net.named_parameters(), SGD, eta=bad)


@every_case
def test_unknown_options_and_wrong_bases_are_refused(case):
    net = Net()
    with pytest.raises(TypeError, match="rhoo"):
        case.make(net.named_parameters(), SGD, rhoo=0.1)
    for base in (SGD(net.parameters()), None, partial(SAM, base=SGD), lambda params: None):
        with pytest.raises(TypeError, match="base must"):
            case.make(net.named_parameters(), base)


def test_biases_without_names_are_refused():
    net = Net()
    for params in (net.parameters(), [{"params": list(net.parameters())}]):
        with pytest.raises(ValueError, match="named_parameters"):
            ASAM(params, SGD)
    ASAM(net.parameters(), SGD, normalize_bias=True)
