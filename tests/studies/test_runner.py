"""Studies that run: interrupted, killed, failing, several at once."""

import json
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import forking
from killing import PLAN
from launch import ROOT, environment
from sam_lightning.runs.checkpoints import read_checkpoint
from sam_lightning.runs.directory import LOG, RESULT
from sam_lightning.studies.runs import runs_of
from sam_lightning.studies.spec import load
from sam_lightning.studies.worker_pool import Worker
from study_files import SMALL, written

EPOCHS = 6
ENVIRONMENT = {**environment(), "PYTHONPATH": f"{ROOT}:{ROOT}/tests/helpers"}
STUDY = [sys.executable, "-m", "sam_lightning", "study", "run"]
pytestmark = pytest.mark.timeout(600)


def begin(path, root, *more, epochs=EPOCHS, kill=None, typed=False):
    """A `study run` that goes on while the test does, forked unless it is to begin as one that was typed.

    `kill` says what is killed when, see `killing`.
    """
    plan = root / "kill.txt"
    if kill:
        root.mkdir(parents=True, exist_ok=True)
        plan.write_text(kill)
    words = [
        *STUDY,
        str(path),
        "--root",
        str(root),
        "--trainer.max_epochs",
        str(epochs),
        "--trainer.accelerator",
        "cpu",
    ]
    env = {**ENVIRONMENT, PLAN: str(plan)}
    python = subprocess.Popen if typed else forking.Popen
    return python([*words, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def study_run(path, root, *more, epochs=EPOCHS, typed=False):
    """The output and the exit code of a `study run`."""
    process = begin(path, root, *more, epochs=epochs, typed=typed)
    out, _ = process.communicate(timeout=500)
    return out, process.returncode


def runs_in(path, epochs=EPOCHS):
    return runs_of(load(str(path), {"trainer.max_epochs": str(epochs), "trainer.accelerator": "cpu"}))


def outcome(folder):
    """What a run came to, without what may differ: time and place."""
    content = json.loads((folder / RESULT).read_text())
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in content["epochs"]]
    conditions = {key: value for key, value in content["conditions"].items() if key != "commit"}
    last = read_checkpoint(folder / "checkpoints/last.ckpt")
    assert last["epoch"] == EPOCHS - 1
    weights = {name: value.numpy().tobytes() for name, value in last["state_dict"].items()}
    return {**content, "epochs": rows, "conditions": conditions, "command": content["command"][:-1], "weights": weights}


def outcomes(root, path):
    return {run.name: outcome(root / run.name) for run in runs_in(path)}


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A study that ran one run at a time: its file and its directory."""
    folder = tmp_path_factory.mktemp("undisturbed")
    killing = folder / "killing.yaml"
    killing.write_text("trainer: {callbacks+: [{class_path: killing.Killing}]}")
    path = written(folder, layers=[*SMALL["layers"], str(killing)])
    out, code = study_run(path, folder / "runs", "--jobs", "1", typed=True)
    assert code == 0, out
    return path, folder / "runs", out


def test_a_study_trains_tests_and_reports(undisturbed):
    path, root, out = undisturbed
    lines = out.splitlines()
    assert lines[0] == f"Which? 4 runs in {root}, 4 to do."
    done = [line for line in lines if line.startswith("[")]
    assert [re.sub(r"\d\d:\d\d", "T", line) for line in done] == [
        "[1/4] done: SGD, seed 1, T (about T left)",
        "[2/4] done: SAM, seed 1, T (about T left)",
        "[3/4] done: SGD, seed 2, T (about T left)",
        "[4/4] done: SAM, seed 2, T",
    ]
    assert any(line.startswith("tensorboard    tensorboard --host 127.0.0.1 --logdir") for line in lines)
    assert re.match(r"SAM .* points of test accuracy at the last epoch", lines[-1])  # what came out, in words
    folder = root / f"small,trainer.accelerator=cpu,trainer.max_epochs={EPOCHS}"
    assert (folder / "report.md").is_file()
    for run in runs_in(path):
        result = json.loads((root / run.name / RESULT).read_text())
        assert [row["epoch"] for row in result["epochs"]] == list(range(1, EPOCHS + 1))
        assert result["gradients_per_step"] == (2 if run.cell.arm == "SAM" else 1)
        accuracies = [row["val/accuracy"] for row in result["epochs"]]
        assert result["best"]["epoch"] == accuracies.index(max(accuracies)) + 1
        assert 0.5 < result["last"]["test/accuracy"] <= 1
        assert result["conditions"]["threads"] == 1
        assert result["conditions"]["versions"]["torch"] == version("torch")
        assert (folder / "runs" / f"{run.cell.arm}-seed{run.seed}" / RESULT).samefile(root / run.name / RESULT)


def test_a_finished_study_trains_nothing_again(undisturbed):
    path, root, _ = undisturbed
    before = {run.name: (root / run.name / LOG).read_text() for run in runs_in(path)}
    out, code = study_run(path, root)
    assert code == 0
    assert "4 runs in" in out.splitlines()[0]
    assert out.splitlines()[0].endswith("0 to do.")
    assert "[1/" not in out
    assert {run.name: (root / run.name / LOG).read_text() for run in runs_in(path)} == before


def test_two_at_once_give_the_results_of_one_at_a_time(undisturbed, tmp_path):
    path, root, _ = undisturbed
    out, code = study_run(path, tmp_path, "--jobs", "2")
    assert code == 0, out
    assert outcomes(tmp_path, path) == outcomes(root, path)


def test_the_loaders_workers_change_nothing_and_keep_no_run_locked(undisturbed, tmp_path):
    path, root, _ = undisturbed
    more = ("--jobs", "2", "--data.num_workers", "1", "--only", "seed=1")
    process = begin(path, tmp_path, *more)
    runs = [run for run in runs_in(path) if run.seed == 1]
    until(lambda: any((tmp_path / run.name / "checkpoints/last.ckpt").exists() for run in runs))
    process.kill()
    process.communicate()
    out, code = study_run(path, tmp_path, *more)
    assert code == 0, out
    for run in runs:
        ours, theirs = (outcome(folder / run.name) for folder in (tmp_path, root))
        assert {**ours, "command": ()} == {**theirs, "command": ()}


def test_several_devices_are_refused(tmp_path):
    out, code = study_run(written(tmp_path), tmp_path / "runs", "--trainer.devices", "2")
    assert code == 1
    assert "a study's runs use one device each: trainer.devices must be 1. For more use `fit`." in out


def test_a_pasted_command_gives_the_studys_result(undisturbed, tmp_path):
    """A fresh process, where the study's worker was warm."""
    path, root, _ = undisturbed
    run = runs_in(path)[-1]
    words = [sys.executable, "-m", "sam_lightning", *run.commands(tmp_path)[0]]
    forking.run(words, check=True, env=ENVIRONMENT)
    pasted, studied = (read_checkpoint(folder / run.name / "checkpoints/last.ckpt") for folder in (tmp_path, root))
    for name, value in studied["state_dict"].items():
        assert torch.equal(pasted["state_dict"][name], value), name


def test_a_study_that_is_killed_three_times_comes_to_the_same(undisturbed, tmp_path):
    path, root, _ = undisturbed
    runs = runs_in(path)
    for epoch in (2, 5, 1):  # of the first run that begins it
        process = begin(path, tmp_path, "--jobs", "2", kill=f"study {epoch}")
        process.communicate(timeout=500)
        assert process.returncode == -signal.SIGKILL
        assert not all((tmp_path / run.name / RESULT).exists() for run in runs)
    out, code = study_run(path, tmp_path, "--jobs", "2")
    assert code == 0, out
    assert any("Restored all states" in (tmp_path / run.name / LOG).read_text() for run in runs)
    assert outcomes(tmp_path, path) == outcomes(root, path)


def test_ctrl_c_ends_everything_and_says_how_to_go_on(undisturbed, tmp_path):
    path, _, _ = undisturbed
    process = begin(path, tmp_path, "--jobs", "1", epochs=500)
    run = runs_in(path, 500)[0]
    until(lambda: (tmp_path / run.name / "checkpoints/last.ckpt").exists())
    started = children(process.pid)
    assert started
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: 0 of 4 runs are done; the same command goes on." in out
    assert "Traceback" not in out
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))  # no worker is left behind


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_failing_run_takes_no_other_down(tmp_path):
    bad = {"optimizer": SMALL["arms"]["SAM"], "set": {"model.optimizer.rho": -1}}
    path = written(tmp_path, arms={"bad": bad, "SGD": SMALL["arms"]["SGD"]}, seeds=[1])
    out, code = study_run(path, tmp_path / "runs", "--jobs", "1", epochs=1)
    assert code == 1
    lines = out.splitlines()
    assert [line.partition(",")[0] for line in lines if line.startswith(("[", "failed"))] == [
        "failed, will be tried once more: bad".partition(",")[0],
        "[1/2] done: SGD",
        "[2/2] failed: bad",
        "failed twice: bad",
    ]
    assert "  sam-lightning: error: rho must be" in lines[-1]
    assert "Missing: bad, seed 1." in out
    assert out.count("rho must be") == 2  # both attempts are in the log


