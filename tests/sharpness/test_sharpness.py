"""Sharpness against brute force in float64, closed forms, invariances, and a network that is as before."""

import copy
import math
import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import forking
import oracles
from cases import Quadratic, Rescaled
from classifier import SAMPLES, Classifier, batches, data
from measures import MEASURES
from regression import state_of
from sam_lightning import ASAM, SAM
from sam_lightning.sharpness import (
    Adaptive,
    Estimate,
    Settings,
    average_case_sharpness,
    hessian_trace,
    largest_eigenvalues,
    measure,
    preserved_state,
    worst_case_sharpness,
)
from sam_lightning.sharpness.adaptive import units
from sam_lightning.sharpness.hessian import Hessian
from sam_lightning.sharpness.objective import Objective

SCALES = [None, Adaptive(), Adaptive(eta=0.01, normalize_bias=False)]
AUTHORS = SCALES[2]
IN_PARTS = ["eigenvalue", "one step", "worst case"]


def scales(named, scale):
    """T, written out."""
    if scale is None:
        return [torch.ones_like(w) for w in named.values()]
    return [
        w.detach().abs() + scale.eta if scale.normalize_bias or "bias" not in name else torch.ones_like(w)
        for name, w in named.items()
    ]


def exact(network, scale=None, batch=None):
    named = network.trained()
    return oracles.curvature(network.of(batch or data()), list(named.values()), scales(named, scale))


# Brute force.


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_eigenvalues_are_the_full_hessians(scale):
    network = Classifier()
    found = largest_eigenvalues(network, network.loss, batches(10), count=4, scale=scale, tolerance=1e-10)
    expected = torch.linalg.eigvalsh(exact(network, scale)[1]).flip(0)[:4]
    assert found == pytest.approx(expected.tolist(), rel=1e-6)
    assert found[0] > 2 * found[3]


def test_largest_is_in_value_and_not_in_magnitude():
    class Saddle(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, dtype=torch.float64))

        def loss(self, batch):
            return (torch.tensor([-9.0, 2.0, 1.0, 0.5]) * self.w.square()).sum() / 2

    saddle = Saddle()
    assert largest_eigenvalues(saddle, saddle.loss, [torch.zeros(1)], count=2) == pytest.approx((2.0, 1.0))


@pytest.mark.parametrize("scale", SCALES[:2], ids=str)
def test_the_trace_is_within_three_standard_errors_and_they_are_right(scale):
    network = Classifier(hidden=3)
    trace = exact(network, scale)[1].trace().item()
    found = [hessian_trace(network, network.loss, batches(SAMPLES), 20, scale, seed=seed) for seed in range(60)]
    errors = [(estimate.mean - trace) / estimate.standard_error for estimate in found]
    assert sum(abs(error) <= 3 for error in errors) >= 0.97 * len(errors)  # 99.2 % of 9,000 draws by hand
    assert stdev(errors) == pytest.approx(1, abs=0.15)
    means = [estimate.mean for estimate in found]
    assert abs(fmean(means) - trace) < 3 * stdev(means) / len(means) ** 0.5  # no bias


def test_a_loss_that_is_linear_has_no_curvature():
    plane = nn.Linear(3, 1, bias=False)
    assert largest_eigenvalues(plane, lambda x: plane(x).mean(), [torch.ones(2, 3)]) == pytest.approx((0.0,))
    assert hessian_trace(plane, lambda x: plane(x).mean(), [torch.ones(2, 3)], draws=2) == Estimate(0.0, 0.0)


NORMS = {
    "running": (nn.BatchNorm2d(4), "running"),
    "batch": (nn.BatchNorm2d(4), "batch"),
    "none kept": (nn.BatchNorm2d(4, track_running_stats=False), "running"),
    "group": (nn.GroupNorm(2, 4), "running"),
    "instance": (nn.InstanceNorm2d(4, affine=True), "running"),
    "layer": (nn.LayerNorm([4, 6, 6]), "running"),
}


