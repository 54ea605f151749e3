"""Runs under torchrun, one process per rank: trains every case and saves what each rank ended with."""

import math
import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.nn.functional import all_reduce
from torch.utils.data import DataLoader, DistributedSampler

from cases import CASES
from regression import SAM_SGD, SGD, Branches, Regression, loader, make_data, make_network, state_of
from sam_lightning.training import SharpnessAwareTraining

SAMPLES, SHORT = 56, 54  # of 7 joint batches, the last of which is whole, or has 6
SYNC, LOCAL = {"sync_perturbation": True}, {"sync_perturbation": False}
# name: (options of the module, options of DistributedDataParallel)
PLAIN = {
    "sync": (SYNC, {}),
    "local": (LOCAL, {}),
    "sync-accumulate": (SYNC | {"micro_batches": 2}, {}),
    "local-accumulate": (LOCAL | {"micro_batches": 2}, {}),
    "sync-view": (SYNC | {"clip": 0.5}, {"gradient_as_bucket_view": True}),
    "local-view": (LOCAL | {"clip": 0.5}, {"gradient_as_bucket_view": True}),
    "local-view-accumulate": (LOCAL | {"micro_batches": 2}, {"gradient_as_bucket_view": True}),
    "sync-static": (SYNC, {"static_graph": True}),
    "sgd": ({"optimizer": SGD}, {}),
    "sgd-static": ({"optimizer": SGD}, {"static_graph": True}),
}
OVERFLOWS = {f"{mode}-overflow-{n}": (mode, n) for mode in ("sync", "local") for n in (1, 2)}


UNUSED = {
    "one-rank": lambda module: module.global_rank == 0,
    "first-pass": lambda module: not module.is_second_pass,
    "first-pass-of-one-rank": lambda module: module.global_rank == 0 and not module.is_second_pass,
    "never": lambda module: False,
}


class Validated(Regression):
    """Keeps what each rank validates with."""

    validated: dict[str, torch.Tensor]

    def validation_step(self, batch, batch_idx):
        self.validated = state_of(self)

    test_step = validation_step
    predict_step = validation_step


class Unused(Regression):
    """Takes the network's second branch on one rank, in one pass, or never."""

    def __init__(self, used, **options):
        super().__init__(network=Branches(), **options)
        self.used = used

    def training_step(self, batch, batch_idx):
        self.network.takes_second = self.used(self)
        return super().training_step(batch, batch_idx)


class OverflowOnOneRank(Regression):
    """One pass of step 2 overflows in rank 1 alone."""

    def __init__(self, bad_pass, **options):
        super().__init__(**options)
        self.bad_pass = bad_pass

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        here = self.global_rank == 1 and self.global_step == 2 and self.is_second_pass == (self.bad_pass == 2)
        return loss + (0 * self.network[0].weight.sum() * math.inf if here else 0)


class SyncNorm(nn.BatchNorm1d):
    """What SyncBatchNorm computes, which runs on GPUs only: statistics of all ranks' samples."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        count = 2 * len(x)
        mean, square = all_reduce(torch.stack([x, x.square()]).sum(1)) / count
        variance = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


class Watch(Callback):
    """The first layer's weights after every step, and the number of all-reduces."""

    def __init__(self):
        self.after = []
        self.reductions = 0

    def on_train_start(self, trainer, module):
        def counted(group, bucket):
            self.reductions += 1
            return allreduce_hook(group, bucket)

        trainer.strategy.model.register_comm_hook(None, counted)

    def on_train_batch_end(self, trainer, module, *_):
        self.after.append(next(module.network.parameters()).detach().clone())


class Ragged(DataLoader):
    """Batches of 4, but for the last: 3 samples on rank 0, 1 on rank 1."""

    def __init__(self, data, rank):
        own = list(range(rank, 44, 2))
        batches = [own[i : i + 4] for i in range(0, 20, 4)]
        super().__init__(data, batch_sampler=[*batches, [44, 45, 46] if rank == 0 else [47]])


def fit(module, samples=SAMPLES, validate=False, then=None, ddp=None, ragged=False, accelerator="cpu", **options):
    watch = Watch()
    trainer = Trainer(
        accelerator=accelerator,
        devices=2,
        strategy=DDPStrategy(**(ddp or {})),
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "use_distributed_sampler": False, **options},
    )
    data, rank = make_data(samples), int(os.environ["RANK"])
    sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
    batches = Ragged(data, rank) if ragged else DataLoader(data, batch_size=4, sampler=sampler)
    trainer.fit(module, batches, *([loader(batch_size=4, samples=8)] if validate else []))
    steps = trainer.global_step
    if then is not None:  # another stage, of the trained module
        getattr(trainer, then)(module, loader(batch_size=4, samples=8))
    return {
        "state": state_of(module),
        "steps": steps,
        "reductions": watch.reductions,
        "after": watch.after,
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "m": next(c.m_sharpness for c in trainer.callbacks if isinstance(c, SharpnessAwareTraining)),
    }


def on_the_cpu():
    results = {}
    for name, (options, ddp) in PLAIN.items():
        clip = options.pop("clip", None)
        module = Regression(network=make_network(norm=False), **options)
        results[name] = fit(module, ddp=ddp, gradient_clip_val=clip)
    for case in CASES:
        module = Regression(lambda params, case=case: case.make(list(params), SGD), make_network(norm=False), **SYNC)
        results[f"method-{case.name}"] = fit(module)
    for mode, options in {"sync": SYNC, "local": LOCAL}.items():
        plain = {"network": make_network(norm=False), **options}
        results[f"{mode}-short-last"] = fit(Regression(**plain), samples=SHORT)
        plain = {"network": make_network(norm=False), **options, "micro_batches": 2}
        results[f"{mode}-ragged-last"] = fit(Regression(**plain), ragged=True)
    for name, used in UNUSED.items():
        for mode, options in {"sync": SYNC, "local": LOCAL}.items():
            module = Unused(used, **options)
            results[f"{mode}-{name}"] = fit(module, ddp={"find_unused_parameters": True})
    with_norm = Validated(SAM_SGD)
    results["norm"] = {**fit(with_norm, validate=True), "validated": with_norm.validated}
    for stage in ("test", "predict"):
        module = Validated(SAM_SGD)
        results[f"norm-{stage}"] = {**fit(module, then=stage), "validated": module.validated}
    network = make_network()
    network[1] = SyncNorm(12)
    network.load_state_dict(make_network().state_dict())
    results["sync-norm"] = fit(Regression(network=network, **SYNC))
    for name, (mode, bad_pass) in OVERFLOWS.items():
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        module = OverflowOnOneRank(bad_pass, sync_perturbation=mode == "sync")
        results[name] = {**fit(module, plugins=[plugin]), "scale": plugin.scaler.get_scale()}
    for precision in ("bf16-mixed", "bf16-true"):
        for mode, options in {"sync": SYNC, "local": LOCAL}.items():
            module = Regression(network=make_network(norm=False), **options)
            results[f"{mode}-{precision}"] = fit(module, precision=precision)
    try:
        fit(Regression(), sync_batchnorm=True)
    except ValueError as error:
        results["sync-batch-norm"] = str(error)
    return results


def on_two_gpus():
    """SyncBatchNorm, whose forward pass runs on GPUs only."""
    result = fit(Regression(**SYNC), accelerator="gpu", sync_batchnorm=True)
    return {"sync-norm": {"state": {name: value.cpu() for name, value in result["state"].items()}}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, where = Path(sys.argv[1]), sys.argv[2]
    torch.save(on_two_gpus() if where == "gpu" else on_the_cpu(), folder / f"rank{os.environ['RANK']}.pt")
