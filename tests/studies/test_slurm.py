"""The runs of a study as jobs of a real SLURM, and what a user is told where there is none."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import forking
import sam_lightning.studies.slurm  # noqa: F401  # what it imports sets environment variables, once
from sam_lightning.studies.command import main
from slurm_cluster import slurm_with_one_node, until  # noqa: F401  # the fixture `slurm`
from study_files import written

SETTINGS = ["--trainer.max_epochs", "16", "--trainer.accelerator", "cpu"]
OPTIONS = {"slurm_partition": "main", "timeout_min": 30, "mem_gb": 1.5}
pytestmark = pytest.mark.timeout(900)  # a job starts as a fresh process: many seconds each on a busy machine


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", forking.Popen)  # what checks the runs' words starts at once
    written(tmp_path, seeds=[1])


def submit(*more, options=OPTIONS):
    Path("slurm.yaml").write_text(yaml.safe_dump(options))
    return main(["run", "small.yaml", "--launcher", "slurm", "--slurm", "slurm.yaml", "--root", "runs", *more])


def fails(*more, **options):
    """What a command that must fail tells its user."""
    with pytest.raises(SystemExit) as exit_:
        submit(*more, **options)
    return exit_.value.code


def jobs_in(out):
    """The numbers of the jobs that were submitted, by arm."""
    return {arm: job for job, arm in re.findall(r"^  (\w+): (\w+), seed 1, log", out, re.MULTILINE)}


def results(root):
    """What came out of each run, by the run's name, without how long it took."""
    found = {}
    for path in Path(root).glob("*/result.json"):
        result = json.loads(path.read_text())
        epochs = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in result["epochs"]]
        found[path.parent.name] = (epochs, result["last"], result["best"])
    return found


def finished(slurm):
    """Waits for both results, and for SLURM to forget the jobs."""
    until(lambda: len(results("runs")) == 2, 600, Path("runs"))
    until(lambda: not slurm("squeue", "-h"), 60, Path("runs"))


@pytest.fixture(scope="module")
def local(slurm, tmp_path_factory):
    """The results of the same runs on this machine, without SLURM."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("local")
        patch.chdir(folder)
        written(folder, seeds=[1])
        words = ["study", "run", "small.yaml", "--root", "runs", "--jobs", "2", *SETTINGS]
        forking.run([sys.executable, "-m", "sam_lightning", *words], check=True)
        return results("runs")


def test_a_study_on_a_cluster(slurm, local, capsys):
    def submit_and_read(options=OPTIONS):
        assert submit(*SETTINGS, options=options) == 0
        return capsys.readouterr().out

    def queue(field):
        return set(slurm("squeue", "-h", "-r", "-o", field).split())

    out = submit_and_read({**OPTIONS, "slurm_additional_parameters": {"hold": True}})
    assert "2 runs in runs, 2 to do.\n2 runs submitted, 0 in the queue already.\n" in out
    jobs = set(jobs_in(out).values())
    nothing_new = "2 to do.\n0 runs submitted, 2 in the queue already.\n"
    assert queue("%T") == {"PENDING"}
    assert nothing_new in submit_and_read()
    slurm("scontrol", "release", *jobs)
    until(lambda: queue("%T") == {"RUNNING"}, 60, Path("runs"))
    assert nothing_new in submit_and_read()
    assert queue("%i") == jobs

    finished(slurm)
    assert len(local) == 2
    assert results("runs") == local
    assert "0 to do.\n0 runs submitted, 0 in the queue already.\n" in submit_and_read()
    assert queue("%i") == set()
    assert main(["report", "small.yaml", "--root", "runs", *SETTINGS]) == 0
    (table,) = Path("runs").glob("small*/runs.csv")
    assert [line.partition(",")[0] for line in table.read_text().splitlines()] == ["cell", "SGD", "SAM"]


def test_runs_that_are_requeued_or_run_out_of_time_go_on(slurm, local, capsys):
    assert submit(*SETTINGS, "--data.num_workers", "1") == 0
    jobs = jobs_in(capsys.readouterr().out)
    # The second is what SLURM does some time before a job's time is up, by submitit's choice of the signal.
    disturbances = {"SGD": ["scontrol", "requeue"], "SAM": ["scancel", "--signal=USR2"]}
    for arm, words in disturbances.items():
        (directory,) = Path("runs").glob(f"{arm.lower()}-*")
        until((directory / "checkpoints/last.ckpt").is_file, 300, Path("runs"))
        slurm(*words, jobs[arm])
    finished(slurm)
    assert results("runs") == local
    for arm in disturbances:
        (log,) = Path("runs").glob(f"{arm.lower()}-*/log.txt")
        said = log.read_text()
        assert said.count("Seed set to 1") == 2
        assert said.count("Restored all states from the checkpoint at") == 1
        assert said.count("Calling checkpoint method") == said.count("Requeued job") == (arm == "SAM")


def test_a_run_that_fails_says_so_in_its_log(slurm):
    assert submit("--only", "arm=SGD", "--data.batch_size", "-1") == 0
    (directory,) = Path("runs").glob("sgd-*")
    log = directory / "log.txt"
    until(lambda: log.is_file() and "sam-lightning: error: " in log.read_text(), 300, Path("runs"))
    assert not (directory / "result.json").exists()


def test_a_command_that_does_not_parse_is_not_submitted(slurm):
    assert "nothing was trained, since these runs do not parse" in fails("--trainer.max_epoch", "3")
    assert slurm("squeue", "-h") == ""
    assert not Path("runs").exists()


def test_what_sbatch_refuses(slurm, capfd):
    said = fails(options={**OPTIONS, "slurm_partition": "none"})
    assert "SLURM options slurm.yaml: sbatch: error: invalid partition specified: none" in said
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_mins": 30}, "Unknown executor 'timeout' in parameter 'timeout_mins'"),
        ({"slurm_partitions": "main"}, "Unknown argument 'partitions' for executor 'slurm'"),
        ({"timeout_min": "30"}, "expected type <class 'int'>"),
        ({"slurm_mem_gb": "4GB"}, "'4GB'"),
    ],
)
def test_options_that_submitit_does_not_know(tmp_path, monkeypatch, options, message):
    pytest.importorskip("submitit")
    for name in ("squeue", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    said = fails(options=options)
    assert said.startswith("sam-lightning: error: SLURM options slurm.yaml: ")
    assert message in said


def test_no_slurm_here(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "error: --launcher slurm: there is no squeue here: run it on a cluster's login node." in fails()


def test_no_submitit_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "--launcher slurm needs submitit, not installed here. Run: pip install 'sam-lightning[slurm]'" in fails()