@pytest.mark.parametrize(("norm", "mode"), NORMS.values(), ids=NORMS)
def test_curvature_through_normalisation_is_the_gradients_difference(norm, mode):
    """torch's forward mode is wrong through some of them, and not there for others."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), copy.deepcopy(norm), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(16, 3)).double().train()
    x, y = torch.randn(9, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (9,))
    for _ in range(3):
        network(2 * x + 1)

    def loss(batch):
        return cross_entropy(network(batch), y)

    with preserved_state(network, mode):
        objective = Objective(network, loss, [x], units(network, AUTHORS), joint=True)
        v = [torch.randn_like(w) for w in network.parameters()]
        ahead, behind = (objective.value_and_gradient([h * part for part in v])[1] for h in (1e-5, -1e-5))
        difference = torch.cat([(a - b).flatten() / 2e-5 for a, b in zip(ahead, behind, strict=True)])
        product = Hessian(objective, seed=0) @ torch.cat([part.flatten() for part in v])  # at w, wherever it is left
    torch.testing.assert_close(product, difference, rtol=1e-5, atol=1e-7 * product.norm().item())


# The quadratic, whose sharpness is known.


def quadratic(at_minimum=False):
    net = Quadratic()
    if at_minimum:
        for parameter in net.parameters():
            parameter.data.zero_()
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}

    def loss_of(weights):
        values = {**dict(net.named_parameters()), **dict(zip(named, weights, strict=True))}
        z = torch.cat([values[name].flatten() for name in ("weight", "bias", "frozen", "offset")])
        return z @ net.curvature @ z / 2

    return net, named, loss_of, (net, lambda batch: net.loss(), [torch.zeros(3), torch.zeros(5)])


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("rho", [0.1, 2.0])
def test_the_worst_case_of_a_quadratic(scale, rho):
    _, named, loss_of, what = quadratic()
    gradient, hessian = oracles.curvature(loss_of, list(named.values()), scales(named, scale))
    highest = oracles.highest_in_ball(gradient, hessian, rho)
    assert worst_case_sharpness(*what, rho=rho, steps=300, scale=scale) == pytest.approx(highest, rel=1e-6)
    e = rho * gradient / gradient.norm()
    one_step = (gradient @ e + e @ hessian @ e / 2).item()
    assert worst_case_sharpness(*what, rho=rho, scale=scale) == pytest.approx(one_step, rel=1e-9)
    assert one_step < highest


def test_the_worst_case_at_the_minimum_of_a_quadratic():
    _, named, loss_of, what = quadratic(at_minimum=True)
    top = torch.linalg.eigvalsh(oracles.curvature(loss_of, list(named.values()))[1])[-1].item()
    assert worst_case_sharpness(*what, rho=0.3, steps=300) == pytest.approx(0.3**2 * top / 2, rel=1e-6)
    assert worst_case_sharpness(*what, rho=0.3) == 0  # as SAM: no gradient, no direction


def test_the_ascent_keeps_its_highest_point():
    """A loss that falls again before the ball ends: what counts is the maximum over the steps."""

    class Hill(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.1], dtype=torch.float64))

        def loss(self, batch):
            return torch.sin(self.w).sum()

    hill = Hill()
    found = worst_case_sharpness(hill, hill.loss, [torch.zeros(1)], rho=2.5, steps=2)  # to 2.6, and back to 0.1
    assert found == pytest.approx(math.sin(2.6) - math.sin(0.1))


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_one_step_is_the_optimizers_own(scale):
    """To the point where SAM or ASAM takes its second gradient."""
    network = Classifier()
    base = partial(torch.optim.SGD, lr=0.1)
    named = list(network.named_parameters())
    optimizer = (
        SAM(named, base, rho=0.3)
        if scale is None
        else ASAM(named, base, rho=0.3, eta=scale.eta, normalize_bias=scale.normalize_bias)
    )
    before = network.loss(data())
    before.backward()
    with optimizer.perturbed():
        rise = (network.loss(data()) - before).item()
    found = worst_case_sharpness(network, network.loss, batches(6), rho=0.3, scale=scale)
    assert found == pytest.approx(rise, rel=1e-9)


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_the_average_case_of_a_quadratic_is_half_its_trace(scale):
    _, named, loss_of, what = quadratic()
    half = oracles.curvature(loss_of, list(named.values()), scales(named, scale))[1].trace().item() / 2
    found = [average_case_sharpness(*what, sigma=0.2, draws=50, scale=scale, seed=seed) for seed in range(50)]
    errors = [(estimate.mean - 0.2**2 * half) / estimate.standard_error for estimate in found]
    assert sum(abs(error) <= 3 for error in errors) >= 0.98 * len(errors)  # squares of normals: skewed
    assert stdev(errors) == pytest.approx(1, abs=0.2)
    means = [estimate.mean for estimate in found]
    assert abs(fmean(means) - 0.2**2 * half) < 3 * stdev(means) / len(means) ** 0.5  # no bias


def test_a_loss_that_explodes_in_the_ball_is_told():
    class Wall(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0]))

        def loss(self, batch):
            return (300 * self.w).exp().sum().log()

    wall = Wall()
    assert worst_case_sharpness(wall, wall.loss, [torch.zeros(1)], rho=1.0) != pytest.approx(0)
    wall = Wall()
    wall.w.data.fill_(0.0)
    assert worst_case_sharpness(wall, wall.loss, [torch.zeros(1)], rho=1.0, steps=3) == math.inf


# Invariances.


@pytest.mark.parametrize("name", MEASURES)
def test_rescaled_relu_layers_change_plain_measures_and_no_adaptive_ones(name):
    def of(factor, scale):
        net = Rescaled(factor)
        return MEASURES[name](net, lambda batch: net.loss(), [net.x], scale=scale)

    for factor in (4, 1 / 4):
        assert of(factor, Adaptive()) == pytest.approx(of(1, Adaptive()), rel=1e-5)
        assert of(factor, None) != pytest.approx(of(1, None), rel=0.05)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", MEASURES)
def test_measures_of_the_whole_data_do_not_depend_on_the_batch_size(name, norm):
    network = Classifier(norm=norm)
    found = [MEASURES[name](network, network.loss, batches(size), scale=AUTHORS) for size in (SAMPLES, 10, 3)]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-6)


def test_single_precision_depends_on_the_batch_size_by_its_rounding_only():
    network = Classifier().float()
    single = [[(x.float(), y) for x, y in batches(size)] for size in (SAMPLES, 3)]
    whole, cut = (largest_eigenvalues(network, network.loss, given)[0] for given in single)
    assert cut == pytest.approx(whole, rel=1e-6)
    assert whole == pytest.approx(torch.linalg.eigvalsh(exact(network.double())[1])[-1].item(), rel=1e-5)


@pytest.mark.parametrize("name", IN_PARTS)
def test_m_sharpness_is_the_mean_over_parts_by_their_samples(name):
    network = Classifier()
    parts = [(x[i : i + 4], y[i : i + 4]) for x, y in batches(10) for i in range(0, len(x), 4)]
    assert [len(y) for _, y in parts] == [4, 4, 2, 4, 4, 2, 3]
    alone = [MEASURES[name](network, network.loss, [part]) for part in parts]
    expected = sum(len(y) * value for (_, y), value in zip(parts, alone, strict=True)) / SAMPLES
    assert MEASURES[name](network, network.loss, batches(10), m=4) == pytest.approx(expected, rel=1e-6)
    assert expected > 1.01 * MEASURES[name](network, network.loss, batches(10))  # each part has a maximum of its own


@pytest.mark.parametrize("batch", [dict, list, tuple])
def test_batches_of_any_structure(batch):
    network = Classifier()
    x, y = data()
    given = {"x": x, "y": y} if batch is dict else batch([x, y])

    def loss(found):
        assert type(found) is batch
        return network.loss(found.values() if batch is dict else found)

    found = worst_case_sharpness(network, loss, [given], rho=0.1, m=8)
    assert found == worst_case_sharpness(network, network.loss, [(x, y)], rho=0.1, m=8)


def test_a_loader_that_shuffles_is_read_once():
    network = Classifier()
    x, y = data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10, shuffle=True)
    found = worst_case_sharpness(network, network.loss, loader, rho=0.1, steps=5)
    assert found == pytest.approx(worst_case_sharpness(network, network.loss, [(x, y)], rho=0.1, steps=5), rel=1e-9)
    assert worst_case_sharpness(network, network.loss, iter(batches(10)), rho=0.1, steps=5) == pytest.approx(found)


# Modes.


def test_batch_statistics_are_those_of_each_batch():
    network = Classifier(norm=True, dropout=0.5)
    network.norm.running_mean.fill_(0.7)
    rise = {}
    for mode in ("running", "batch"):
        network.eval()
        network.norm.train(mode == "batch")
        losses = []
        weights = list(network.trained().values())
        loss = sum(len(y) * network.loss((x, y)) for x, y in batches(12)) / SAMPLES
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        length = sum(g.square().sum() for g in grads if g is not None).sqrt()
        moved = [w if g is None else w + 0.1 * g / length for w, g in zip(weights, grads, strict=True)]
        losses = [len(y) * network.of((x, y))(moved).item() for x, y in batches(12)]
        rise[mode] = sum(losses) / SAMPLES - loss.item()
        found = worst_case_sharpness(network.train(), network.loss, batches(12), rho=0.1, batch_norm=mode)
        assert found == pytest.approx(rise[mode], rel=1e-6)
    assert rise["batch"] != pytest.approx(rise["running"], rel=0.01)


def test_the_hessian_with_batch_statistics():
    network = Classifier(norm=True).train()
    found = largest_eigenvalues(network, network.loss, batches(SAMPLES), tolerance=1e-9, batch_norm="batch")
    network.norm.track_running_stats = False  # which torch.func cannot update
    assert found[0] == pytest.approx(torch.linalg.eigvalsh(exact(network)[1])[-1].item(), rel=1e-6)


# As before.


def mixed_state():
    """A network with gradients, in modes that differ between layers."""
    network = Classifier(norm=True, dropout=0.5).train()
    network.loss(data()).backward()
    network.frozen.eval()
    return network


def everything(network):
    """What must not change, as comparable values."""
    return {
        "state": {name: value.tolist() for name, value in state_of(network).items()},
        "pointers": [p.data_ptr() for p in network.parameters()],
        "requires": [p.requires_grad for p in network.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in network.parameters()],
        "modes": [module.training for module in network.modules()],
        "tracks": network.norm.track_running_stats,
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("batch_norm", ["running", "batch"])
@pytest.mark.parametrize("name", MEASURES)
def test_the_network_is_as_before(name, batch_norm):
    network = mixed_state()
    before = everything(network)
    MEASURES[name](network, network.loss, batches(10), batch_norm=batch_norm)
    assert everything(network) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", MEASURES)
def test_the_network_is_as_before_after_an_exception(name, error):
    network = mixed_state()
    before = everything(network)
    calls = 0

    def breaking(batch):
        nonlocal calls
        calls += 1
        torch.rand(1)
        if calls == 5:  # in the second pass over three batches
            raise error("broken")
        return network.loss(batch)

    with pytest.raises(error, match="broken"):
        MEASURES[name](network, breaking, batches(10), batch_norm="batch")
    assert everything(network) == before


def test_a_network_that_updates_buffers_in_evaluation_is_as_before():
    class Counter(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.tensor(0.0))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    network = Counter()
    worst_case_sharpness(network, network.loss, batches(10), rho=0.1)
    assert network.calls == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_that_are_expanded_views_are_as_before(dtype):
    """One value in memory stands for many entries."""
    network = nn.Linear(3, 1)
    network.register_buffer("rows", torch.arange(3.0).to(dtype)[:, None].expand(3, 4))
    network.register_buffer("number", torch.ones((), dtype=dtype).expand(2, 2))
    before = {name: (buffer.clone(), buffer.stride(), buffer.data_ptr()) for name, buffer in network.named_buffers()}
    with preserved_state(network):
        for buffer in network.buffers():
            buffer[0, 0] += 1  # in evaluation mode, as some layers do
    for name, buffer in network.named_buffers():
        values, stride, memory = before[name]
        assert torch.equal(buffer, values)
        assert (buffer.stride(), buffer.data_ptr()) == (stride, memory)


def test_measures_work_without_gradients_around_them():
    network = Classifier()
    with torch.no_grad():
        inside = [of(network, network.loss, batches(10)) for of in MEASURES.values()]
        assert not torch.is_grad_enabled()
    assert inside == [of(network, network.loss, batches(10)) for of in MEASURES.values()]


def test_seeds_repeat_and_differ():
    network = Classifier()
    draws = [hessian_trace(network, network.loss, batches(10), seed=seed).mean for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    with preserved_state(network, seed=1):
        first = torch.rand(1)
    with preserved_state(network, seed=1):
        assert torch.equal(torch.rand(1), first)


# All together.


def test_everything_is_measured_as_set():
    network = Classifier()
    what = (network, network.loss, batches(10))
    settings = Settings(rho=0.07, rho_adaptive=0.3, steps=3, sigma=0.02, sigma_adaptive=0.2, draws=4, m=5, seed=6)
    told, passes = [], []  # told as soon as it is found, before the next one's passes

    def loss(batch):
        passes.append(batch)
        return network.loss(batch)

    found = measure(network, loss, what[2], settings, lambda *row: told.append((row, len(passes))))
    for scale, rho, sigma, measures in (
        (None, 0.07, 0.02, found.plain),
        (Adaptive(), 0.3, 0.2, found.adaptive),
    ):
        options = {"scale": scale, "seed": 6}
        assert measures.largest_eigenvalue == largest_eigenvalues(*what, m=5, **options)[0]
        assert measures.trace == hessian_trace(*what, draws=4, **options)
        assert measures.one_step == worst_case_sharpness(*what, rho=rho, m=5, **options)
        assert measures.worst_case == worst_case_sharpness(*what, rho=rho, steps=3, m=5, **options)
        assert measures.average_case == average_case_sharpness(*what, sigma=sigma, draws=4, **options)
    rows = found.rows()
    assert rows["adaptive_trace"] == (found.adaptive.trace.mean, found.adaptive.trace.standard_error)
    assert rows["worst_case"] == (found.plain.worst_case, None)
    assert [row for row, _ in told] == [(name, *row) for name, row in rows.items()]
    assert all(before < after for (_, before), (_, after) in pairwise(told))
    assert len(rows) == 10


def test_an_estimate_is_mean_and_standard_error():
    assert Estimate.of([1.0, 2.0, 6.0]) == Estimate(3.0, pytest.approx(math.sqrt(7 / 3)))


# What is refused.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *what: worst_case_sharpness(*what, rho=-1.0), "rho must be a finite number >= 0, got -1.0"),
        (lambda *what: worst_case_sharpness(*what, rho=0.1, steps=0), "steps must be an integer >= 1, got 0"),
        (lambda *what: worst_case_sharpness(*what, rho=0.1, m=0), "m must be an integer >= 1, or None .*got 0"),
        (lambda *what: worst_case_sharpness(*what, rho=0.1, batch_norm="eval"), "batch_norm must be .*got 'eval'"),
        (lambda *what: average_case_sharpness(*what, sigma=math.nan), "sigma must be a finite number >= 0, got nan"),
        (lambda *what: average_case_sharpness(*what, sigma=0.1, draws=1), "draws must be an integer >= 2.*got 1"),
        (lambda *what: hessian_trace(*what, draws=1), "draws must be an integer >= 2.*got 1"),
        (lambda *what: largest_eigenvalues(*what, count=10**6), "from 1 to the 49 weights, got 1000000"),
        (lambda *what: largest_eigenvalues(*what, tolerance=0.0), r"tolerance must be in \(0, 1\), got 0.0"),
        (lambda *what: worst_case_sharpness(what[0].frozen, *what[1:], rho=0.1), "no parameter with requires_grad"),
        (lambda *what: worst_case_sharpness(*what[:2], [], rho=0.1), "batches must hold at least one sample"),
    ],
)
def test_bad_values_are_refused(call, message):
    network = Classifier()
    with pytest.raises(ValueError, match=message):
        call(network, network.loss, batches(10))


def test_bad_losses_and_batches_are_refused():
    network = Classifier()
    with pytest.raises(TypeError, match=r"0-dimensional tensor, got \(10, 3\)"):
        worst_case_sharpness(network, lambda batch: network(batch[0]), batches(10), rho=0.1)
    with pytest.raises(TypeError, match="first dimension counts samples, got int"):
        worst_case_sharpness(network, network.loss, [1], rho=0.1)


def test_a_hessian_that_is_not_finite_is_an_error():
    network = Classifier()
    network.last.weight.data.fill_(math.inf)
    with pytest.raises(RuntimeError, match="the Hessian is not finite"):
        largest_eigenvalues(network, network.loss, batches(10))


# Several processes.


def shared_out():
    """(all batches, those of rank 0, those of rank 1): shares of different sizes."""
    given = batches(5)
    return given, given[:1], given[1:]


def in_processes(folder):
    """Runs in each of two processes."""
    torch.distributed.init_process_group("gloo")
    try:
        rank = torch.distributed.get_rank()
        network = Classifier()
        share = shared_out()[1 + rank]
        found = {name: of(network, network.loss, share, scale=AUTHORS) for name, of in MEASURES.items()}
        found |= {f"{name} in parts": MEASURES[name](network, network.loss, share, m=3) for name in IN_PARTS}
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_processes_measure_their_data_together(tmp_path):
    path = [str(Path(__file__).parent), *sys.path]
    code = f"import sys; sys.path[:0] = {path!r}\nimport test_sharpness as t\nt.in_processes({str(tmp_path)!r})"
    (tmp_path / "worker.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(tmp_path / "worker.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = forking.run(command, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    network = Classifier()
    what = (network, network.loss, shared_out()[0])
    expected = {name: of(*what, scale=AUTHORS) for name, of in MEASURES.items()}
    expected |= {f"{name} in parts": MEASURES[name](*what, m=3) for name in IN_PARTS}
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt") == pytest.approx(expected, rel=1e-6)
