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
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, DistributedSampler

from regression import SAM_SGD, SGD, Regression, loader, make_data, make_network, state_of

PLAIN = {
    "sync": {"sync_perturbation": True},
    "local": {"sync_perturbation": False},
    "sync-accumulate": {"sync_perturbation": True, "accumulate": 2},
    "local-accumulate": {"sync_perturbation": False, "accumulate": 2},
    "sgd": {"optimizer": SGD},
}


class Validated(Regression):
    """Keeps what each rank validates with."""

    validated: dict[str, torch.Tensor]

    def validation_step(self, batch, batch_idx):
        self.validated = state_of(self)


class OverflowOnOneRank(Regression):
    """The first pass of step 2 overflows in rank 1 alone."""

    def loss(self, batch):
        loss = super().loss(batch)
        overflows = self.global_rank == 1 and self.global_step == 2 and not self.is_second_pass
        return loss + (0 * self.network[0].weight.sum() * math.inf if overflows else 0)


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
        self.after.append(module.network[0].weight.detach().clone())


def fit(module, validate=False, **options):
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = make_data(160)
    sampler = DistributedSampler(data, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    batches = DataLoader(data, batch_size=4, sampler=sampler)
    trainer.fit(module, batches, *([loader(batch_size=4, samples=8)] if validate else []))
    optimizer = trainer.optimizers[0].state_dict()["state"]
    return {
        "state": state_of(module),
        "steps": trainer.global_step,
        "reductions": watch.reductions,
        "after": watch.after,
        "optimizer": optimizer,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {name: fit(Regression(network=make_network(norm=False), **options)) for name, options in PLAIN.items()}
    with_norm = Validated(SAM_SGD)
    results["norm"] = {**fit(with_norm, validate=True), "validated": with_norm.validated}
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    results["overflow"] = {**fit(OverflowOnOneRank(), plugins=[plugin]), "scale": plugin.scaler.get_scale()}
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
