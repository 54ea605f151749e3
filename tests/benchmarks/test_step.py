"""(a) A step against two gradients and a stock optimizer's step; (b) ascent and restoration by themselves."""

import os
import statistics
import warnings
from functools import partial

import pytest
import torch
from alternating import DEVICE, clock, conditions
from published import TwoStepSAM, barest_ascent, leanest
from torch import nn
from torch.nn.functional import cross_entropy

from sam_lightning import ASAM, SAM
from sam_lightning.models import resnet18
from step_memory import most_alive

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(1800)]

SGD = partial(torch.optim.SGD, lr=0.01)


@pytest.mark.parametrize("variant", [SAM, ASAM])
def test_a_step_against_its_floor(compare, variant):
    network = resnet18().to(DEVICE)
    images, labels = torch.rand(128, 3, 32, 32, device=DEVICE), torch.randint(0, 10, (128,), device=DEVICE)
    ours, stock = variant(network.named_parameters(), SGD), SGD(network.parameters())

    def gradient(optimizer):
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()

    def step():
        gradient(ours)
        with ours.perturbed():
            gradient(ours)
        ours.step()

    def floor():
        gradient(stock)
        gradient(stock)
        stock.step()

    compare(
        25,
        {variant.__name__: step, "two gradients and a step": floor},
        warmup=3,
        bound=1.03 if variant is SAM else 1.05,
    )


@pytest.mark.parametrize("variant", [SAM, ASAM])
def test_h_where_the_time_goes(benchmark, variant):
    """Seconds of each part of a step; with BENCHMARK_TRACE=FILE also a trace for chrome://tracing or Perfetto."""
    network = resnet18().to(DEVICE)
    images, labels = torch.rand(128, 3, 32, 32, device=DEVICE), torch.randint(0, 10, (128,), device=DEVICE)
    optimizer = variant(network.named_parameters(), SGD)
    parts: dict[str, list[float]] = {}

    def timed(name, function):
        begin = clock()
        function()
        parts.setdefault(name, []).append(clock() - begin)

    def gradient():
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()

    def step():
        perturbation = optimizer.perturbed()
        timed("first gradient", gradient)
        timed("ascent", perturbation.__enter__)
        timed("second gradient", gradient)
        timed("restoration", lambda: perturbation.__exit__(None, None, None))
        timed("descent", optimizer.step)

    for _ in range(3):
        step()
    parts.clear()
    benchmark.pedantic(step, rounds=25)
    seconds = {name: statistics.median(values) for name, values in parts.items()}
    benchmark.extra_info.update({"n": 25, "seconds": seconds, **conditions()})
    print(f"\n{variant.__name__}: " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items()))

    with torch.profiler.profile() as profiler:
        begin = clock()
        gradient()
        with optimizer.perturbed():
            gradient()
        optimizer.step()
        wall = clock() - begin
    if DEVICE.type == "cuda":
        kernels = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e6
        benchmark.extra_info["share outside kernels"] = 1 - busy / wall
        print(f"{100 * (1 - busy / wall):.0f} % of the time outside kernels")
    if trace := os.environ.get("BENCHMARK_TRACE"):
        profiler.export_chrome_trace(f"{trace}-{variant.__name__.lower()}.json.gz")


def many_small() -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.randn(32, 32)) for _ in range(1000))


@pytest.mark.parametrize("network", [resnet18, many_small])
def test_b_ascent_and_restoration(compare, network):
    from pytorch_optimizer import SAM as PyTorchOptimizerSAM

    network = network().to(DEVICE)
    parameters = list(network.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    ours = SAM(network.named_parameters(), SGD)
    loop = TwoStepSAM(parameters, SGD, rho=0.05)
    theirs = PyTorchOptimizerSAM(parameters, torch.optim.SGD, rho=0.05, lr=0.0)
    theirs.base_optimizer.step = lambda: None  # second_step restores, then descends; only the first is measured

    def perturb():
        with ours.perturbed():
            pass

    def published():
        loop.first_step()
        loop.restore()

    @torch.no_grad()
    def barest():
        for p, old in zip(parameters, barest_ascent(parameters, 0.05), strict=True):
            p.data = old

    def library():
        theirs.first_step()
        theirs.second_step()

    compare(
        40,
        {"SAM": perturb, "published loop": published, "barest loop": barest, "pytorch_optimizer": library},
        warmup=5,
        bound=0.8 if len(parameters) < 1000 else 0.4,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", [SAM, ASAM])
def test_b_a_hundred_million_weights(compare, benchmark, variant, dtype):
    """Of 400 tensors; on one thread of a CPU. The memory is what lives at once beside weights and gradients."""
    torch.set_num_threads(1)
    weights = [nn.Parameter((0.02 * torch.randn(500, 500, device=DEVICE)).to(dtype)) for _ in range(400)]
    for w in weights:
        w.grad = torch.randn_like(w)
    ours = variant([(f"{i}.weight", w) for i, w in enumerate(weights)], SGD, rho=0.05)
    saved = [torch.empty_like(w) for w in weights]

    def perturb():
        with ours.perturbed():
            pass

    @torch.no_grad()
    def lean():
        leanest(weights, saved, variant is ASAM)

    with warnings.catch_warnings(action="ignore"):  # of the first perturbation in bfloat16, which loses much
        compare(15, {variant.__name__: perturb, "leanest loop": lean}, warmup=2, bound=1.1)
    ours.free_copies()
    benchmark.extra_info["copies"] = most_alive(perturb) / sum(w.nbytes for w in weights)
    print(f"{benchmark.extra_info['copies']:.2f} copies of the weights")
