"""Faults in a training from the command line: one clear message, a code other than 0, and nothing saved is lost."""

import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

import forking
from commands import BASE, QUICK, ROOT, fails, fit
from killing import PLAN
from launch import environment, free_port
from regression import SAM_SGD, Regression, assert_same, loader, state_of
from sam_lightning.cli import main
from sam_lightning.models import ImageClassifier, digits_cnn
from sam_lightning.runs.checkpoints import find_checkpoint, read_checkpoint

RUN = Path("runs/digits-sam-seed1")
SAM = ["--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml"]
WORDS = ["fit", *BASE, *SAM, *QUICK]
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class InPass(Callback):
    """Raises in a pass of a step: in the loss, when some of its gradients are there already."""

    def __init__(self, error, step, second):
        self.error, self.step, self.second = error, step, second

    def on_train_start(self, trainer, module):
        weight = next(module.parameters())  # the last to get its gradient

        def hook(gradient):
            if trainer.global_step == self.step and module.is_second_pass == self.second:
                raise self.error

        self.weights_before = {}
        weight.register_hook(hook)

    def on_train_batch_start(self, trainer, module, *_):
        self.weights_before = {name: p.detach().clone() for name, p in module.named_parameters()}

    def on_exception(self, trainer, module, exception):
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, self.weights_before[name]), name


@pytest.mark.parametrize("second", [False, True], ids=["first-pass", "second-pass"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "error: out of memory: CUDA out of"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--model.micro_batches 2 or more"),
        (KeyboardInterrupt(), "interrupted: go on with: sam-lightning fit --ckpt_path runs/digits-sam-seed1"),
    ],
    ids=["out-of-memory", "cpu-memory", "ctrl-c"],
)
def test_a_fault_in_a_pass_leaves_weights_and_checkpoints_as_they_were(capsys, error, message, second):
    """One step after the first epoch, whose checkpoint stays the newest; from it a run comes to the same end."""
    fault = InPass(error, step=5, second=second)
    with pytest.raises(SystemExit) as exit_:
        main([*WORDS, "--trainer.max_epochs", "2"], [fault])
    assert exit_.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(exit_.value.code)
    assert read_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] == 4
    resumed = main(["fit", "--ckpt_path", str(RUN)])
    straight = fit("--trainer.default_root_dir", "straight", epochs=2)
    assert_same(state_of(resumed.model), state_of(straight.model))


def test_an_error_of_ones_own_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        main(WORDS, [InPass(ZeroDivisionError("mine"), step=1, second=True)])


def test_an_error_in_ones_own_module_keeps_its_traceback(capsys, monkeypatch):
    Path("mine_with_fault.py").write_text(
        "from sam_lightning.models import ImageClassifier\n"
        "class Mine(ImageClassifier):\n"
        "    def __init__(self, network, optimizer):\n"
        "        super().__init__(network, optimizer)\n"
        "        a, b = [1]\n"
    )
    monkeypatch.syspath_prepend(".")
    own = ["--model", "mine_with_fault.Mine", "--model.network", "sam_lightning.models.digits_cnn"]
    with pytest.raises(ValueError, match="not enough values to unpack"):
        main(["fit", *own, "--data", "Digits", *SAM])
    assert "rho must be" in fails(capsys, *WORDS, "--model.optimizer.rho", "-1")  # no fault of anyone's code


def test_a_monitored_metric_that_nobody_logs_is_told_with_the_option_that_names_it(capsys):
    said = fails(capsys, *WORDS, "--trainer.callbacks.monitor", "val/f1")
    assert "could not find the monitored key in the returned metrics" in said
    assert "Name what your module logs by --trainer.callbacks.monitor NAME" in said


