"""Every optimizer with its oracle, every base with its written-out twin, and small smooth losses."""

from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import oracle_methods as written
import oracles
from sam_lightning import ASAM, GSAM, MSAM, SAM, WSAM, FriendlySAM, LookSAM, VaSSO


@dataclass(frozen=True)
class Case:
    """A method, its options, its formula written out, and whether its e has length rho (in units of T, for ASAM)."""

    name: str
    optimizer: type
    oracle: Any
    options: dict[str, Any] = field(default_factory=dict)
    reaches_the_ball: bool = True

    def make(self, params, base, **more):
        return self.optimizer(params, base=base, **{**self.options, **more})

    def scales(self, named_parameters):
        """T of every parameter: the displacement reaches ||e / T|| = rho."""
        return [
            torch.ones_like(p)
            if self.optimizer is not ASAM or ("bias" in name and not self.options["normalize_bias"])
            else p.detach().abs() + self.options["eta"]
            for name, p in named_parameters
        ]

    @property
    def has_first_pass(self):
        return self.optimizer.needs_first_gradient

    @property
    def passes(self):
        """Gradients that the steps 0, 1, 2, ... compute."""
        every = self.options.get("every", 1)
        return [1 + self.has_first_pass * (t % every == 0) for t in range(7)]


CASES = (
    Case("sam", SAM, written.Sam),
    Case("sam-every-3", SAM, written.Sam, {"every": 3}),
    Case("asam-authors", ASAM, written.Asam, {"eta": 0.01, "normalize_bias": False}),
    Case("asam-all", ASAM, written.Asam, {"eta": 0.0, "normalize_bias": True}),
    Case("asam-all-eta", ASAM, written.Asam, {"eta": 0.1, "normalize_bias": True}),
    Case("msam", MSAM, written.Msam),
    Case("wsam", WSAM, written.Wsam, {"gamma": 0.7}),
    Case("wsam-penalty-every-2", WSAM, written.Wsam, {"gamma": 0.3, "every": 2}),
    Case("gsam", GSAM, written.Gsam, {"alpha": 0.4}),
    Case("friendly", FriendlySAM, written.Friendly, {"sigma": 1.0, "lmbda": 0.6}),
    Case("friendly-half-every-2", FriendlySAM, written.Friendly, {"sigma": 0.5, "lmbda": 0.9, "every": 2}),
    Case("vasso", VaSSO, written.Vasso, {"theta": 0.3}),
    Case("look-every-3", LookSAM, written.Look, {"every": 3, "alpha": 0.3}),
)

BASES = {
    "sgd": (partial(torch.optim.SGD, lr=0.1), lambda: oracles.SGD(0.1)),
    "momentum": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), lambda: oracles.SGD(0.1, 0.9)),
    "weight-decay": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.5, weight_decay=0.1),
        lambda: oracles.SGD(0.1, 0.5, 0.1),
    ),
    "adam": (partial(torch.optim.Adam, lr=0.01), lambda: oracles.Adam(0.01)),
    "adamw": (partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1), lambda: oracles.Adam(0.01, decay=0.1)),
}
SGD = BASES["momentum"][0]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_two_pass_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.has_first_pass], ids=lambda case: case.name
)
every_base = pytest.mark.parametrize("base", BASES)


def crossed(*others, usual):
    """Rows of every method, every base and the values of the others; those that are not `usual` are slow tests."""
    return [
        pytest.param(*row, marks=[] if usual(*row) else pytest.mark.slow)
        for row in product(CASES, BASES, *others)
        if row[0].has_first_pass or row[1] != "sgd"  # no momentum to go along
    ]


def name_of(value):
    """How a test's id names a value."""
    return getattr(value, "name", getattr(value, "__name__", None))


