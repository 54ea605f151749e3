"""A second pass that is the same function as the first, and leaves no trace of its own."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sam_lightning.replay.batch_copies import BatchCopies
from sam_lightning.replay.module_state import ModuleState
from sam_lightning.replay.random_states import random_states, set_random_states


class Replay:
    """Runs a pass over a module a second time: same random numbers, same state, same batch.

        replay.begin(batch)
        ...                              # the first pass, on batch
        with replay.again() as batch:    # as everything was when it began
            ...                          # the second pass, on that batch
        ...                              # as everything was when the first pass ended

    The state is what `ModuleState` covers. What lies elsewhere, such as a queue in a global variable, is used and
    changed by both passes.

    Args:
        module: What the passes run through; `None`: only random numbers and batches are replayed.
        trained: Gives its parameters that the optimizer moves; changes of the others are undone.
        same_random_numbers: Whether the second pass draws what the first one drew (dropout, noise, augmentation).
        running_stats: Whether normalisation layers keep the first pass's running statistics; if not, both passes
            update them.
    """

    def __init__(
        self,
        module: nn.Module | None,
        trained: Callable[[], Iterable[Tensor]],
        same_random_numbers: bool = True,
        running_stats: bool = True,
    ) -> None:
        self._state = None if module is None else ModuleState(module, trained, running_stats)
        self._batches = BatchCopies()
        self._same_random_numbers = same_random_numbers

    def begin(self, batch: Any = None) -> None:
        """Notes how things are, before the first pass."""
        self._batches.keep(batch)
        if self._state is not None:
            self._state.take()
        self._random_states = random_states()

    @contextmanager
    def again(self) -> Iterator[Any]:
        """Puts things back for a second pass on the batch that it gives; then all is as the first one left it."""
        batch, as_it_came = self._batches.take()
        if not as_it_came and self._state is not None:
            self._state.unguarded.append("the batch")
        after = random_states() if self._same_random_numbers else None
        if self._state is not None:
            self._state.rewind()
        if after is not None:
            set_random_states(self._random_states)
        try:
            yield batch
        finally:
            if self._state is not None:
                self._state.fast_forward()
            if after is not None:
                set_random_states(after)

    def findings(self) -> list[str]:
        """What the user should know of the passes so far, each as one sentence, once."""
        if self._state is None:
            return []
        told = []
        if self._state.teachers:
            told.append(
                f"{_listed(self._state.teachers)}: not trained, and changed in training_step, as a teacher that "
                "follows. In the second pass it follows from the perturbed weights; then it is as the first left it. "
                "Move the change to on_train_batch_end, so that both passes see the same teacher."
            )
        if self._state.unguarded:
            told.append(
                f"{_listed(self._state.unguarded)}: changed in training_step for the first time, so that this step's "
                "second pass began with what the first one had left. From now on both begin with the same."
            )
        self._state.teachers, self._state.unguarded = [], []
        return told


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
