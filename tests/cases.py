"""Every optimizer with its oracle, every base with its written-out twin, and small smooth losses."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

import oracles
from sam_lightning import ASAM, SAM


@dataclass(frozen=True)
class Case:
    name: str
    optimizer: type
    displacements: Any
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, params, base, **more):
        return self.optimizer(params, base=base, **{**self.options, **more})


CASES = (
    Case("sam", SAM, oracles.sam_displacements),
    Case("asam-authors", ASAM, oracles.asam_displacements, {"eta": 0.01, "normalize_bias": False}),
    Case("asam-all", ASAM, oracles.asam_displacements, {"eta": 0.0, "normalize_bias": True}),
    Case("asam-all-eta", ASAM, oracles.asam_displacements, {"eta": 0.1, "normalize_bias": True}),
)

BASES = {
    "sgd": (partial(torch.optim.SGD, lr=0.1), lambda: oracles.SGD(0.1)),
    "momentum": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), lambda: oracles.SGD(0.1, 0.9)),
    "weight-decay": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.5, weight_decay=0.1),
        lambda: oracles.SGD(0.1, 0.5, 0.1),
    ),
    "adam": (partial(torch.optim.Adam, lr=0.01), lambda: oracles.Adam(0.01)),
}
SGD = BASES["momentum"][0]


class Net(nn.Module):
    """A tanh network with biases, a frozen and an unused layer; smooth, so that float64 compares tightly."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(4, 6, dtype=dtype)
        self.frozen = nn.Linear(6, 6, dtype=dtype).requires_grad_(False)
        self.unused = nn.Linear(3, 2, dtype=dtype)
        self.last = nn.Linear(6, 2, dtype=dtype)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.5
        self.x = torch.randn(10, 4, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randn(10, 2, generator=generator, dtype=torch.float64).to(dtype)

    def loss(self):
        return (self.last(torch.tanh(self.frozen(torch.tanh(self.first(self.x))))) - self.y).square().mean()

    def weights(self):
        return [p.detach().clone() for p in self.parameters()]


def step(optimizer, net):
    """One sharpness-aware step."""
    optimizer.zero_grad()
    net.loss().backward()
    with optimizer.perturbed():
        optimizer.zero_grad()
        net.loss().backward()
    optimizer.step()
