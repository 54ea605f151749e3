"""Schedules of the radius."""

import math
import pickle

import pytest
import torch

from cases import SGD, Net
from sam_lightning import SAM
from sam_lightning.optim.radius_schedules import Progress, end_schedule, follow_lr, follow_schedule, late, warm_up


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (late(0.0), [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (late(0.9), [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        (late(0.85), [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        (late(0.7), [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]),
        (late(1.0), [0] * 10),
        (warm_up(4), [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        (warm_up(4, gradual=False), [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]),
        (follow_lr(), [0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01]),
        (follow_lr(0.5), [0.55, 0.545, 0.54, 0.535, 0.53, 0.525, 0.52, 0.515, 0.51, 0.505]),
    ],
)
def test_factors(schedule, factors):
    schedule = pickle.loads(pickle.dumps(schedule))  # as a part of a module or callback
    progress = [Progress(step, 10, lr=0.02 * (1 - step / 10), initial_lr=0.2) for step in range(10)]
    assert [schedule(p) for p in progress] == pytest.approx(factors)
    assert [schedule(p) for p in reversed(progress)] == pytest.approx(factors[::-1])  # no state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: late(1.1), "start must be a share"),
        (lambda: late(math.nan), "start must be a share"),
        (lambda: warm_up(0), "steps must be an integer >= 1, got 0"),
        (lambda: warm_up(2.5), "steps must be an integer >= 1, got 2.5"),
        (lambda: follow_lr(-0.1), "lowest must be a factor"),
        (lambda: late(0.5)(Progress(3)), "how long training is"),
        (lambda: follow_lr()(Progress(3, initial_lr=0.0)), "initial_lr must be > 0"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_late_begins_in_the_step_that_its_share_names_though_the_product_is_a_little_more():
    assert 0.07 * 100 > 7
    assert [late(0.07)(Progress(step, 100)) for step in (6, 7)] == [0, 1]


def test_late_takes_one_pass_before_and_two_after():
    net = Net()
    optimizer = SAM(net.parameters(), SGD, rho=0.3)
    passes = []
    for step in range(4):
        optimizer.param_groups[0]["rho"] = 0.3 * late(0.5)(Progress(step, 4))
        optimizer.zero_grad()
        net.loss().backward()
        with optimizer.perturbed() as perturbs:
            passes.append(1 + perturbs)
        optimizer.step()
    assert passes == [1, 1, 2, 2]


def rates_and_radii(make, steps=12):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1, rho=0.5)
    scheduler = make(optimizer)
    seen = []
    for step in range(steps):
        follow_schedule(optimizer, follow_lr(), step, steps)
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["rho"]))
        weight.square().sum().backward()
        with optimizer.perturbed():
            pass
        optimizer.step()
        scheduler(optimizer, step)
    return seen


def test_the_radius_never_exceeds_its_own_whatever_the_rate_does():
    def one_cycle(optimizer):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=20)
        return lambda *_: scheduler.step()

    def by_hand(_):
        def warm(optimizer, step):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.5 ** max(0, step - 5)

        return warm

    cycle = rates_and_radii(one_cycle)
    assert all(rho == pytest.approx(0.5 * lr / 0.4) for lr, rho in cycle)
    assert max(rho for _, rho in cycle) <= 0.5
    hand = rates_and_radii(by_hand)
    assert [rho for _, rho in hand] == pytest.approx([0.5 * lr / 0.1 for lr, _ in hand])
    assert hand[-1][1] < 0.5


def test_a_radius_that_a_schedule_has_left_is_given_back():
    optimizer = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, rho=0.5)
    follow_schedule(optimizer, late(0.9), 0, 10)
    assert optimizer.param_groups[0]["rho"] == 0
    end_schedule(optimizer)
    assert optimizer.param_groups[0]["rho"] == 0.5
    assert "initial_rho" not in optimizer.param_groups[0]
