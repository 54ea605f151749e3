"""Loss scaling with overflows, half precision, and the range of norms."""

import io
import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from cases import BASES, SGD, Net, crossed, displaced, every_case, length, name_of, same, step
from sam_lightning import ASAM, SAM
from sam_lightning.tensors import global_norm, norms


def scaled_step(optimizer, net, scaler, overflow=None, as_tensor=False):
    """One step under loss scaling; an overflow in one of the passes is found by the scaler, as in training."""
    scale = scaler.get_scale()
    optimizer.zero_grad()
    bad = 1.0
    if optimizer.needs_first_gradient:
        scaler.scale(net.loss()).backward()
        if overflow == "first":
            next(p for p in net.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
            bad = math.inf
    with optimizer.perturbed(torch.tensor(scale) if as_tensor else scale) as perturbs:
        if perturbs:
            optimizer.zero_grad()
            (scaler.scale(net.loss()) * bad).backward()
        if overflow == "second":
            next(p for p in net.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan
    scaler.step(optimizer)
    scaler.update()


@every_case
@pytest.mark.parametrize("as_tensor", [False, True])
def test_loss_scaling_changes_no_bit_whatever_the_scale_does(case, as_tensor):
    """Scales are powers of two; skipped steps leave memory and counters as they were."""
    net, plain = Net(), Net()
    optimizer, reference = (case.make(n.named_parameters(), BASES["adamw"][0], rho=0.3) for n in (net, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    overflows = {2: "first", 5: "second", 6: "second"}
    if not case.has_first_pass:
        overflows[2] = "second"
    for t in range(12):
        before = net.weights()
        scaled_step(optimizer, net, scaler, overflows.get(t), as_tensor)
        if t in overflows:
            assert same(net.weights(), before)
        else:
            step(reference, plain)
        if as_tensor:  # of which memories take a multiple by two operations instead of one
            torch.testing.assert_close(net.weights(), plain.weights(), rtol=0, atol=1e-14)
        else:
            assert same(net.weights(), plain.weights())
    assert optimizer.steps == reference.steps == 9


@every_case
def test_resume_after_a_skipped_step_within_an_interval(case):
    """From a checkpoint by torch's plain and by its distributed saving."""
    net = Net()
    optimizer = case.make(net.named_parameters(), BASES["adamw"][0], rho=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(5):
        scaled_step(optimizer, net, scaler, "second" if t in (1, 4) else None)
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict(), scaler.state_dict()), file)
    for _ in range(5):
        scaled_step(optimizer, net, scaler)
    file.seek(0)
    weights, state, scale = torch.load(file, weights_only=True)
    resumed = Net(seed=1)
    resumed.load_state_dict(weights)
    resumed.x, resumed.y = net.x, net.y
    other = case.make(resumed.named_parameters(), BASES["adamw"][0], rho=0.9)
    other.load_state_dict(state)
    scaler.load_state_dict(scale)
    for _ in range(5):
        scaled_step(other, resumed, scaler)
    assert same(net.weights(), resumed.weights())


@pytest.mark.parametrize(
    ("case", "base"),
    crossed(usual=lambda case, base: base == "adam" or case.name == "friendly"),
    ids=name_of,
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_goes_on_bit_for_bit(case, base, tmp_path):
    def make(net):
        named = [(name, p) for name, p in net.named_parameters() if "unused" not in name and p.requires_grad]
        return case.make(named, BASES[base][0], rho=0.3)

    net = Net()
    optimizer = make(net)
    for _ in range(4):
        step(optimizer, net)
    dcp.save({"net": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=tmp_path)
    resumed = Net(seed=1)
    resumed.x, resumed.y = net.x, net.y
    other = make(resumed)
    state = {"net": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other)}  # makes state
    assert other.steps == 0
    dcp.load(state, checkpoint_id=tmp_path)
    resumed.load_state_dict(state["net"])
    set_optimizer_state_dict(resumed, other, state["optimizer"])
    assert other.steps == 4
    for _ in range(5):
        step(optimizer, net)
        step(other, resumed)
    assert same(net.weights(), resumed.weights())


# Half precision.


@pytest.mark.parametrize("make", [SAM, ASAM], ids=["sam", "asam"])
def test_float16_weights_with_tiny_gradients_stay_finite_and_reach_the_ball(make):
    w = nn.Parameter(torch.full((100,), 1.0, dtype=torch.half))
    w.grad = torch.full_like(w, 1e-6)
    w.grad[0] = 0.0
    optimizer = make([("w", w)], SGD, rho=0.5)
    before = w.detach().clone()
    with optimizer.perturbed():
        assert w.isfinite().all()
        assert w[0] == before[0]
        e = (w.detach() - before).float()
    assert (e / (1.01 if make is ASAM else 1)).norm().item() == pytest.approx(0.5, rel=0.02)


# Range.


@pytest.mark.parametrize("make", [SAM, ASAM], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exponent", [-37, -30, -22.5, -20, -12, 0, 15, 18, 30, 36])
def test_every_finite_gradient_reaches_the_ball(make, dtype, exponent):
    w = nn.Parameter(torch.zeros(1000, dtype=dtype))
    w.grad = torch.full_like(w, 10.0**exponent)
    optimizer = make([("bias", w)], SGD, rho=0.5)
    assert length([e.double() for e in displaced(optimizer, nn.ParameterList([w]))]) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("exponent", [-37, -30, 0, 30, 33])
def test_every_finite_gradient_reaches_asams_ball_around_weights_of_any_size(exponent, size):
    w = nn.Parameter(torch.full((1000,), size))
    w.grad = torch.full_like(w, 10.0**exponent)
    optimizer = ASAM([("weight", w)], SGD, rho=0.5)
    e = displaced(optimizer, nn.ParameterList([w]))[0].double()
    assert e.norm().item() / (size + optimizer.eta) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("on_host", [True, False])
def test_norms_of_types_together(monkeypatch, on_host):
    monkeypatch.setattr(norms, "_is_on_host", lambda tensor: on_host)
    tensors = [torch.full((50,), 2.0, dtype=d) for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
    assert global_norm(tensors).item() == pytest.approx(math.sqrt(50 * 4 * 4))
    assert global_norm([torch.tensor([3 + 4j])]).item() == pytest.approx(5.0)
    assert global_norm([]).item() == 0.0
    assert math.isnan(global_norm([torch.tensor([1.0, math.nan])]).item())
    assert global_norm([torch.tensor([1.0, -math.inf])]).item() == math.inf


@pytest.mark.parametrize("exponent", [-37, -21, 0, 21, 36])
def test_the_norm_of_pieces_that_are_made_one_by_one(exponent):
    parts = [torch.randn(50, generator=torch.Generator().manual_seed(i)) * 10.0**exponent for i in range(3)]
    exact = torch.cat(parts).double().norm().item()
    assert norms.norm_of_pieces(lambda: ([part] for part in parts)).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_one_large_tensor(dtype):
    x = torch.empty(10_000_000, dtype=dtype).normal_(generator=torch.Generator().manual_seed(0))
    exact = math.sqrt(sum(part.double().square().sum().item() for part in x.split(2**20)))
    assert global_norm([x]).item() == pytest.approx(exact, rel=3e-5)
    assert global_norm([x.view(2000, 5000).T]).item() == pytest.approx(exact, rel=3e-5)
