"""Steps and displacements of every method against written-out ones, and their properties."""

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
    crossed,
    displaced,
    every_case,
    length,
    name_of,
    one_group,
    ready,
    same,
    several_groups,
    step,
)
from sam_lightning import ASAM, SAM, SharpnessAware


def usual(case, base, loss, groups):
    return base == "momentum" or (loss, groups) == (Net, several_groups)


@pytest.mark.parametrize(
    ("case", "base", "loss", "groups"),
    crossed([Net, Quadratic], [one_group, several_groups], usual=usual),
    ids=name_of,
)
def test_seven_steps_equal_the_written_out_ones(case, base, loss, groups):
    net, twin = loss(), loss()
    names = [name for name, _ in net.named_parameters()]
    factory, oracle = BASES[base]
    params, radii, rates = groups(list(net.named_parameters()))
    optimizer = case.make(params, factory, rho=0.3)
    method, written_out = case.oracle(names, **case.options), oracle()
    for _ in range(7):
        step(optimizer, net)
    oracles.sharpness_aware_steps(7, list(twin.parameters()), twin.loss, method, written_out, radii, rates)
    for name, ours, reference in zip(names, net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12, msg=name)


def test_the_methods_are_different_ones():
    """What an oracle test would not see if all rows shared a mistake."""
    ends = []
    for case in CASES:
        net, optimizer = ready(case)
        for _ in range(6):
            step(optimizer, net)
        ends.append(torch.cat([w.flatten() for w in net.weights()]))
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert (a - b).norm() > 1e-4


def momenta(optimizer, net, sign):
    found = [optimizer.state.get(p, {}).get("momentum_buffer") for p in net.parameters()]
    return [None if v is None else sign * v for v in found]


@every_case
@pytest.mark.parametrize("scale", [1.0, 1e-4, 65536.0])
def test_the_displacement_reaches_the_ball_and_no_loss_scale_changes_it(case, scale):
    net, optimizer = ready(case)
    uphill = [p.grad for p in net.parameters()] if case.has_first_pass else momenta(optimizer, net, -1)
    unscaled = displaced(optimizer, net)
    optimizer.zero_grad()
    (net.loss() * scale).backward()
    # A unit direction does not depend on the scale and need not be told it.
    e = displaced(optimizer, net, 1.0 if case.reaches_the_ball else scale)
    if case.reaches_the_ball:
        in_units = [a / t for a, t in zip(e, case.scales(net.named_parameters()), strict=True)]
        assert length(in_units) == pytest.approx(0.3)
    assert length([a - b for a, b in zip(e, unscaled, strict=True)]) < 1e-6 * length(unscaled)
    assert sum((a * g).sum() for a, g in zip(e, uphill, strict=True) if g is not None) > 0


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
    with optimizer.perturbed():
        moved = [p.detach() - w for p, w in zip(net.parameters(), before, strict=True)]
        assert all(p.grad is grad for p, grad in zip(weights, objects, strict=True))
        assert same(objects, grads)
    for e, found in zip(
        unit, (e for e, p in zip(moved, net.parameters(), strict=True) if p in set(weights)), strict=True
    ):
        torch.testing.assert_close(found, 0.3 * e, rtol=0, atol=1e-15)


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
