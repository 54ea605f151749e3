"""The runs of a study as jobs of a SLURM cluster, through submitit."""

import io
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sam_lightning.runs.atomic_files import replacing
from sam_lightning.runs.directory import LOG
from sam_lightning.runs.extras import require
from sam_lightning.studies.execute import execute, printing_into
from sam_lightning.studies.runs import Run, directory_of
from sam_lightning.studies.sharpness_spec import SharpnessSpec
from sam_lightning.studies.spec import Study, StudyError, read_yaml

_JOB = "slurm.json"  # in a run's directory: the job that it was last submitted as


@dataclass(frozen=True)
class RunJob:
    """What a job executes, again from the run's last checkpoint if SLURM requeues it.

    Args:
        words: The run's `fit` command without its directory.
        directory: The run's directory, absolute.
        threads: CPU threads.
        sharpness: What is measured of it.
    """

    words: tuple[str, ...]
    directory: Path
    threads: int
    sharpness: SharpnessSpec | None = None

    def __call__(self) -> None:
        """Executes the run."""
        torch.set_num_threads(self.threads)
        # SLURM signals the workers of data loaders, too, and each would requeue the job by submitit's handler.
        os.register_at_fork(after_in_child=partial(signal.signal, signal.SIGUSR2, signal.SIG_IGN))
        with printing_into(self.directory / LOG):
            try:
                execute(self.words, self.directory, sharpness=self.sharpness)
            except SystemExit as error:  # Python prints its words when the process ends, into submitit's files
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
                raise
            except Exception:
                traceback.print_exc()
                raise

    def checkpoint(self) -> Any:
        """What submitit submits when the job's time is up or it is preempted: the same run."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(study: Study, runs: Sequence[Run], root: Path, threads: int, options: Path | None) -> None:
    """Submits the runs as one job array, without those that are in the queue already.

    Args:
        study: The study.
        runs: The runs without a result.
        root: Where their directories are; all nodes must see it under the same path.
        threads: CPU threads of each run.
        options: YAML with submitit's names: `slurm_partition`, `timeout_min`, `gpus_per_node`, `mem_gb`, ...

    Raises:
        MissingExtraError: If submitit is not installed.
        StudyError: If SLURM is not installed, or an option is unknown or refused.
    """
    require("slurm", "--launcher slurm", "submitit")
    import submitit

    queued = _queue()
    waiting = [run for run in runs if _job_of(root / run.name) in queued]
    new = [run for run in runs if run not in waiting]
    parameters = {"name": study.path.stem, "cpus_per_task": threads, **(read_yaml(options) if options else {})}
    folder = directory_of(study, root).resolve() / "slurm"
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm")
        executor.update_parameters(**parameters)
        calls = [RunJob(run.words, (root / run.name).resolve(), threads, run.sharpness) for run in new]
        with redirect_stderr(io.StringIO()):  # submitit prints what sbatch says before it raises it
            jobs = executor.submit_array(calls) if new else []
    except (NameError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise StudyError(f"SLURM options {options or 'of submitit'}: {error}") from error
    for run, job in zip(new, jobs, strict=True):
        with replacing(root / run.name / _JOB) as draft:
            draft.write_text(json.dumps(job.job_id))
    print(f"{len(new)} runs submitted, {len(waiting)} in the queue already.")
    for run, job in zip(new, jobs, strict=True):
        print(f"  {job.job_id}: {run.cell.label}, seed {run.seed}, log {root / run.name / LOG}")
    print(
        f"squeue shows them; `study report {study.path}` with the same --root and settings reports what is finished; "
        "the same command submits the rest."
    )


def _queue() -> set[str]:
    """Numbers of the jobs that wait or run, arrays by their elements."""
    try:
        done = subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise StudyError("--launcher slurm: there is no squeue here: run it on a cluster's login node.") from error
    except subprocess.CalledProcessError as error:
        raise StudyError(f"--launcher slurm: squeue failed: {error.stderr.strip()}") from error
    return set(done.stdout.split())


def _job_of(directory: Path) -> str | None:
    path = directory / _JOB
    return str(json.loads(path.read_text())) if path.is_file() else None
