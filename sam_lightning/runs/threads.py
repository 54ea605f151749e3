"""Threads by the size of the work: small work waits for them longer than it computes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def _quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The whole cores of the CPU quota that a container was given, at least 1; None without one."""
    try:
        if (root / "cpu.max").is_file():  # cgroup 2
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = ((root / f"cpu/cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if quota in ("max", "-1") else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None
