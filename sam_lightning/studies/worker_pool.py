"""Runs shared out over warm worker processes on this machine."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sam_lightning.runs.directory import LOG
from sam_lightning.studies.runs import Run

ATTEMPTS = 2


@dataclass(frozen=True)
class Event:
    """What happened to a run: `started`, `epoch` (with the number of epochs done), `done`, `failed`, or `retried`."""

    run: Run
    kind: str
    epochs: int = 0


class Worker:
    """A process of `sam_lightning.studies.worker`.

    Args:
        environment: Variables of its own, such as those that give it a device.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "sam_lightning.studies.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C is for the study, which ends its workers
        )

    def ask(self, **request: Any) -> Iterator[dict[str, Any]]:
        """Sends a request; the answers until the last one, or until the process dies."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return
        for line in self._process.stdout:
            answer = json.loads(line)
            yield answer
            if "epoch" not in answer:
                return

    @property
    def is_alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the process at once: what a run has saved is whole, and a run can be resumed."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):  # what it was last asked is still there, and nobody left to read it
                    stream.close()


class Pool:
    """Workers that wait for runs, one per environment.

    A worker takes one run after the other. One that failed or died is replaced by a fresh process, and its run is
    tried once more, after the others.

    Args:
        environments: The variables of each worker.
    """

    def __init__(self, environments: Sequence[dict[str, str]]) -> None:
        self._environments = environments
        self._workers = [Worker(environment) for environment in environments]
        self._is_stopped = False

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped = True
        for worker in self._workers:
            worker.stop()

    def check(self, runs: Sequence[Run]) -> tuple[list[str], list[int]]:
        """Parses the commands of all runs before anything trains.

        Returns:
            Messages of those that do not parse, and the number of epochs of each that does.
        """
        errors: list[str] = []
        epochs: list[int] = []
        for run in runs:
            answer: dict[str, Any] = next(self._workers[0].ask(check=run.words), {"error": "the worker process died."})
            if "error" in answer:
                errors.append(f"{run.cell.label}: {answer['error'].strip()}")
            else:
                epochs.append(answer["epochs"])
        return errors, epochs

    def execute(self, runs: Sequence[Run], root: Path, tell: Callable[[Event], None]) -> list[Run]:
        """Executes the runs.

        Args:
            runs: What to execute, in this order.
            root: Where their directories are.
            tell: Is called in this thread for every event.

        Returns:
            The runs that failed twice.
        """
        todo = deque((run, ATTEMPTS) for run in runs)
        events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=self._serve, args=(i, todo, root, events), daemon=True)
            for i in range(len(self._workers))
        ]
        for thread in threads:
            thread.start()
        failed = []
        open_runs = len(runs)
        while open_runs:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            tell(event)
            open_runs -= event.kind in ("done", "failed")
            if event.kind == "failed":
                failed.append(event.run)
        return failed

    def _serve(self, i: int, todo: "deque[tuple[Run, int]]", root: Path, events: "queue.SimpleQueue[Any]") -> None:
        """One worker's thread. It stays while others may still give a failed run back."""
        try:
            while not self._is_stopped:
                try:
                    run, attempts = todo.popleft()
                except IndexError:
                    threading.Event().wait(0.2)
                    continue
                if not self._workers[i].is_alive:  # lost while it waited: no fault of this run's
                    self._replace(i)
                events.put(Event(run, "started"))
                if self._finishes(i, run, root, events):
                    events.put(Event(run, "done"))
                elif not self._is_stopped:
                    self._replace(i)
                    if attempts > 1:
                        todo.append((run, attempts - 1))
                    events.put(Event(run, "retried" if attempts > 1 else "failed"))
        except BaseException as error:
            events.put(error)

    def _replace(self, i: int) -> None:
        self._workers[i].stop()
        self._workers[i] = Worker(self._environments[i])

    def _finishes(self, i: int, run: Run, root: Path, events: "queue.SimpleQueue[Any]") -> bool:
        sharpness = run.sharpness and asdict(run.sharpness)
        for answer in self._workers[i].ask(words=run.words, directory=str(root / run.name), sharpness=sharpness):
            if "epoch" in answer:
                events.put(Event(run, "epoch", answer["epoch"]))
        return run.is_finished(root)


def last_lines(run: Run, root: Path, count: int = 12) -> list[str]:
    """The end of a run's log."""
    path = root / run.name / LOG
    return path.read_text(errors="replace").splitlines()[-count:] if path.is_file() else []
