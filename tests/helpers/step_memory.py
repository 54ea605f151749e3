"""The peak memory of training steps, in copies of the weights, as torch's allocator counts it."""

import functools

import torch
from torch import nn

from sam_lightning import SharpnessAware

WIDTH = 700
STEPS = 6  # in two of which `every=5` perturbs


@functools.cache
def orthogonal() -> torch.Tensor:
    return nn.init.orthogonal_(torch.empty(WIDTH, WIDTH))


def network() -> nn.Sequential:
    """Equal weights, ten million in all, beside which activations and what is worked on in parts are small."""
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(20)))
    for weight in net.parameters():  # the gradient is neither tiny nor huge
        weight.data.copy_(orthogonal())
    return net


def peak(make) -> float:
    """The most that lives at once beside the weights, from the first step on: gradients, state, copies.

    Args:
        make: Makes the optimizer from a network.
    """
    net, x, y = network(), torch.randn(1, WIDTH), torch.randn(1, WIDTH)
    optimizer = make(net)

    def loss():
        return (net(x) - y).square().mean()

    def steps():
        for _ in range(STEPS):
            if isinstance(optimizer, SharpnessAware):
                optimizer.passes(loss)
            else:
                optimizer.zero_grad()
                loss().backward()
            optimizer.step()

    return most_alive(steps) / sum(p.nbytes for p in net.parameters())


def most_alive(function) -> int:
    """The most bytes that live at once of those that a function allocates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    lives = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            lives += event.nbytes()
            most = max(most, lives)
    return most
