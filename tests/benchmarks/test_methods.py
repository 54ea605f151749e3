"""(i) A step of every method against SGD's, and the memory that it takes; the page about methods shows both."""

import math
from functools import partial

import pytest
import torch
from alternating import DEVICE
from torch.nn.functional import cross_entropy

import sam_lightning
from sam_lightning import ASAM, GSAM, MSAM, SAM, WSAM, FriendlySAM, LookSAM, SharpnessAware, VaSSO, norm_layers_only
from sam_lightning.models import digits_cnn, resnet18
from sam_lightning.optim.radius_schedules import follow_schedule
from step_memory import peak

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(3600)]

STEPS = 5  # of which SAM every 5 perturbs in one
SGD = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)


def plain(network):
    return SGD(network.parameters())


def norm_layers(network):
    return SAM(norm_layers_only(network), SGD)


def late(network):
    """Perturbs in the last of the steps only, by a radius that is 0 before, as `sam_lightning.optim.late` sets it."""
    return SAM(network.parameters(), SGD)


METHODS = {
    "SGD": plain,
    "SAM": SAM,
    "ASAM": ASAM,
    "SAM every 5": partial(SAM, every=STEPS),
    "late SAM": late,
    "SAM-ON": norm_layers,
    "MSAM": MSAM,
    "LookSAM": partial(LookSAM, every=STEPS),
    "WSAM": WSAM,
    "GSAM": GSAM,
    "FriendlySAM": FriendlySAM,
    "VaSSO": VaSSO,
}


def made(make, network):
    return make(network) if make in (plain, norm_layers, late) else make(network.named_parameters(), SGD)


@pytest.mark.parametrize(
    ("network", "shape", "rounds"),
    [(digits_cnn, (64, 1, 8, 8), 25), (partial(resnet18, 10), (32, 3, 32, 32), 5)],
    ids=["digits", "resnet18"],
)
def test_i_methods(compare, benchmark, network, shape, rounds):
    images, labels = torch.rand(shape, device=DEVICE), torch.randint(0, 10, shape[:1], device=DEVICE)

    def steps(make):
        net = network().to(DEVICE)
        optimizer = made(make, net)

        schedule = sam_lightning.optim.late(0.8)

        def loss():
            return cross_entropy(net(images), labels)

        def run():
            for i in range(STEPS):
                if make is late:
                    follow_schedule(optimizer, schedule, i, STEPS)
                if isinstance(optimizer, SharpnessAware):
                    optimizer.passes(loss, model=net)
                else:
                    optimizer.zero_grad()
                    loss().backward()
                optimizer.step()

        return run

    ratios = compare(rounds, {name: steps(make) for name, make in METHODS.items()})
    assert all(math.isfinite(ratio) for ratio in ratios.values())
    # Of an odd number of rounds the median's inverse is the inverse's median.
    benchmark.extra_info["times SGD's"] = {"SGD": 1.0, **{name: 1 / ratio for name, ratio in ratios.items()}}


def test_i_memory(benchmark):
    def copies():
        return {name: peak(partial(made, make)) for name, make in METHODS.items() if make is not norm_layers}

    found = benchmark.pedantic(copies, rounds=1)
    more = {name: value - found["SGD"] for name, value in found.items()}
    benchmark.extra_info.update({"copies": more})
    print("\n" + ", ".join(f"{name} {value:.2f}" for name, value in more.items()))
