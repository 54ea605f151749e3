"""Running statistics stay as they were inside `frozen_running_stats`."""

import copy
import math

import pytest
import torch
from torch import nn

from sam_lightning.replay.batch_norm import frozen_running_stats


class OwnNorm(nn.Module):
    """A layer with running statistics that knows no flags: it replaces one buffer and changes the other."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        self.running_mean = 0.5 * self.running_mean + 0.5 * x.mean((0, *range(2, x.ndim))).detach()
        self.running_var.mul_(0.5)
        return x - self.running_mean.view(3, *[1] * (x.ndim - 2))


LAYERS = {
    "batch-1d": lambda: nn.BatchNorm1d(3),
    "batch-2d": lambda: nn.BatchNorm2d(3),
    "cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "no-stats": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "instance-1d": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    "instance-2d": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    "own": OwnNorm,
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
TRACKING = {name: make for name, make in LAYERS.items() if name != "no-stats"}
every_tracking_layer = pytest.mark.parametrize("make", TRACKING.values(), ids=TRACKING.keys())


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def flags(module):
    names = ("training", "momentum", "track_running_stats")
    return [[getattr(layer, name, None) for name in names] for layer in module.modules()]


def equal(a, b):
    return a.keys() == b.keys() and all(a[n].dtype is b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def batch(layer, value=None):
    shape = (4, 3, 5, 5) if isinstance(layer, nn.BatchNorm2d | nn.InstanceNorm2d) else (4, 3, 5)
    return torch.randn(shape) + 2 if value is None else torch.full(shape, value)


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_statistics_counter_and_flags_stay(make, training):
    net = nn.Sequential(make(), nn.ReLU(), make())
    net(batch(net[0]))
    net.train(training)
    before, settings = buffers(net), flags(net)
    with frozen_running_stats(net):
        net(batch(net[0]))
        net(batch(net[0]))
    assert equal(buffers(net), before)
    assert flags(net) == settings


@every_tracking_layer
def test_the_output_is_that_of_training_and_updates_go_on(make):
    layer = make()
    layer(batch(layer))
    twin, x = copy.deepcopy(layer), batch(layer)
    before = layer.running_mean.clone()
    with frozen_running_stats(layer):
        inside = layer(x)
    assert torch.equal(inside, twin(x))
    assert torch.equal(layer(x), inside)
    assert equal(buffers(layer), buffers(twin))
    assert not torch.equal(layer.running_mean, before)


def test_gradients_inside_are_those_of_training():
    net = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(3))
    twin, x = copy.deepcopy(net), batch(net)
    with frozen_running_stats(net):
        net(x).square().sum().backward()
    twin(x).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_cumulative_mean_counts_outside_batches_only():
    layer = nn.BatchNorm1d(3, momentum=None)
    for value in (2.0, 8.0):
        layer(batch(layer, value))
        with frozen_running_stats(layer):
            layer(batch(layer, 100.0))
    assert layer.num_batches_tracked == 2
    assert layer.running_mean.tolist() == [5.0] * 3


@every_tracking_layer
def test_nesting_and_repetition(make):
    net = nn.Sequential(make(), make())
    before, settings = buffers(net), flags(net)
    with frozen_running_stats(net):
        with frozen_running_stats(net), frozen_running_stats(net[1]):
            net(batch(net[0]))
        net(batch(net[0]))
    with frozen_running_stats(net):
        net(batch(net[0]))
    assert equal(buffers(net), before)
    assert flags(net) == settings
    with frozen_running_stats(net[1]):
        net(batch(net[0]))
    assert equal(buffers(net[1]), {name: before[f"1.{name}"] for name in buffers(net[1])})
    assert not torch.equal(net[0].running_mean, before["0.running_mean"])


@every_tracking_layer
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_exceptions_and_nan_leave_nothing(make, error):
    layer = make()
    before, settings = buffers(layer), flags(layer)

    def failing():
        with frozen_running_stats(layer), frozen_running_stats(layer):
            layer(batch(layer, math.nan))
            raise error

    with pytest.raises(error):
        failing()
    assert equal(buffers(layer), before)
    assert flags(layer) == settings
    layer(batch(layer))
    assert not equal(buffers(layer), before)
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


def test_synchronised_layers_are_protected():
    layer = nn.SyncBatchNorm(3)  # in training its own forward pass runs on GPUs only
    before, settings = buffers(layer), flags(layer)
    with frozen_running_stats(layer):
        layer.num_batches_tracked.add_(1)  # what that pass does to it
        nn.functional.batch_norm(batch(layer), layer.running_mean, layer.running_var, training=True)
    assert equal(buffers(layer), before)
    assert flags(layer) == settings


def test_other_buffers_are_left_alone():
    layer = nn.BatchNorm1d(3)
    layer.register_buffer("seen", torch.zeros(()))
    with frozen_running_stats(layer):
        layer.seen += 1
    assert layer.seen == 1
