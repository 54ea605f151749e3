"""What is refused, and in which words."""

import math
import re
from functools import partial

import pytest
import torch
from torch import nn

from cases import (
    SGD,
    Net,
    displaced,
    every_case,
    every_two_pass_case,
    length,
    ready,
    same,
    step,
)
from sam_lightning import ASAM, SAM


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


@every_two_pass_case
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
