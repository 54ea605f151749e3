"""SAM and ASAM against written-out steps, and the contract that every row of `cases` keeps."""

import copy
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import oracles
from cases import BASES, CASES, SGD, Net, step
from sam_lightning import ASAM, SAM, SharpnessAware

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def displaced(optimizer, parameters):
    """e, by looking inside."""
    before = [p.detach().clone() for p in parameters]
    with optimizer.perturbed():
        return [p.detach() - w for p, w in zip(parameters, before, strict=True)]


def length(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm().item()


# Oracles.


@every_case
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("groups", ["one", "several"])
@pytest.mark.parametrize("steps", [1, 5])
def test_steps_equal_the_written_out_ones(case, base, groups, steps):
    net, twin = Net(), Net()
    names = [name for name, _ in net.named_parameters()]
    factory, oracle = BASES[base]
    if groups == "one":
        params, radii, rates = net.named_parameters(), [0.3] * len(names), [None] * len(names)
    else:  # `frozen` and `unused` in the middle; the last layer's bias is not perturbed
        named = dict(net.named_parameters())
        parts = {0.3: names[:3], 0.7: names[3:7], 0.0: names[7:]}
        params = [{"params": [(n, named[n]) for n in part], "rho": rho, "lr": 0.02} for rho, part in parts.items()]
        del params[1]["lr"]
        radii = [rho for rho, part in parts.items() for _ in part]
        rates = [None if rho == 0.7 else 0.02 for rho in radii]
    optimizer = case.make(params, factory, rho=0.3)
    for _ in range(steps):
        step(optimizer, net)
    options = {"names": names, **case.options} if case.optimizer is ASAM else {}
    torch.set_default_dtype(torch.float64)
    try:
        parameters = list(twin.parameters())
        oracles.sharpness_aware_steps(
            steps, parameters, twin.loss, case.displacements, oracle(), radii, rates, **options
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for name, ours, reference in zip(names, net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12, msg=name)


def test_the_forms_are_different_methods():
    """What an oracle test would not see if all rows shared a mistake."""
    found = []
    for case in CASES:
        net = Net()
        optimizer = case.make(net.named_parameters(), SGD, rho=0.3)
        net.loss().backward()
        found.append(torch.cat([e.flatten() for e in displaced(optimizer, list(net.parameters()))]))
    for i, a in enumerate(found):
        for b in found[:i]:
            assert torch.cosine_similarity(a, b, dim=0) < 0.999


# Properties.


@every_case
@pytest.mark.parametrize("scale", [1.0, 1e-4, 65536.0])
def test_the_displacement_reaches_the_ball_and_no_loss_scale_changes_it(case, scale):
    net = Net()
    optimizer = case.make(net.named_parameters(), SGD, rho=0.3)
    (net.loss() * scale).backward()
    e = displaced(optimizer, list(net.parameters()))
    T = [
        torch.ones_like(p)
        if case.optimizer is SAM or ("bias" in name and not case.options["normalize_bias"])
        else p.detach().abs() + case.options["eta"]
        for name, p in net.named_parameters()
    ]
    assert length([a / t for a, t in zip(e, T, strict=True)]) == pytest.approx(0.3, rel=1e-7)
    uphill = sum((a * p.grad).sum() for a, p in zip(e, net.parameters(), strict=True) if p.grad is not None)
    assert uphill > 0


@every_case
def test_grouping_changes_nothing(case):
    results = []
    for sizes in ([8], [3, 5], [1] * 8):
        net = Net()
        named = iter(list(net.named_parameters()))
        groups = [{"params": [next(named) for _ in range(size)]} for size in sizes]
        optimizer = case.make(groups, SGD, rho=0.3)
        for _ in range(3):
            step(optimizer, net)
        results.append(net.weights())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_only_asam_without_eta_is_invariant_to_rescaling():
    def perturbed_loss(make, factor):
        generator = torch.Generator().manual_seed(5)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        for p in net.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (20,), generator=generator)
        net[0].weight.data *= factor
        net[0].bias.data *= factor
        net[2].weight.data /= factor
        optimizer = make(net.named_parameters(), base=SGD, rho=0.3)
        nn.functional.cross_entropy(net(x), y).backward()
        with optimizer.perturbed():
            return nn.functional.cross_entropy(net(x), y).item()

    invariant = partial(ASAM, eta=0.0, normalize_bias=True)
    assert perturbed_loss(invariant, 4) == pytest.approx(perturbed_loss(invariant, 1), rel=1e-10)
    for make in (SAM, ASAM, partial(ASAM, eta=0.1, normalize_bias=True), partial(ASAM, eta=0.0)):
        assert perturbed_loss(make, 4) != pytest.approx(perturbed_loss(make, 1), rel=1e-3)


@every_case
def test_displacement_is_pure_and_leaves_the_gradients(case):
    net = Net()
    optimizer = case.make(net.named_parameters(), SGD)
    net.loss().backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    weights = [p for p in net.parameters() if p.grad is not None]
    before = [w.detach().clone() for w in weights]
    optimizer.displacement(weights, [w.grad for w in weights])
    assert same(before, [w.detach() for w in weights])
    with optimizer.perturbed():
        for name, parameter in net.named_parameters():
            assert parameter.grad is None or torch.equal(parameter.grad, grads[name])


def test_biases_are_told_by_their_own_name():
    cell = nn.LSTM(3, 4).double()
    norm = nn.ModuleDict({"bias_of_image": nn.Linear(3, 4, dtype=torch.float64)})
    named = [*cell.named_parameters(), *norm.named_parameters()]
    optimizer = ASAM(named, SGD, rho=1.0)
    for _, p in named:
        p.grad = torch.ones_like(p)
    e = displaced(optimizer, [p for _, p in named])
    biases = {name for (name, _), a in zip(named, e, strict=True) if (a == a.flatten()[0]).all()}
    assert biases == {"bias_ih_l0", "bias_hh_l0", "bias_of_image.bias"}


# The contract.


@every_case
@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_the_base_optimizer(case, base):
    net, plain = Net(), Net()
    optimizer = case.make(net.named_parameters(), BASES[base][0], rho=0.0)
    other = BASES[base][0](plain.parameters())
    for _ in range(3):
        step(optimizer, net)
        other.zero_grad()
        plain.loss().backward()
        other.step()
    assert same(net.weights(), plain.weights())


@every_case
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError, GeneratorExit])
def test_weights_come_back_bit_for_bit_whatever_happens(case, error):
    net = Net(torch.float32)
    optimizer = case.make(net.named_parameters(), SGD, rho=0.3)
    net.loss().backward()
    before, storage = net.weights(), [p.data_ptr() for p in net.parameters()]

    def body():
        with optimizer.perturbed():
            moved.extend(net.weights())
            with torch.no_grad():
                for p in [*net.first.parameters(), *net.last.parameters()]:
                    p.fill_(math.nan)
            raise error

    moved = []
    with pytest.raises(error):
        body()
    assert not same(moved, before)
    assert same(net.weights(), before)
    assert storage == [p.data_ptr() for p in net.parameters()]
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
    assert same(net.weights(), before)
    assert all(p.dtype is dtype for p in net.parameters())


