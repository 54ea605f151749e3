"""Running statistics stay as they were inside `frozen_running_stats`."""

import math

import pytest
import torch
from torch import nn

from sam_lightning.batch_norm import frozen_running_stats


class OwnNorm(nn.Module):
    """A layer with running statistics that knows no flags."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        self.running_mean = 0.5 * self.running_mean + 0.5 * x.mean((0, 2)).detach()
        self.running_var.mul_(0.5)
        return x - self.running_mean[:, None]


LAYERS = {
    "batch": lambda: nn.BatchNorm1d(3),
    "cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "no-stats": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    "sync": lambda: nn.SyncBatchNorm(3),
    "own": OwnNorm,
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def batch(value=None):
    return torch.randn(4, 3, 5) + 2 if value is None else torch.full((4, 3, 5), value)


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_statistics_and_counter_stay(make, training):
    net = nn.Sequential(make(), nn.ReLU(), make()).train(training)
    if not isinstance(net[0], nn.SyncBatchNorm):
        net(batch())
    before = buffers(net)
    flags = [(m.training, getattr(m, "momentum", 0), getattr(m, "track_running_stats", 0)) for m in net.modules()]
    with frozen_running_stats(net):
        net(batch())
        net(batch())
    assert equal(buffers(net), before)
    assert flags == [
        (m.training, getattr(m, "momentum", 0), getattr(m, "track_running_stats", 0)) for m in net.modules()
    ]


@pytest.mark.parametrize("make", [LAYERS["batch"], LAYERS["instance"], LAYERS["cumulative"]])
def test_the_output_is_that_of_training_and_updates_go_on(make):
    layer, twin, x = make(), make(), batch()
    with frozen_running_stats(layer):
        inside = layer(x)
    assert torch.equal(inside, twin(x))
    assert torch.equal(layer(x), inside)
    assert equal(buffers(layer), buffers(twin))
    assert layer.running_mean.abs().sum() > 0


def test_the_cumulative_mean_counts_outside_batches_only():
    layer = nn.BatchNorm1d(3, momentum=None)
    for value in (2.0, 8.0):
        layer(batch(value))
        with frozen_running_stats(layer):
            layer(batch(100.0))
    assert layer.num_batches_tracked == 2
    assert layer.running_mean.tolist() == [5.0] * 3


@every_layer
def test_nesting_repetition_and_exceptions(make):
    layer = make()
    if isinstance(layer, nn.SyncBatchNorm):
        layer.eval()  # in training it runs on GPUs only
    before = buffers(layer)
    with frozen_running_stats(layer):
        with frozen_running_stats(layer):
            layer(batch())
        layer(batch())

    def failing():
        with frozen_running_stats(layer):
            layer(batch(math.nan))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    with frozen_running_stats(layer):
        pass
    assert equal(buffers(layer), before)
    if layer.training and before:
        layer(batch())
        assert not equal(buffers(layer), before)


def test_other_buffers_are_left_alone():
    layer = nn.BatchNorm1d(3)
    layer.register_buffer("seen", torch.zeros(()))
    with frozen_running_stats(layer):
        layer.seen += 1
    assert layer.seen == 1
