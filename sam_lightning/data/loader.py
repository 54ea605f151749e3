"""A data loader that can be resumed within an epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from sam_lightning.data.sampler import EpochSampler


class BatchLoader(DataLoader[Any]):
    """Fetches whole batches and keeps its position within the epoch.

    Lightning saves the state of such a loader in checkpoints, and loads it when it resumes within an
    epoch. Skipped batches are never read.

    Args:
        dataset: Its `__getitems__(positions)` returns a finished batch.
        batch_size: Samples per batch and process.
        sampler: The order.
        num_workers: Worker processes; data in memory need none.
        drop_last: Whether an incomplete last batch is left out.
        pin_memory: Whether batches lie in pinned memory, from where a GPU copies them asynchronously.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        sampler: EpochSampler,
        num_workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=finished_batch,
            drop_last=drop_last,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else making the iterator draws from the global random state
        )
        self._epoch_sampler = sampler
        self._epoch = sampler.epoch  # the epoch that the position belongs to
        self._position = 0  # batches of it handed out
        self._resumes = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own iterator class
        # A generator: nothing is fetched before the first batch is asked for. Lightning makes the iterator
        # before it sets the epoch; worker processes would by then have fetched in the order of the old one.
        epoch = self._epoch_sampler.epoch
        if not (self._resumes and self._epoch == epoch):
            self._epoch, self._position = epoch, 0
        self._resumes = False
        self._epoch_sampler.skip = self._position * (self.batch_size or 1)
        for batch in super().__iter__():
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches have been handed out."""
        epoch = self._epoch_sampler.epoch
        return {"epoch": epoch, "batches": self._position if epoch == self._epoch else 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The next iteration goes on behind the batches of the state; behind the last one, with the next epoch."""
        epoch, batches = state_dict["epoch"], state_dict["batches"]
        if batches >= len(self):
            epoch, batches = epoch + 1, 0
        self._epoch_sampler.set_epoch(epoch)
        self._epoch, self._position, self._resumes = epoch, batches, True


def finished_batch(batch: Any) -> Any:
    """`collate_fn` for datasets whose `__getitems__` returns finished batches."""
    return batch
