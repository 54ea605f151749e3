"""The clock and the conditions of every measurement."""

import os
import time
from importlib.metadata import version

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
THREADS = int(os.environ.get("BENCHMARK_THREADS", CORES))


def clock() -> float:
    """Seconds, once the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def conditions() -> dict[str, object]:
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "threads": THREADS,
        "versions": {name: version(name) for name in ("torch", "torchvision", "lightning")},
    }
