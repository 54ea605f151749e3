"""Training samples to measure a loss on."""

import random
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import Trainer

from sam_lightning.replay.random_states import random_states, set_random_states
from sam_lightning.sharpness.batches import samples_in, shard


@runtime_checkable
class HasTrainingSample(Protocol):
    """A data module that gives fixed training samples, as `sam_lightning.data.ImageData` does."""

    def training_sample(self, samples: int, seed: int) -> list[Any]:
        """Batches of so many training samples, chosen by `seed` alone, without augmentation."""
        ...


def training_sample(trainer: Trainer, samples: int, seed: int) -> list[Any]:
    """This process's part of so many training samples, in the input precision of the run.

    Of a data module with `training_sample` these are its own, the same ones every time. Of others they are the first
    whole batches of the training loader, in the order and with the augmentation that this seed gives: the same ones
    where the order comes from the global random number generators, and not from one of the loader's own or from a
    distributed sampler, which shuffles anew in every epoch.

    Args:
        trainer: With its module and its data.
        samples: Number of samples of all processes together; all if there are fewer.
        seed: Chooses them.
    """
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, HasTrainingSample):
        shares = [shard(b, trainer.global_rank, trainer.world_size) for b in data.training_sample(samples, seed)]
        batches = [share for share in shares if samples_in(share)]
    else:
        batches = _first_batches(trainer, data, -(-samples // trainer.world_size), seed)
    return [trainer.precision_plugin.convert_input(batch) for batch in batches]


def _first_batches(trainer: Trainer, data: Any, samples: int, seed: int) -> list[Any]:
    before = random_states()
    try:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        loader = trainer.train_dataloader if trainer.train_dataloader is not None else data.train_dataloader()
        batches: list[Any] = []
        count = 0
        for batch in loader:
            batches.append(trainer.strategy.batch_to_device(batch))
            count += samples_in(batch)
            if count >= samples:
                break
        return batches
    finally:
        set_random_states(before)
