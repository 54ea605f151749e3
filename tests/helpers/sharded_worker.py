"""Runs under torchrun, one process per rank: FSDP2 in plain PyTorch and in Lightning; saves what came out."""

import math
import os
import sys
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler

from cases import BASES, CASES, Net, same, several_groups
from regression import SAM_SGD, SGD, Regression, Tied, loader, make_data, make_network, state_of
from sam_lightning import ASAM, SAM
from sam_lightning.callbacks import RandomStates
from sam_lightning.tensors import global_norm, norms
from sam_lightning.tensors.shards import full_tensor, local_parts
from sam_lightning.training import SharpnessAwareTraining
from sam_lightning.training.sharding import shard

RANK = int(os.environ.get("RANK", 0))  # none where pytest looks in here for doctests
SYNC = {"sync_perturbation": True}
STEPS = 5  # of every method: more than one round of those that compute some gradients every few steps
TRAINED = [(case, "momentum") for case in CASES] + [(case, "adam") for case in CASES if case.name in ("sam", "vasso")]
SAMPLES, SHORT = 56, 54  # of 7 joint batches in Lightning, the last of which is whole, or has 6


# Plain PyTorch, in float64.


def sharded_net():
    net = Net()
    shard(net, init_device_mesh("cpu", (2,)))
    net.x, net.y = net.x[RANK::2], net.y[RANK::2]
    return net


def backward(net):
    net().backward()


def weights(module):
    return [full_tensor(p.detach()).clone() for p in module.parameters()]


def parts(module):
    return [part.clone() for part in local_parts([p.detach() for p in module.parameters()])]


def train_plainly(case, base):
    net = sharded_net()
    groups, *_ = several_groups(list(net.named_parameters()))
    optimizer = case.make(groups, BASES[base][0], rho=0.3)
    restored = [step(optimizer, net) for _ in range(STEPS)]
    return {"weights": weights(net), "restored": all(restored)}


def step(optimizer, net):
    """As in `cases`, but through the module's `forward`, where FSDP2 gathers; whether the second pass left no trace."""
    optimizer.zero_grad()
    before = parts(net)
    if optimizer.needs_first_gradient:
        backward(net)
    with optimizer.perturbed() as perturbs:
        if perturbs:
            optimizer.zero_grad()
            backward(net)
    restored = same(parts(net), before)
    optimizer.step()
    return restored


def look_inside(case, bad=None):
    """Norm and displacement over all shards, and what is left behind; `bad`: a value in one rank's gradient."""
    net = sharded_net()
    optimizer = case.make(net.named_parameters(), BASES["momentum"][0], rho=0.3)
    if not case.has_first_pass:
        step(optimizer, net)
        optimizer.zero_grad()
    backward(net)
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    if bad is not None and RANK == 1:
        grads[0].to_local()[0] = bad
    before, whole_before = parts(net), weights(net)
    try:
        with optimizer.perturbed():
            moved = [a - b for a, b in zip(weights(net), whole_before, strict=True)]
            raise InterruptedError
    except InterruptedError:
        restored = same(parts(net), before)
    return {"norm": global_norm(grads), "moved": moved, "restored": restored}


def told_of_rounding(make, rho):
    """Warnings of two steps with weights in bfloat16, and whether they are restored."""
    torch.manual_seed(0)
    net = nn.Linear(40, 40).bfloat16()
    shard(net, init_device_mesh("cpu", (2,)))
    optimizer, before = make(net.named_parameters(), partial(torch.optim.SGD, lr=0.0), rho=rho), parts(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.ones(2, 40).bfloat16()).square().mean().backward()
            with optimizer.perturbed():
                pass
    told = [str(found.message) for found in caught if "||fl(w + e) - w||" in str(found.message)]
    return {"told": told, "restored": same(parts(net), before)}


def in_plain_pytorch():
    results = {"inside": {}}
    results["rounding"] = {
        (make.__name__, rho): told_of_rounding(make, rho) for make in (SAM, ASAM) for rho in (1e-3, 5.0)
    }
    results["trained"] = {(case.name, base): train_plainly(case, base) for case, base in TRAINED}
    for case in CASES:
        for bad in (None, math.nan):
            results["inside"][case.name, bad is None] = look_inside(case, bad)
            norms._is_on_host = lambda tensor: False  # as on an accelerator
            results["inside"][case.name, bad is None, "accelerator"] = look_inside(case, bad)
            norms._is_on_host = lambda tensor: True
    return results


# Lightning.


class Validated(Regression):
    validated: dict[str, torch.Tensor]

    def validation_step(self, batch, batch_idx):
        self.validated = state_of(self)


class Failing(Regression):
    """The second pass of step 3 fails on every rank, in a layer that has gathered its weights."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 3 and self.is_second_pass:
            self._hook = self.network[4].register_forward_pre_hook(self._fail)
        return super().training_step(batch, batch_idx)

    def _fail(self, *_):
        self._hook.remove()
        raise InterruptedError


class HalfSharded(Regression):
    def __init__(self, **options):
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.scale


class OwnCut(Regression):
    def configure_model(self):
        shard(self.network[0], self.device_mesh["data_parallel"])
        shard(self.network, self.device_mesh["data_parallel"])


class Fsdp1(FSDPStrategy):
    """Passes Lightning's own refusal of CPUs, which asks for the exact class."""


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.seen.append(outputs["loss"].item())


