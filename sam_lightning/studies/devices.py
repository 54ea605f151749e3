"""How many runs at once, and what each of them gets."""

import os

import torch

from sam_lightning.runs.threads import usable_cores


def environments(jobs: int | None, jobs_per_device: int, threads: int, accelerator: str) -> list[dict[str, str]]:
    """The variables of each worker process.

    The threads of a run do not depend on how many run at once: they decide in which order numbers are added, and
    so the last bits of a result.

    Args:
        jobs: Runs at once; `None`: as many as there is room for.
        jobs_per_device: Runs at once on each GPU.
        threads: CPU threads of each run.
        accelerator: What the runs ask for; `cpu` leaves GPUs alone.
    """
    gpus = [] if accelerator == "cpu" else _gpus()
    room = len(gpus) * jobs_per_device if gpus else max(1, usable_cores() // threads)
    count = room if jobs is None else min(jobs, room) if gpus else jobs
    shared = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return [{**shared, **({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})} for i in range(count)]


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]
