"""A network that lies on two accelerators: no method multiplies by a number that lies on the other one.

Shown without an accelerator: fake tensors have a device and no numbers. Their rules are torch's own, but for operations
on lists.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cases import SGD, every_case
from sam_lightning.training.divergence import refuse_diverged


class OneDeviceInListOperations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "_foreach_" in str(operation):
            lists = [arg for arg in args if isinstance(arg, list | tuple) and isinstance(arg[0], torch.Tensor)]
            numbers = [arg for arg in args if isinstance(arg, torch.Tensor)]
            for together in zip(*lists, strict=True):
                assert len({tensor.device for tensor in (*together, *numbers)}) == 1, operation
        return operation(*args, **(kwargs or {}))


def fused_sgd(targets, vectors, _, *, lr, found_inf, **options):
    """Of fused operations fake tensors know nothing."""
    assert len({tensor.device for tensor in (*targets, *vectors, lr, found_inf)}) == 1


def network():
    return nn.ParameterDict({f"weight{i}": torch.zeros(3, 4, device=f"cuda:{i}") for i in range(2)})


@every_case
@pytest.mark.parametrize("scaled", [False, True])
def test_every_method_takes_its_steps(monkeypatch, case, scaled):
    monkeypatch.setattr(torch, "_fused_sgd_", fused_sgd)
    with FakeTensorMode(), OneDeviceInListOperations():
        net = network()
        optimizer = case.make(net.named_parameters(), SGD)
        for _ in range(4):
            for weight in net.values():
                weight.grad = torch.ones_like(weight)
            with optimizer.perturbed(torch.ones((), device="cuda:0") if scaled else 1.0):
                optimizer.zero_grad()
                for weight in net.values():
                    weight.grad = torch.ones_like(weight)
            optimizer.step()


def test_weights_are_looked_at_together():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):  # which asks for the answer, on one device
        refuse_diverged(network().values(), epoch=0, step=0)
