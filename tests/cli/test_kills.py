"""kill -9 at any moment, the same command again with `--ckpt_path last`, and the undisturbed run's end, bit for bit."""

import hashlib
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

import forking
from launch import ROOT, environment
from sam_lightning.runs.checkpoints import read_checkpoint

EPOCHS = 3
DYING_FIT = str(Path(__file__).parents[1] / "helpers/dying_fit.py")
NEVER = -1


def words(root, workers):
    base = ["-c", f"{ROOT}/configs/base.yaml", "-c", f"{ROOT}/configs/data/digits.yaml"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    schedule = ["--model.lr_scheduler", "CosineAnnealingLR", "--model.lr_scheduler.T_max", str(EPOCHS)]
    more = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", str(EPOCHS), "--data.num_workers", str(workers)]
    optimizer = ["--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml"]
    return ["fit", *base, *optimizer, *schedule, *quiet, *more, "--trainer.default_root_dir", str(root)]


def fingerprint(root):
    """A hash of weights, running statistics, optimizer, schedule, random states and every epoch's metrics."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(value.numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                if key != "seconds":
                    add(value[key])
        elif isinstance(value, list | tuple):
            for entry in value:
                add(entry)
        else:
            digest.update(repr(value).encode())

    content = read_checkpoint(max((root / "checkpoints").glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns))
    assert content["epoch"] == EPOCHS - 1
    callbacks = {name: state for name, state in content["callbacks"].items() if "Checkpoint" not in name}
    scores = [state["best_model_score"] for name, state in content["callbacks"].items() if "best" in str(state)]
    add([content["state_dict"], content["optimizer_states"], content["lr_schedulers"], callbacks, scores])
    return digest.hexdigest()


def fit(root, workers, killed_at=NEVER, may_die=False):
    """Runs the command; whether it lived, and what it printed last: the number of its changes of files."""
    command = words(root, workers)
    if any((root / "checkpoints").glob("*.ckpt")):
        command += ["--ckpt_path", "last"]
    done = forking.run([sys.executable, DYING_FIT, str(killed_at), str(root), *command], env=environment())
    assert done.returncode == 0 or (may_die and done.returncode == -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode == 0, done.stdout.rpartition("\n")[0].rpartition("\n")[2]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("some", [8, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_killed_run_comes_to_the_undisturbed_ones_end(tmp_path, some):
    ends, changes = {}, 0
    for workers in (0, 2):
        _, changes = fit(tmp_path / f"undisturbed{workers}", workers)
        ends[workers] = fingerprint(tmp_path / f"undisturbed{workers}")
    assert ends[0] == ends[2]

    moments = range(int(changes))
    for i, moment in enumerate(sorted(random.Random(0).sample(moments, some)) if some else moments):
        root, workers = tmp_path / str(moment), 2 if i % 8 == 5 else 0
        assert not fit(root, workers, moment, may_die=True)[0]
        if i % 3 == 0:  # and the one that goes on is killed, too
            fit(root, workers, 10 + moment // 3, may_die=True)
        fit(root, workers)
        assert fingerprint(root) == ends[workers], f"killed before change {moment} of {changes}"
