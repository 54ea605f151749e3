"""What code that knows nothing of two passes does with an optimizer, and bases of all kinds."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from cases import SGD, Net, displaced, every_case, length, ready, same, step
from sam_lightning import ASAM, SAM


def trained(optimizer, net, steps=5):
    for _ in range(steps):
        step(optimizer, net)
    return net.weights()


# Two other ways to make one.


@every_case
def test_the_bases_class_and_options_are_as_good_as_a_partial(case):
    net, other = Net(), Net()
    by_class = case.make(net.named_parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3)
    assert same(trained(by_class, net), trained(case.make(other.named_parameters(), SGD, rho=0.3), other))


@every_case
def test_around_shares_groups_and_state_and_leaves_schedulers_attached(case):
    net, other = Net(), Net()
    existing = SGD(net.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(existing, 0.5)
    optimizer = case.optimizer.around(existing, names=net, rho=0.3, **case.options)
    reference = case.make(other.named_parameters(), SGD, rho=0.3)
    on_shell = torch.optim.lr_scheduler.ExponentialLR(reference, 0.5)
    assert optimizer.base is existing
    assert optimizer.param_groups is existing.param_groups
    for _ in range(3):
        step(optimizer, net)
        step(reference, other)
        scheduler.step()  # warnings are errors: its own step was seen
        on_shell.step()
    assert existing.param_groups[0]["lr"] == pytest.approx(0.0125)
    assert same(net.weights(), other.weights())


def test_around_takes_names_in_any_form_and_optimizers_only():
    for names in (Net(), Net().named_parameters()):
        with pytest.raises(ValueError, match="around: names=model"):
            ASAM.around(SGD(Net().parameters()), names=names, rho=0.5)  # names of other parameters
    net = Net()
    named = SGD(net.named_parameters())
    assert set(ASAM.around(named, rho=0.5).names.values()) == {name for name, _ in net.named_parameters()}
    with pytest.raises(TypeError, match=r"SAM.around takes a torch optimizer, got partial"):
        SAM.around(SGD, rho=0.5)
    with pytest.raises(TypeError, match="SAM hands lr on to its base"):
        SAM.around(named, lr=0.1)


def test_a_group_may_bring_its_radius_to_around():
    net = Net()
    groups = [{"params": net.first.parameters(), "rho": 0.7}, {"params": net.last.parameters()}]
    assert [group["rho"] for group in SAM.around(SGD(groups), rho=0.1).param_groups] == [0.7, 0.1]


def test_a_second_around_with_another_radius_is_refused():
    existing = SGD(Net().parameters())
    SAM.around(existing, rho=0.1)
    for options in ({"rho": 0.1}, {}):  # the same, or none: goes on with it
        assert SAM.around(existing, **options).param_groups[0]["rho"] == 0.1
    with pytest.raises(ValueError, match=r"was given rho=0.5, and this SGD keeps rho=0.1 from an earlier use"):
        SAM.around(existing, rho=0.5)


# What others do with it.


@every_case
def test_groups_state_and_defaults_may_be_replaced(case):
    net, optimizer = ready(case)
    step(optimizer, net)
    saved = copy.deepcopy((optimizer.state_dict(), net.state_dict()))
    ends = []
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(saved[0]))
        net.load_state_dict(saved[1])
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]  # as Lightning's BaseFinetuning
        optimizer.state = copy.copy(optimizer.state)
        optimizer.defaults = dict(optimizer.defaults)
        assert optimizer.base.param_groups is optimizer.param_groups
        assert optimizer.base.state is optimizer.state
        ends.append(trained(optimizer, net, 3))
    assert same(*ends)
    del optimizer.param_groups[0]["rho"]  # groups from elsewhere need not have it
    step(optimizer, net)


@every_case
def test_bare_groups_join_named_ones_and_named_ones_bare_ones(case):
    net, other = Net(), Net()
    optimizer = case.optimizer.around(SGD(net.last.named_parameters()), names=net, rho=0.3, **case.options)
    optimizer.add_param_group({"params": list(net.first.parameters())})
    bare = case.optimizer.around(SGD(other.last.parameters()), names=other, rho=0.3, **case.options)
    bare.add_param_group({"params": [(f"first.{name}", p) for name, p in other.first.named_parameters()]})
    assert optimizer.param_groups[1]["param_names"] == ["first.weight", "first.bias"]
    assert "param_names" not in bare.param_groups[1]
    assert same(trained(optimizer, net), trained(bare, other))
    assert [group["sharpness_step"] for group in optimizer.param_groups] == [5, 5]
    optimizer.add_param_group({"params": net.unused.weight, "rho": 0.0})
    assert optimizer.param_groups[2]["sharpness_step"] == 5


def test_what_a_state_dict_calls_parameters_does_not_make_them_biases():
    def make(*order):
        net = nn.Linear(3, 2)
        return net, ASAM([{"params": [(name, getattr(net, name))]} for name in order], SGD)

    net, optimizer = make("bias", "weight")
    net(torch.ones(1, 3)).sum().backward()
    before = displaced(optimizer, net)
    optimizer.load_state_dict(make("weight", "bias")[1].state_dict())
    assert same(before, displaced(optimizer, net))


def test_hooks_run_once_and_are_given_the_sharp_optimizer():
    net = Net()
    optimizer = SAM(net.parameters(), SGD)
    seen = []
    kinds = (
        "step_pre",
        "step_post",
        "state_dict_pre",
        "state_dict_post",
        "load_state_dict_pre",
        "load_state_dict_post",
    )
    handles = [
        getattr(optimizer, f"register_{kind}_hook")(lambda by, *_, kind=kind: seen.append((kind, by is optimizer)))
        for kind in kinds
    ]
    handles.append(register_optimizer_step_post_hook(lambda by, *_: seen.append("every optimizer's")))
    step(optimizer, net)
    optimizer.load_state_dict(optimizer.state_dict())
    assert [s for s in seen if s != "every optimizer's"] == [(kind, True) for kind in kinds]
    assert seen.count("every optimizer's") == 1
    for handle in handles:
        handle.remove()
    step(optimizer, net)
    assert len(seen) == 7


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused_while_perturbed(how):
    net = Net()
    optimizer = SAM(net.parameters(), SGD)
    net.loss().backward()
    with (
        optimizer.perturbed(),
        pytest.raises(RuntimeError, match="copying or pickling while"),
    ):
        how(optimizer)


def test_the_passes_may_run_in_the_closure():
    """As Lightning's automatic optimization calls `step`."""
    net, other = Net(), Net()
    optimizer, reference = SAM(net.parameters(), SGD, rho=0.3), SAM(other.parameters(), SGD, rho=0.3)

    def closure():
        optimizer.zero_grad()
        loss = net.loss()
        loss.backward()
        with optimizer.perturbed():
            optimizer.zero_grad()
            net.loss().backward()
        return loss

    for _ in range(3):
        expected = other.loss()
        with torch.no_grad():
            assert torch.equal(optimizer.step(closure), expected)
        step(reference, other)
    assert same(net.weights(), other.weights())