@every_case
def test_gradients_in_one_pass_only(case):
    net = Net()
    optimizer = case.make(net.named_parameters(), partial(torch.optim.SGD, lr=0.1), rho=0.3)
    before = net.weights()
    net.loss().backward()
    with optimizer.perturbed():
        optimizer.zero_grad()
        (net.unused.weight.sum() + net.last.weight.sum()).backward()
    assert same(net.weights(), before)
    optimizer.step()
    changed = {n for (n, p), w in zip(net.named_parameters(), before, strict=True) if not torch.equal(p, w)}
    assert changed == {"unused.weight", "last.weight"}


@every_case
def test_a_zero_gradient_moves_nothing(case):
    net = Net()
    optimizer = case.make(net.named_parameters(), SGD)
    (net.loss() * 0).backward()
    assert length(displaced(optimizer, list(net.parameters()))) == 0


@every_case
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_moves_nothing(case, bad):
    net = Net()
    optimizer = case.make(net.named_parameters(), SGD)
    net.loss().backward()
    net.last.weight.grad[0, 0] = bad
    assert length(displaced(optimizer, list(net.parameters()))) == 0


@every_case
def test_the_norm_of_half_precision_gradients_does_not_overflow(case):
    net = Net(torch.float16)
    optimizer = case.make(net.named_parameters(), SGD, rho=0.3)
    for p in net.parameters():
        p.grad = torch.full_like(p, 3e4)  # its square is beyond float16
    double = Net()
    for p, half in zip(double.parameters(), net.parameters(), strict=True):
        p.data, p.grad = half.detach().double(), half.grad.double()
    reference = displaced(case.make(double.named_parameters(), SGD, rho=0.3), list(double.parameters()))
    for e, expected in zip(displaced(optimizer, list(net.parameters())), reference, strict=True):
        torch.testing.assert_close(e.double(), expected, rtol=1e-2, atol=2e-3)  # float16 near 1: steps of 1e-3


def test_tied_parameters_move_once():
    net = Net()
    net.second = net.last
    optimizer = SAM(net.named_parameters(), SGD, rho=0.3)
    net.loss().backward()
    assert length(displaced(optimizer, list(net.parameters()))) == pytest.approx(0.3)


@every_case
@pytest.mark.parametrize("base", BASES)
def test_a_saved_state_goes_on_bit_for_bit(case, base):
    net = Net()
    optimizer = case.make(net.named_parameters(), BASES[base][0])
    for _ in range(3):
        step(optimizer, net)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    for _ in range(3):
        step(optimizer, net)

    resumed = Net(seed=1)
    resumed.x, resumed.y = net.x, net.y
    resumed.load_state_dict(weights)
    other = case.make(resumed.named_parameters(), BASES[base][0])
    other.load_state_dict(state)
    for _ in range(3):
        step(other, resumed)
    assert same(resumed.weights(), net.weights())


