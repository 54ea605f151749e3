"""Threads by the size of the work: small work waits for them longer than it computes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

OPERATIONS_PER_THREAD = 10**9  # tens of milliseconds of one core


def usable_cores() -> int:
    """The cores that this process may use: by its affinity, its container's CPU quota, and SLURM's allocation."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allocated = os.environ.get("SLURM_CPUS_PER_TASK", "")
    limits = [cores, int(allocated) if allocated.isdigit() else cores, _quota() or cores]
    return max(1, min(limits))


@contextmanager
def threads_for(operations: float) -> Iterator[int]:
    """Inside, torch computes with a thread for every 1e9 operations, at least one; with no more than before.

    At the end of each parallel loop all threads wait for the last one. Where the system has taken its core away, a
    loop of microseconds takes the milliseconds until it gets it back.

    Args:
        operations: Roughly, of what is computed at a time: multiplications of a forward pass of one batch, or
            entries that are written times steps.

    Returns:
        The number of threads.
    """
    before = torch.get_num_threads()
    threads = max(1, int(min(before, operations / OPERATIONS_PER_THREAD)))
    if threads > 1:  # only then: to ask for the cores reads files
        threads = min(threads, usable_cores())
    if threads != before:
        torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        if threads != before:
            torch.set_num_threads(before)


def _quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The whole cores of the least CPU quota of this process's control groups, at least 1; None without one."""
    folders = {root, root / "cpu"}  # a container sees its own group as the root of version 2, or of 1
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top = root / "cpu" if "cpu" in controllers.split(",") else root if not controllers else None
            group = Path(path).relative_to("/")
            folders |= {top / above for above in (group, *group.parents)} if top else set()
    found = []
    for folder in folders:
        with suppress(OSError, ValueError):  # no such file, or no limit
            if (folder / "cpu.max").is_file():
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            found += [max(1, quota // period)] if quota > 0 else []
    return min(found, default=None)