def test_a_closure_that_replaces_the_gradient_at_the_perturbed_weights_is_told():
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = SAM([w], partial(torch.optim.SGD, lr=0.1), rho=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (w**4).sum()
        loss.backward()
        return loss

    closure()
    with optimizer.perturbed():
        closure()
    with pytest.warns(UserWarning, match="so this is a plain step"):
        optimizer.step(closure)


def test_a_closure_that_leaves_the_gradient_alone_is_no_cause_for_a_warning():
    net = Net()
    optimizer = SAM(net.parameters(), SGD)
    net.loss().backward()
    with optimizer.perturbed():
        optimizer.zero_grad()
        net.loss().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.step(lambda: 7.0) == 7.0


# Bases.


class TwoModes(torch.optim.SGD):
    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.modes = []

    def train(self):
        self.modes.append("train")

    def eval(self):
        self.modes.append("eval")


class NoClosure(torch.optim.SGD):
    def step(self):
        return super().step()


def test_modes_are_handed_on_and_nothing_happens_where_there_are_none():
    optimizer = SAM(Net().parameters(), TwoModes, lr=0.1)
    optimizer.train()
    optimizer.eval()
    assert optimizer.base.modes == ["train", "eval"]
    SAM(Net().parameters(), SGD).eval()


def test_modes_change_at_w_only_and_a_base_without_any_may_be_asked_at_any_time():
    for base in (torch.optim.SGD, TwoModes):
        net = Net()
        optimizer = SAM(net.parameters(), base, lr=0.1)
        net.loss().backward()
        with optimizer.perturbed():
            if base is torch.optim.SGD:
                optimizer.train()  # as the Trainer of transformers does before each of its backward passes
            else:
                with pytest.raises(RuntimeError, match=r"train\(\) while the weights are perturbed"):
                    optimizer.train()


def test_a_base_whose_step_takes_no_closure():
    net, other = Net(), Net()
    optimizer = SAM(net.parameters(), NoClosure, lr=0.1, rho=0.3)
    net.loss().backward()
    with optimizer.perturbed():
        optimizer.zero_grad()
        net.loss().backward()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert same(net.weights(), trained(SAM(other.parameters(), torch.optim.SGD, lr=0.1, rho=0.3), other, 1))


def test_lbfgs_is_refused_by_name():
    for make in (
        lambda: SAM(Net().parameters(), torch.optim.LBFGS, lr=0.1),
        lambda: SAM.around(torch.optim.LBFGS(Net().parameters())),
    ):
        with pytest.raises(TypeError, match="SAM cannot have LBFGS as its base"):
            make()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_base_with_a_rho_of_its_own_keeps_it(grouped):
    net = nn.Linear(8, 1).double()
    params = [{"params": net.parameters()}] if grouped else net.parameters()
    optimizer = SAM(params, partial(torch.optim.Adadelta, lr=1.0, rho=0.8), rho=0.05)
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["sam_rho"]) == (0.8, 0.05)
    net(torch.ones(4, 8).double()).sum().backward()
    assert length(displaced(optimizer, net)) == pytest.approx(0.05)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": 0.7, "sam_rho": 0.1})
    assert (optimizer.param_groups[1]["rho"], optimizer.param_groups[1]["sam_rho"]) == (0.7, 0.1)
    fresh = SAM(net.parameters(), partial(torch.optim.Adadelta, lr=1.0, rho=0.8), rho=0.3)
    fresh.load_state_dict(torch.optim.Adadelta(net.parameters(), rho=0.6).state_dict())
    assert (fresh.param_groups[0]["rho"], fresh.param_groups[0]["sam_rho"]) == (0.6, 0.3)