@every_case
def test_groups_state_and_state_dict_are_the_bases_own(case):
    net = Net()
    optimizer = case.make(net.named_parameters(), SGD, rho=0.3)
    step(optimizer, net)
    for _ in range(2):
        assert optimizer.param_groups is optimizer.base.param_groups
        assert optimizer.state is optimizer.base.state
        assert optimizer.defaults is optimizer.base.defaults
        assert optimizer.state_dict().keys() == {"state", "param_groups"}
        optimizer.load_state_dict(optimizer.state_dict())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["momentum"] == 0.9

    plain = SGD(net.parameters())
    plain.load_state_dict(SGD(net.parameters()).state_dict())
    optimizer.load_state_dict(plain.state_dict())  # no rho in it: the present one stays
    assert optimizer.param_groups[0]["rho"] == 0.3


@every_case
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_stands_by_itself(case, how):
    net = Net()
    optimizer = case.make(net.named_parameters(), SGD)
    step(optimizer, net)
    before = net.weights()
    other = how(optimizer)
    assert other.param_groups is other.base.param_groups is not optimizer.param_groups
    for group in other.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    with other.perturbed():
        pass
    other.step()
    assert same(net.weights(), before)


@every_case
def test_schedulers_act_on_the_base(case):
    net = Net()
    optimizer = case.make(net.named_parameters(), SGD)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        step(optimizer, net)
        scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.025)


@every_case
def test_hooks_of_torch_run(case):
    net, seen = Net(), []
    optimizer = case.make(net.named_parameters(), SGD)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    step(optimizer, net)
    assert seen == ["before", "after"]


def test_a_radius_may_follow_a_schedule_and_groups_may_join():
    net = Net()
    optimizer = SAM(net.first.named_parameters(), SGD, rho=0.3)
    optimizer.add_param_group({"params": list(net.last.named_parameters()), "rho": 0.0})
    optimizer.add_param_group({"params": list(net.unused.named_parameters())})
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.0, 0.3]
    optimizer.param_groups[0]["rho"] = 0.9
    net.loss().backward()
    assert length(displaced(optimizer, list(net.parameters()))) == pytest.approx(0.9)


def test_a_step_without_ascent_warns_once():
    net = Net()
    optimizer = SAM(net.parameters(), SGD)
    net.loss().backward()
    with pytest.warns(UserWarning, match=r"SAM.step\(\) without perturbed\(\) before it is a plain SGD step"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        quiet = SAM(net.parameters(), SGD)
        step(quiet, net)
        still = SAM(net.parameters(), SGD, rho=0.0)
        still.step()


def test_a_closure_is_evaluated_where_the_weights_are():
    net = Net()
    optimizer = SAM(net.parameters(), partial(torch.optim.SGD, lr=0.1))
    net.loss().backward()
    with optimizer.perturbed():
        pass
    loss = net.loss().item()
    assert optimizer.step(lambda: net.loss().item()) == loss


# Refusals.


@every_case
def test_what_may_not_happen_while_perturbed(case):
    net = Net()
    optimizer = case.make(net.named_parameters(), SGD)
    state = optimizer.state_dict()
    net.loss().backward()
    attempts = {
        r"perturbed\(\)": lambda: optimizer.perturbed().__enter__(),
        r"step\(\)": optimizer.step,
        r"state_dict\(\)": optimizer.state_dict,
        r"load_state_dict\(\)": lambda: optimizer.load_state_dict(state),
        r"add_param_group\(\)": lambda: optimizer.add_param_group({"params": [("w", torch.zeros(1))]}),
    }
    before = net.weights()
    with optimizer.perturbed():
        for name, attempt in attempts.items():
            with pytest.raises(RuntimeError, match=f"^{name} while the weights are perturbed"):
                attempt()
    assert same(net.weights(), before)
    optimizer.state_dict()


@every_case
def test_no_gradient_at_all_is_an_error(case):
    optimizer = case.make(Net().named_parameters(), SGD)
    with pytest.raises(RuntimeError, match=r"call backward\(\) before perturbed\(\)"), optimizer.perturbed():
        pass


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = SAM(table.parameters(), partial(torch.optim.SGD, lr=0.1))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(5, 3\).*sparse=False"), optimizer.perturbed():
        pass


@every_case
@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "0.1", None, True])
def test_radii_are_checked_wherever_they_enter(case, bad):
    message = "rho must be a finite number >= 0, got "
    net = Net()
    with pytest.raises(ValueError, match=message):
        case.make(net.named_parameters(), SGD, rho=bad)
    with pytest.raises(ValueError, match=message):
        case.make([{"params": list(net.named_parameters()), "rho": bad}], SGD)
    optimizer = case.make(net.first.named_parameters(), SGD)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": list(net.last.named_parameters()), "rho": bad})
    if case.optimizer is ASAM:
        with pytest.raises(ValueError, match="eta must be a finite number >= 0, got "):
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
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        ASAM(net.parameters(), SGD)
    ASAM(net.parameters(), SGD, normalize_bias=True)


def test_the_shell_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        SharpnessAware(Net().parameters(), SGD, 0.1)