def test_a_worker_that_is_killed_is_replaced(undisturbed, tmp_path):
    path, root, _ = undisturbed
    process = begin(path, tmp_path, "--jobs", "1", kill="worker 3")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert not (tmp_path / "kill.txt").exists()
    assert "failed, will be tried once more: SGD, seed 1" in out
    assert outcomes(tmp_path, path) == outcomes(root, path)


def test_a_worker_that_died_while_it_waited_can_be_replaced():
    worker = Worker({})
    assert worker.is_alive
    worker._process.kill()
    worker._process.wait()
    assert not worker.is_alive
    assert list(worker.ask(check=["fit"])) == []
    worker.stop()


def test_an_arm_that_does_not_parse_ends_the_study_before_anything_trains(tmp_path):
    arms = {**SMALL["arms"], "wide": {"optimizer": SMALL["arms"]["SAM"], "set": {"model.optimizer.roh": 0.1}}}
    out, code = study_run(written(tmp_path, arms=arms), tmp_path / "runs")
    assert code == 1
    assert "nothing was trained, since these runs do not parse:" in out
    assert "wide" in out
    assert "roh" in out
    assert not (tmp_path / "runs").exists()


def test_studies_that_share_a_run_train_it_once(tmp_path):
    names = ("one", "two")
    paths = [written(tmp_path, name=name, arms={"SGD": SMALL["arms"]["SGD"]}, seeds=[1]) for name in names]
    processes = [begin(path, tmp_path / "runs", epochs=2) for path in paths]
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    (run,) = runs_in(paths[0], 2)
    assert (tmp_path / "runs" / run.name / LOG).read_text().count("`Trainer.fit` stopped") == 1
