"""A sharpness-aware optimizer is a whole torch optimizer."""

import warnings
from functools import partial

import pytest
import torch

from cases import (
    SGD,
    Net,
    displaced,
    every_case,
    length,
    ready,
    same,
    step,
)
from sam_lightning import SAM


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
        kept = {"momentum_buffer", case.optimizer.memory} - {""}
        assert [set(state) for state in ours["state"].values()] == [kept] * 4  # and no weights
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
