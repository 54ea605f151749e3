"""The order of the data: a pure function of (seed, epoch)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

ORDER, AUGMENTATION, LABEL_NOISE = 0, 1, 2  # independent random streams of one (seed, epoch)


def generator_of(seed: int, epoch: int, stream: int) -> torch.Generator:
    """A generator on the CPU seeded by a hash of all three: seed + epoch would make (20, 10) and (30, 0) the same."""
    # As a spawn key: in one flat list a seed of 2**32 and more would spill over into the epoch.
    state = np.random.SeedSequence(seed, spawn_key=(epoch, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class EpochSampler(DistributedSampler[int]):
    """Positions of a dataset in the order of (seed, epoch), every `world`-th of them.

    A DistributedSampler so that Lightning keeps it. In training the ranks' shares are filled up to equal
    length from the front of the order; in evaluation they are not, so that every sample counts once.

    Args:
        dataset: Anything with a length.
        seed: Seed of the order, at least 0.
        shuffle: Training: a random permutation per epoch. Evaluation: the dataset's own order.
        world: Number of processes.
        rank: This process.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, shuffle: bool, world: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
        self.skip = 0  # samples of this process that the next iteration leaves out

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)  # type: ignore[arg-type]  # Dataset declares no length
        if self.shuffle:
            order = torch.randperm(count, generator=generator_of(self.seed, self.epoch, ORDER))
            order = order.repeat(-(-self.total_size // count))[: self.total_size]
        else:
            order = torch.arange(count)
        start, self.skip = self.skip, 0
        return iter(order[self.rank :: self.num_replicas][start:].tolist())

    def __len__(self) -> int:
        if self.shuffle:
            return self.num_samples
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]