class Unreadable(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        raise PermissionError(13, "Permission denied", "mine.csv")


def test_ones_own_file_that_cannot_be_read_is_not_called_one_that_cannot_be_written():
    with pytest.raises(PermissionError):
        main(WORDS, [Unreadable()])


class Spoil(Callback):
    """Puts NaN into a batch."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            batch[0][0] = torch.nan


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "asam"])
def test_training_that_diverges_ends_before_it_is_saved(capsys, optimizer):
    words = ["fit", *BASE, "--model.optimizer", f"{ROOT}/configs/optimizers/{optimizer}.yaml", *QUICK]
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "100"], [Spoil(6)])
    assert "error: training diverged: the weights are not finite in epoch 2, step 8." in (exit_.value.code)
    for path in Path("runs").glob("*/checkpoints/*.ckpt"):
        content = read_checkpoint(path)
        assert content["epoch"] == 0
        assert all(value.isfinite().all() for value in content["state_dict"].values())


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_weights_that_are_not_finite_are_saved_by_no_callback():
    saving = ["--trainer.callbacks.every_n_train_steps", "2", "--trainer.callbacks.monitor", "null"]
    words = [*WORDS, *saving, "--trainer.limit_train_batches", "9", "--trainer.log_every_n_steps", "100"]
    with pytest.raises(SystemExit) as exit_:
        main(words, [Spoil(2)])
    assert "not finite in epoch 1, step 4" in exit_.value.code
    assert read_checkpoint(RUN / "checkpoints/best.ckpt")["global_step"] == 2


def test_training_that_diverges_ends_when_it_logs_next(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*WORDS, "--trainer.limit_train_batches", "20", "--trainer.log_every_n_steps", "4"], [Spoil(1)])
    assert "not finite in epoch 1, step 4." in exit_.value.code


def test_perturbed_weights_are_not_given_away(trainer, tmp_path):
    class Exporting(Regression):
        def training_step(self, batch, batch_idx):
            if self.is_second_pass:
                self.trainer.save_checkpoint(tmp_path / "checkpoint.ckpt", weights_only=True)
                torch.save(self.state_dict(), tmp_path / "weights.pt")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="the weights are perturbed in the second pass: save or export them outside"):
        trainer().fit(Exporting(SAM_SGD), loader())
    assert not list(tmp_path.glob("*.*"))


def with_file_size_limit(bytes_, *words):
    """The command in a process of its own in which no file can grow beyond a limit, as on a full disk."""
    Path("limited.py").write_text(
        f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_}, {bytes_}))\n"
        "from sam_lightning.__main__ import main\nmain()\n"
    )
    return forking.run([sys.executable, "limited.py", *words], env=environment())


def test_a_full_disk_while_saving(capsys):
    fit()
    before = (RUN / "checkpoints/last.ckpt").read_bytes()
    done = with_file_size_limit(100_000, "fit", "--ckpt_path", str(RUN), "--trainer.max_epochs", "2")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"sam-lightning: error: .*(best|last)\.ckpt cannot be written \([\d,]+ bytes free\): ", last)
    assert "Traceback" not in done.stderr
    assert (RUN / "checkpoints/last.ckpt").read_bytes() == before
    assert {path.name for path in (RUN / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_a_full_disk_while_logging():
    done = with_file_size_limit(300, *WORDS)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("sam-lightning: error: cannot write: [Errno 27] File too large")
    )
    assert "Traceback" not in done.stderr


def test_a_run_directory_that_cannot_be_written(capsys):
    Path("file").write_text("kept")  # no folder can be made in here, whoever asks
    said = fails(capsys, *WORDS, "--trainer.default_root_dir", "file/run")
    assert "error: cannot write: [Errno 20] Not a directory" in said
    assert "name another by --trainer.default_root_dir" in said
    assert Path("file").read_text() == "kept"


@pytest.mark.parametrize("how", ["absolute", "moved"])
def test_a_run_under_another_name_keeps_its_best_epoch_and_its_files(how):
    fit("--trainer.callbacks.monitor", "train/loss_epoch", epochs=2)  # the first epoch's is the largest
    run = RUN.resolve() if how == "absolute" else RUN.rename("moved")
    resumed = main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "3"])
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert read_checkpoint(run / "checkpoints/best.ckpt")["epoch"] == 0
    assert read_checkpoint(run / "checkpoints/last.ckpt")["epoch"] == 2
    best = next(callback for callback in resumed.trainer.checkpoint_callbacks if callback.monitor)
    assert Path(best.best_model_path).resolve() == (run / "checkpoints/best.ckpt").resolve()


def test_a_checkpoint_gives_a_module_of_its_own_but_no_training_without_its_loops(capsys):
    trained = fit()
    path = RUN / "checkpoints/last.ckpt"
    module = ImageClassifier.load_from_checkpoint(path, network=digits_cnn(), optimizer=SAM_SGD)
    assert_same(state_of(module), state_of(trained.model))
    trained.trainer.save_checkpoint("weights.ckpt", weights_only=True)
    assert "the checkpoint holds weights only: it can be tested" in fails(capsys, *WORDS, "--ckpt_path", "weights.ckpt")


@pytest.mark.parametrize("damage", ["truncated", "empty", "hostile"])
def test_a_damaged_newest_checkpoint_gives_way_to_an_older_one(capsys, damage):
    fit()
    last = RUN / "checkpoints/last.ckpt"
    content = {"truncated": last.read_bytes()[:-500], "empty": b"", "hostile": pickle.dumps(Hostile())}[damage]
    last.write_bytes(content)
    resumed = main(["fit", "--ckpt_path", str(RUN), "--trainer.max_epochs", "2"])
    assert f"note: {last} is damaged or no checkpoint" in capsys.readouterr().err
    straight = fit("--trainer.default_root_dir", "straight", epochs=2)
    assert_same(state_of(resumed.model), state_of(straight.model))
    assert not Path("hostile").exists()
    for path in (RUN / "checkpoints").iterdir():
        path.write_bytes(content)
    assert "is damaged or no checkpoint" in fails(capsys, "fit", "--ckpt_path", str(RUN))


class Hostile:
    """A pickle that makes a file when it is loaded with trust."""

    def __reduce__(self):
        return (Path.touch, (Path("hostile"),))


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_hostile_checkpoint_is_refused(capsys, command):
    fit()
    torch.save({**read_checkpoint(RUN / "checkpoints/last.ckpt"), "more": Hostile()}, "hostile.ckpt")
    words = [command, *BASE, *SAM, *QUICK, "--ckpt_path", "hostile.ckpt"]
    assert "hostile.ckpt is damaged or no checkpoint" in fails(capsys, *words)
    assert not Path("hostile").exists()


class EndsAt(Callback):
    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            if self.error is None:
                trainer.should_stop = True
            else:
                raise self.error


@pytest.mark.parametrize("steps", [8, 10])
@pytest.mark.parametrize("limit", [["--trainer.max_epochs", "-1"], []], ids=["steps-only", "epochs-too"])
def test_resume_with_max_steps_is_exact(steps, limit):
    words = ["--trainer.max_steps", str(steps), *limit]
    straight = fit("--trainer.default_root_dir", "straight", *words, epochs=9)
    with pytest.raises(ZeroDivisionError):
        main([*WORDS, "--trainer.max_epochs", "9", *words], [EndsAt(6, ZeroDivisionError())])
    resumed = main(["fit", "--ckpt_path", str(RUN)])
    assert resumed.trainer.global_step == straight.trainer.global_step == steps
    assert_same(state_of(resumed.model), state_of(straight.model))
    again = main(["fit", "--ckpt_path", str(RUN)])  # nothing is left to do
    assert again.trainer.global_step == steps
    assert_same(state_of(again.model), state_of(straight.model))


def test_an_epoch_that_is_cut_leaves_the_state_to_go_on_from():
    """What `max_time` and an early stop between validations do."""
    straight = fit("--trainer.default_root_dir", "straight", epochs=3)
    cut = main([*WORDS, "--trainer.max_epochs", "3"], [EndsAt(6)])
    assert cut.trainer.global_step == 6
    assert read_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] == 4
    resumed = main(["fit", "--ckpt_path", str(RUN)])
    assert resumed.trainer.global_step == 12
    assert_same(state_of(resumed.model), state_of(straight.model))


def test_a_first_epoch_that_is_cut_is_kept():
    main([*WORDS, "--trainer.max_epochs", "3"], [EndsAt(2)])
    assert read_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] == 2


def test_a_longer_max_steps_goes_on_from_an_epochs_end_and_says_what_it_leaves_out_elsewhere():
    longer = ["--trainer.max_steps", "12", "--trainer.max_epochs", "-1"]
    straight = fit("--trainer.default_root_dir", "straight", *longer)
    fit("--trainer.max_steps", "8", "--trainer.max_epochs", "-1")
    resumed = main(["fit", "--ckpt_path", str(RUN), *longer])
    assert_same(state_of(resumed.model), state_of(straight.model))
    fit("--trainer.default_root_dir", "within", "--trainer.max_steps", "6", "--trainer.max_epochs", "-1")
    with pytest.warns(
        UserWarning, match="ended within epoch 2, after 2 of its batches: the rest of that epoch is left"
    ):
        resumed = main(["fit", "--ckpt_path", "within", *longer])
    assert resumed.trainer.global_step == 12


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_training_goes_on_from_a_checkpoint_between_the_last_batch_and_the_epochs_end():
    words = ["--trainer.callbacks.every_n_train_steps", "4", "--trainer.callbacks.monitor", "null"]
    words += ["--trainer.callbacks.save_on_train_epoch_end", "false"]
    fit(*words, epochs=2)
    resumed = main(["fit", "--ckpt_path", str(RUN / "checkpoints/best.ckpt"), "--trainer.max_epochs", "3"])
    straight = fit("--trainer.default_root_dir", "straight", *words, epochs=3)
    assert resumed.trainer.global_step == straight.trainer.global_step == 12
    assert_same(state_of(resumed.model), state_of(straight.model))


def test_a_sharded_checkpoint_is_found_and_one_without_its_last_part_is_not(tmp_path):
    folder = tmp_path / "run/checkpoints"
    for name in ("best.ckpt", "last.ckpt"):
        (folder / name).mkdir(parents=True)
    torch.save({"epoch": 3}, folder / "best.ckpt/meta.pt")
    assert find_checkpoint(tmp_path / "run", "last") == folder / "best.ckpt"
    assert find_checkpoint(tmp_path, str(folder / "best.ckpt")) == folder / "best.ckpt"
    assert read_checkpoint(folder / "best.ckpt") == {"epoch": 3}


def two_processes(root, *more):
    """A training in two processes that are started one by one; what `kill.txt` says is killed, see `killing`."""
    words = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "5"]
    words += ["--trainer.default_root_dir", root, "--trainer.callbacks+=killing.Killing"]
    command = [sys.executable, "-m", "sam_lightning", *WORDS, *words, *more]
    shared = {**environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), PLAN: "kill.txt"}
    shared["PYTHONPATH"] += f":{ROOT}/tests/helpers"
    return [
        forking.Popen(command, env={**shared, "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]


def ended(processes):
    """The codes and the errors of both, which end by themselves: gloo alone would wait for half an hour."""
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def test_a_sharded_run_replaces_its_newest_checkpoint_only_by_a_complete_one():
    strategy = ["--trainer.strategy", "ModelParallelStrategy", "--trainer.strategy.data_parallel_size", "1"]
    words = [*WORDS, *strategy, "--trainer.strategy.tensor_parallel_size", "1"]
    for epochs, more in ((2, []), (3, ["--ckpt_path", "last"])):
        command = [sys.executable, "-m", "sam_lightning", *words, "--trainer.max_epochs", str(epochs), *more]
        done = forking.run(command, env=environment(), timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        last = find_checkpoint(RUN, "last")
        assert last.name == f"last-epoch={epochs - 1}.ckpt"
        assert read_checkpoint(last)["epoch"] == epochs - 1


@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_dies_takes_the_other_down_in_bounded_time(victim):
    Path("kill.txt").write_text(f"rank{victim} 3")
    codes, errors = ended(two_processes("killed"))
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    assert "sam-lightning: error: another process of this training ended: " in errors[1 - victim]
    assert "Traceback" not in errors[1 - victim]

    assert read_checkpoint(Path("killed/checkpoints/last.ckpt"))["epoch"] == 2
    for root, more in (("killed", ["--ckpt_path", "last"]), ("straight", [])):
        codes, errors = ended(two_processes(root, *more))
        assert codes == [0, 0], errors
    resumed, straight = (read_checkpoint(Path(root, "checkpoints/last.ckpt")) for root in ("killed", "straight"))
    assert_same(resumed["state_dict"], straight["state_dict"])
    for a, b in zip(*(c["optimizer_states"][0]["state"].values() for c in (resumed, straight)), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