class Loss(nn.Module):
    """Parameters and a loss of them; smooth, so that float64 compares tightly."""

    def _randomize(self, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.5
        return generator

    def weights(self):
        return [p.detach().clone() for p in self.parameters()]

    def forward(self):
        return self.loss()

    def pointers(self):
        return [p.data_ptr() for p in self.parameters()]


class Net(Loss):
    """A tanh network with biases, a frozen and an unused layer."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        self.first = nn.Linear(4, 6, dtype=dtype)
        self.frozen = nn.Linear(6, 6, dtype=dtype).requires_grad_(False)
        self.unused = nn.Linear(3, 2, dtype=dtype)
        self.last = nn.Linear(6, 2, dtype=dtype)
        generator = self._randomize(dtype, seed)
        self.x = torch.randn(10, 4, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randn(10, 2, generator=generator, dtype=torch.float64).to(dtype)

    def loss(self):
        return (self.last(torch.tanh(self.frozen(torch.tanh(self.first(self.x))))) - self.y).square().mean()


class Quadratic(Loss):
    """z A z / 2, z being all parameters behind one another; one of them is frozen, one is not in z."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        for name, shape in {"weight": (2, 2), "bias": (2,), "frozen": (1,), "unused": (3,), "offset": (1,)}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), name != "frozen"))
        root = torch.randn(8, 8, generator=self._randomize(dtype, seed), dtype=torch.float64).to(dtype)
        self.curvature = root @ root.T / 8

    def loss(self):
        z = torch.cat([p.flatten() for p in (self.weight, self.bias, self.frozen, self.offset)])
        return z @ self.curvature @ z / 2


class Rescaled(Loss):
    """A ReLU network that computes the same function for every `factor`: one layer times it, the next over it."""

    def __init__(self, factor, seed=5):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        generator = self._randomize(torch.float64, seed)
        self.x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, 3, (20,), generator=generator)
        first, _, second = self.layers
        for parameter, by in ((first.weight, factor), (first.bias, factor), (second.weight, 1 / factor)):
            parameter.data *= by

    def loss(self):
        return nn.functional.cross_entropy(self.layers(self.x), self.y)


def one_group(named):
    """Parameters as an optimizer takes them; the radius and the learning rate of each one."""
    return named, [0.3] * len(named), [None] * len(named)


def several_groups(named):
    """Frozen and unused ones in the middle, with the default rate; the last parameter is not perturbed."""
    cut = len(named) * 3 // 8
    middle = len(named) - cut - 1
    groups = [
        {"params": named[:cut], "lr": 0.02},
        {"params": named[cut:-1], "rho": 0.7},
        {"params": named[-1:], "rho": 0.0, "lr": 0.05},
    ]
    return groups, [0.3] * cut + [0.7] * middle + [0.0], [0.02] * cut + [None] * middle + [0.05]


def ready(case, base="momentum", scale=1.0, dtype=torch.float64):
    """A network with its gradient at w, and its optimizer, which perturbs next (by momentum: after one step)."""
    net = Net(dtype)
    optimizer = case.make(net.named_parameters(), BASES[base][0], rho=0.3)
    if not case.has_first_pass:
        step(optimizer, net)
        optimizer.zero_grad()
    (net.loss() * scale).backward()
    return net, optimizer


def step(optimizer, net):
    """One sharpness-aware step, of any method."""
    optimizer.zero_grad()
    if optimizer.needs_first_gradient:
        net.loss().backward()
    with optimizer.perturbed() as perturbs:
        if perturbs:
            optimizer.zero_grad()
            net.loss().backward()
    optimizer.step()


def displaced(optimizer, module, loss_scale=1.0):
    """e, by looking inside."""
    before = [p.detach().clone() for p in module.parameters()]
    with optimizer.perturbed(loss_scale):
        return [p.detach() - w for p, w in zip(module.parameters(), before, strict=True)]


def length(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm().item()


def same(a, b):
    """Bit for bit: -0.0 is not 0.0, and a NaN is itself."""
    return len(a) == len(b) and all(
        x.dtype is y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )
