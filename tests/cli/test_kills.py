"""kill -9 at any moment, the same command again with `--ckpt_path last`, and the undisturbed run's end, bit for bit."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from launch import ROOT, environment
from sam_lightning.runs.checkpoints import read_checkpoint

EPOCHS = 4
SERVER = Path(__file__).parents[1] / "helpers/forked_fit.py"


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


class Server:
    """A process that has imported everything and forks for each command, which then starts at once."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def fit(self, command, log, kill_at_write=None, kill_after=None):
        """Runs a command; killed at its n-th write of a checkpoint (`before`, `within`, `behind`), or after seconds."""
        self.process.stdin.write(repr((command, str(log), kill_at_write)) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
        self.process.stdin.write("wait\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def killed_and_resumed(server, folder, workers, duration, moment):
    """The fingerprint of a run that was killed at one random moment or two, and how often it was."""
    for attempt in range(20):
        root = folder / str(attempt)
        root.mkdir(parents=True)
        kills = 0
        for may_be_killed in (True, moment.random() < 0.5, False):
            command = words(root, workers)
            if any((root / "checkpoints").glob("*.ckpt")):
                command += ["--ckpt_path", "last"]
            options = {}
            if may_be_killed and moment.random() < 0.4:
                options["kill_at_write"] = (moment.randrange(EPOCHS), moment.choice(["before", "within", "behind"]))
            elif may_be_killed:
                options["kill_after"] = moment.uniform(0, duration)
            code = server.fit(command, root / "log.txt", **options)
            if code == 0:
                break
            assert code == -signal.SIGKILL, (root / "log.txt").read_text()[-3000:]
            assert may_be_killed
            kills += 1
        if kills:
            return fingerprint(root), kills
        duration *= 0.7  # it was faster than the moment
    raise AssertionError("no run could be killed before it ended")


@pytest.fixture(scope="module")
def servers():
    both = [Server(), Server()]
    yield both
    for server in both:
        server.close()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("runs", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_run_comes_to_the_undisturbed_ones_end(servers, tmp_path, runs):
    undisturbed, durations = {}, {}
    for workers in (0, 2):
        root = tmp_path / f"undisturbed{workers}"
        root.mkdir()
        begun = time.monotonic()
        assert servers[0].fit(words(root, workers), root / "log.txt") == 0, (root / "log.txt").read_text()[-3000:]
        durations[workers] = time.monotonic() - begun
        undisturbed[workers] = fingerprint(root)
    assert undisturbed[0] == undisturbed[2]

    def some(i):
        outcomes = []
        for run in range(i, runs, len(servers)):
            workers = 2 if run % 10 >= 8 else 0
            moment = random.Random(run)
            found, kills = killed_and_resumed(servers[i], tmp_path / f"run{run}", workers, durations[workers], moment)
            outcomes.append((run, found == undisturbed[workers], kills))
        return outcomes

    with ThreadPoolExecutor(len(servers)) as pool:
        outcomes = sorted(outcome for part in pool.map(some, range(len(servers))) for outcome in part)
    kills = sum(kills for _, _, kills in outcomes)
    print(f"{sum(same for _, same, _ in outcomes)} of {runs} runs identical after {kills} kills")
    assert [run for run, same, _ in outcomes if not same] == []
    assert kills >= runs
