"""Executes what is missing of a study, here or on a cluster."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sam_lightning.runs.directory import LOG
from sam_lightning.studies.devices import environments
from sam_lightning.studies.progress import Display
from sam_lightning.studies.runs import Run, directory_of, runs_of, select
from sam_lightning.studies.spec import Study, StudyError
from sam_lightning.studies.worker_pool import Pool, last_lines


def launch(study: Study, options: argparse.Namespace) -> int:
    """Executes the chosen runs that have no result, and reports.

    Returns:
        The process's exit code: 0, 1 if a run failed, 130 after Ctrl-C.
    """
    runs = select(runs_of(study), options.only)
    if options.dry_run:
        for run in runs:
            for words in run.commands(options.root):
                print(f"OMP_NUM_THREADS={options.threads} sam-lightning {shlex.join(words)}")
        return 0
    todo = [run for run in runs if not run.is_finished(options.root)]
    print(f"{study.question} {len(runs)} runs in {options.root}, {len(todo)} to do.", flush=True)
    if options.launcher == "slurm":
        from sam_lightning.studies.slurm import submit  # an optional extra

        if todo:
            with Pool(environments(1, 1, options.threads, "cpu")) as pool:
                _check(pool, todo, study)
        link(study, runs, options.root)
        submit(study, todo, options.root, options.threads, options.slurm)
        return 0
    try:
        failed = _execute(runs, todo, study, options)
    except KeyboardInterrupt:
        done = sum(run.is_finished(options.root) for run in runs)
        print(f"\ninterrupted: {done} of {len(runs)} runs are done; the same command goes on.", file=sys.stderr)
        return 130
    if len(failed) < len(runs):
        from sam_lightning.studies.report import publish  # a second, which a dry run need not spend

        publish(study, options.root)
    for run in failed:
        print(f"\nfailed twice: {run.cell.label}, seed {run.seed}. The end of {options.root / run.name / LOG}:")
        print("\n".join(f"  {line}" for line in last_lines(run, options.root)))
    return 1 if failed else 0


def _execute(runs: Sequence[Run], todo: Sequence[Run], study: Study, options: argparse.Namespace) -> list[Run]:
    if not todo:
        link(study, runs, options.root)
        return []
    accelerator = study.overrides.get("trainer.accelerator", "auto")
    places = environments(options.jobs, options.jobs_per_device, options.threads, accelerator)[: len(todo)]
    with Pool(places) as pool:
        epochs = _check(pool, todo, study)
        link(study, runs, options.root)  # only now: a study that cannot be meant leaves no directory
        display = Display(todo, epochs)
        try:
            return pool.execute(todo, options.root, display)
        finally:
            display.close()


def _check(pool: Pool, todo: Sequence[Run], study: Study) -> list[int]:
    """How many epochs each run trains; refuses all of them if one does not parse."""
    errors, epochs = pool.check(todo)
    if errors:
        raise StudyError(f"{study.path}: nothing was trained, since these runs do not parse:\n" + "\n".join(errors))
    return epochs


def link(study: Study, runs: Sequence[Run], root: Path) -> None:
    """Names the runs in the study's directory, for TensorBoard and for people, by arm and seed."""
    folder = directory_of(study, root) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        path = folder / re.sub(r"[^\w.-]+", "_", f"{run.cell.label}-seed{run.seed}".replace(", ", "-"))
        target = os.path.relpath(root / run.name, folder)
        with suppress(OSError):  # a file system without links
            if path.is_symlink() and os.readlink(path) != target:  # the run before a change of its files
                path.unlink()
            if not path.is_symlink():
                path.symlink_to(target, target_is_directory=True)