@every_case
def test_maximising_climbs_the_other_way(case):
    class Upside(Net):
        def loss(self):
            return -super().loss()

    net, other = Net(), Upside()
    down = case.make(net.named_parameters(), SGD, rho=0.3)
    up = case.make(other.named_parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, maximize=True, rho=0.3)
    for a, b in zip(trained(down, net), trained(up, other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_a_zero_redundancy_base(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net, other = Net(), Net()
        make = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9)
        trainable = [p for p in net.parameters() if p.requires_grad]
        sharded = SAM(trainable, make, rho=0.3)
        plain = SAM([p for p in other.parameters() if p.requires_grad], SGD, rho=0.3)
        assert same(trained(sharded, net), trained(plain, other))
        sharded.base.consolidate_state_dict()
        saved = copy.deepcopy(sharded.state_dict())
        resumed = SAM(trainable, make, rho=0.9)
        resumed.load_state_dict(saved)
        assert resumed.param_groups[0]["rho"] == 0.3
        assert same(trained(resumed, net), trained(plain, other))
    finally:
        dist.destroy_process_group()


def test_both_passes_in_one_autocast_block():
    torch.manual_seed(0)
    net, x, y = nn.Linear(8, 1), torch.randn(32, 8), torch.randn(32, 1)
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    gradients = []

    def backward():
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x).float(), y).backward()
        gradients.append(net.weight.grad.clone())

    with torch.autocast("cpu", torch.bfloat16):
        backward()
        with optimizer.perturbed():
            backward()
        backward()
    assert torch.equal(gradients[0], gradients[2])  # at w again
    assert (gradients[1] - gradients[0]).norm() > 1