def trainer(strategy=None, **options):
    return Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy or ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "logger": False, "enable_checkpointing": False, "use_distributed_sampler": False} | options,
    )


def batches(samples=SAMPLES):
    data = make_data(samples)
    sampler = DistributedSampler(data, 2, RANK, shuffle=False)
    generator = torch.Generator()  # else making an iterator draws from the global random state
    return DataLoader(data, batch_size=4, sampler=sampler, generator=generator)


def gathered(module):
    return {name: full_tensor(value).clone() for name, value in module.state_dict().items()}


def m_of(run):
    return next(c.m_sharpness for c in run.callbacks if isinstance(c, SharpnessAwareTraining))


def fit(module, samples=SAMPLES, validate=False, **options):
    run = trainer(**options)
    run.fit(module, batches(samples), *([loader(batch_size=4, samples=8)] if validate else []))
    optimizer = run.optimizers[0].state
    momenta = [full_tensor(optimizer[p]["momentum_buffer"]) for p in module.parameters() if p in optimizer]
    return {"state": gathered(module), "steps": run.global_step, "m": m_of(run), "momenta": momenta}


def refused(module, **options):
    try:
        trainer(**options).fit(module, batches())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def resumed(folder, distributed):
    """A straight run of 10 steps, and one that goes on behind its fifth: weights, momenta and losses."""
    ends = []
    for ckpt_path in (None, folder / f"{distributed}-step=5.ckpt"):
        module, losses = Regression(network=make_network(dropout=0.3), **SYNC), Losses()
        saving = ModelCheckpoint(
            folder, filename=f"{distributed}-{{step}}", save_top_k=-1, save_on_train_epoch_end=True
        )
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=distributed)
        callbacks = [saving, losses, RandomStates()]
        run = trainer(strategy, max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
        torch.manual_seed(3 if ckpt_path is None else 4)
        run.fit(module, batches(40), ckpt_path=ckpt_path, weights_only=True)
        momenta = [full_tensor(run.optimizers[0].state[p]["momentum_buffer"]) for p in module.parameters()]
        ends.append({"state": gathered(module), "momenta": momenta, "losses": losses.seen, "steps": run.global_step})
    return {"straight": ends[0], "resumed": ends[1], "is_folder": (folder / f"{distributed}-step=5.ckpt").is_dir()}


def after_a_failed_pass():
    """What the network computes when the second pass has failed, and what its weights compute."""
    module = Failing(network=make_network(norm=False), **SYNC)
    with suppress(InterruptedError):
        trainer().fit(module, batches())
    x, fresh = make_data(8).tensors[0], make_network(norm=False)
    with torch.no_grad():
        computed = module.network(x)
        fresh.load_state_dict({name.removeprefix("network."): value for name, value in gathered(module).items()})
        return {"computed": computed, "expected": fresh(x)}


def plain(**options):
    return Regression(network=make_network(norm=False), **options)


def in_lightning(folder):
    results = {
        "sync": fit(plain(**SYNC)),
        "accumulate": fit(plain(**SYNC, micro_batches=2)),
        "clip": fit(plain(**SYNC), gradient_clip_val=0.05),
        "sgd": fit(plain(optimizer=SGD)),
        "short-last": fit(plain(**SYNC), samples=SHORT),
        "own-cut": fit(OwnCut(network=make_network(norm=False), **SYNC)),
        "tied": fit(Regression(network=Tied(), **SYNC)),
        "bf16-mixed": fit(plain(**SYNC), precision="bf16-mixed"),
        "bf16-true": fit(plain(**SYNC), precision="bf16-true"),
        "failed": after_a_failed_pass(),
    }
    with_norm = Validated(SAM_SGD, **SYNC)
    results["norm"] = {**fit(with_norm, validate=True)}
    results["validated"] = {k: v for k, v in with_norm.validated.items() if "running" in k}
    for distributed in (True, False):
        results["resume", distributed] = resumed(folder, distributed)
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    results["refused"] = {
        "local": refused(plain()),
        "half-sharded": refused(HalfSharded(**SYNC)),
        "tensor-parallel": refused(plain(**SYNC), strategy=ModelParallelStrategy(1, 2)),
        "fp16": refused(plain(**SYNC), plugins=[scaler]),
        "static-local": refused(plain(), strategy=DDPStrategy(static_graph=True)),
        "static-accumulate": refused(plain(**SYNC, micro_batches=2), strategy=DDPStrategy(static_graph=True)),
        "fsdp1": refused(plain(**SYNC), strategy=Fsdp1()),
        "fsdp1-sgd": refused(plain(optimizer=SGD), strategy=Fsdp1()),
    }
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = in_lightning(Path(sys.argv[1]))
    results["plain"] = in_plain_pytorch()
    torch.save(results, Path(sys.argv[1]) / f"rank{RANK}.pt")
    dist.destroy_process_group()
