"""What a running study shows: a line per run, and a bar over all of them with the time left."""

import sys
from collections.abc import Sequence
from time import monotonic

from tqdm import tqdm

from sam_lightning.studies.runs import Run
from sam_lightning.studies.worker_pool import Event


class Display:
    """Shows events. On a terminal every run at work has a line of its own below the bar; elsewhere only ends show.

    Args:
        runs: What will be executed.
        epochs: The epochs of each.
    """

    def __init__(self, runs: Sequence[Run], epochs: Sequence[int]) -> None:
        self._epochs = {run.name: total for run, total in zip(runs, epochs, strict=True)}
        self._behind: dict[str, int] = {}  # epochs that a run has behind it
        self._given: dict[str, int] = {}  # of these, what it had from a checkpoint
        self._ended = 0
        self._started: dict[str, float] = {}
        self._start = monotonic()
        self._bars: dict[str, tqdm] = {}
        self._is_live = sys.stderr.isatty()
        self._overall = self._bar("all runs", sum(epochs), position=0)

    def __call__(self, event: Event) -> None:
        """Shows an event."""
        name = event.run.name
        label = f"{event.run.cell.label}, seed {event.run.seed}"
        if event.kind == "started":
            self._started[name] = monotonic()
            taken = {bar.pos for bar in self._bars.values()}
            free = next(i for i in range(1, len(taken) + 2) if -i not in taken and i not in taken)
            self._bars[name] = self._bar(label, self._epochs[name], free)
        elif event.kind == "epoch":
            if name not in self._behind:
                self._given[name] = event.epochs
            self._behind[name] = event.epochs
            self._bars[name].update(event.epochs - self._bars[name].n)
            if event.run.sharpness and event.epochs == self._epochs[name]:  # which may take longer than an epoch
                self._bars[name].set_description(f"{label}, measuring sharpness")
        else:
            self._bars.pop(name).close()
            if event.kind == "retried":
                line = f"failed, will be tried once more: {label}"
            else:
                self._ended += 1
                self._behind[name] = self._epochs[name]
                line = f"[{self._ended}/{len(self._epochs)}] {event.kind}: {label}, {self._seconds(name)}{self._left()}"
            tqdm.write(line)
        done = sum(self._behind.values())
        self._overall.update(done - self._overall.n)

    def close(self) -> None:
        """Removes the bars."""
        for bar in (*self._bars.values(), self._overall):
            bar.close()

    def _bar(self, label: str, total: int, position: int) -> tqdm:
        return tqdm(
            total=total,
            desc=label,
            unit="epoch",
            position=position,
            leave=False,
            disable=not self._is_live,
            smoothing=0,  # the mean of all epochs: arms differ in speed
        )

    def _seconds(self, name: str) -> str:
        return str(tqdm.format_interval(monotonic() - self._started[name]))

    def _left(self) -> str:
        """The time left, told from the epochs so far."""
        trained = sum(self._behind.values()) - sum(self._given.values())
        left = sum(self._epochs.values()) - sum(self._behind.values())
        if not left or not trained:
            return ""
        return f" (about {tqdm.format_interval((monotonic() - self._start) / trained * left)} left)"
