"""Starts two processes with gloo on the CPU, and brings back what each of them saved."""

import os
import socket
import sys
from pathlib import Path

import torch

import forking

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def two_ranks(worker: str, folder: Path, *words: str, timeout: float = 900) -> list:
    """Runs `tests/helpers/<worker>` as ranks 0 and 1; what each has saved as `rank<n>.pt` in `folder`."""
    command = [*TORCHRUN, "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command += [str(ROOT / "tests/helpers" / worker), str(folder), *words]
    done = forking.run(command, timeout=timeout, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
