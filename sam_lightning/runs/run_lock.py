"""One process at a time is at a run."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Waits until no other process is at the run in this directory: two studies that share it may run at once."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        # A record lock: it ends with this process, however that ends, and its data loaders' workers do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
