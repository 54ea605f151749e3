"""The command line as its user meets it: commands in, files and messages out."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import OptimizerCallable

import forking
from commands import BASE, QUICK, ROOT, fails, fit
from regression import Regression, assert_same, loader, state_of
from sam_lightning.cli import main
from sam_lightning.runs.checkpoint_io import AtomicCheckpointIO
from sam_lightning.runs.checkpoints import read_checkpoint
from sam_lightning.sharpness import Settings, measure

pytestmark = pytest.mark.filterwarnings(
    # The run directory is the user's choice; what a former run left there is kept.
    "ignore:Checkpoint directory .* exists and is not empty",
    # A moved run: Lightning finds the best checkpoint again, and says that it forgets its score.
    "ignore:The dirpath has changed",
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_fit_then_test_name_what_came_out(capsys):
    trained = fit()
    out = capsys.readouterr().out
    assert "val accuracy" in out
    assert "run            runs/digits-sam-seed1\n" in out
    assert "checkpoints    runs/digits-sam-seed1/checkpoints: best.ckpt, last.ckpt\n" in out
    assert out.endswith("tensorboard --host 127.0.0.1 --logdir runs/digits-sam-seed1\n")
    files = {path.name.partition(".")[0] for path in Path("runs/digits-sam-seed1").iterdir()}
    assert files == {"config", "checkpoints", "events", "hparams"}

    tested = main(["test", *BASE, "--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml", *QUICK])
    assert_same(state_of(tested.model.network), state_of(trained.model.network))
    accuracy = tested.trainer.callback_metrics["test/accuracy"].item()
    out = capsys.readouterr().out
    assert f"test accuracy  {accuracy:.4f}\n" in out
    assert "checkpoint     runs/digits-sam-seed1/checkpoints/last.ckpt\n" in out


def test_checkpoints_are_written_atomically():
    assert isinstance(fit().trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def test_the_last_epoch_is_kept_even_if_no_epoch_was_better_than_the_first():
    the_first_is_best = ["--trainer.callbacks.monitor", "train/loss_epoch"]  # the largest, as of accuracies
    fit(*the_first_is_best, epochs=3)
    assert read_checkpoint(Path("runs/digits-sam-seed1/checkpoints/best.ckpt"))["epoch"] == 0
    assert read_checkpoint(Path("runs/digits-sam-seed1/checkpoints/last.ckpt"))["epoch"] == 2
    fit(*the_first_is_best, "--ckpt_path", "last", epochs=4)
    kept = {path.name for path in Path("runs/digits-sam-seed1/checkpoints").iterdir()}
    assert kept == {"best.ckpt", "last.ckpt"}
    assert read_checkpoint(Path("runs/digits-sam-seed1/checkpoints/last.ckpt"))["epoch"] == 3


def test_a_run_directory_is_enough(capsys):
    trained = fit("--trainer.default_root_dir", "elsewhere")
    tested = main(["test", "--ckpt_path", "elsewhere"])
    assert_same(state_of(tested.model.network), state_of(trained.model.network))
    Path("elsewhere").rename("moved")
    moved = main(["test", "--ckpt_path", "moved/checkpoints/best.ckpt"])
    assert moved.run == Path("moved")
    assert not Path("elsewhere").exists()


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def test_another_run_in_the_same_directory_is_refused_and_the_difference_named(capsys):
    fit()
    run = Path("runs/digits-sam-seed1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = ["fit", *BASE, "--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml", *QUICK]
    for more in ([], ["--overwrite"]):
        said = fails(capsys, *words, "--model.label_smoothing", "0.1", *more)
        assert "runs/digits-sam-seed1 holds a run with other settings:" in said
        assert "  model.label_smoothing: 0.0 there, 0.1 here\n" in said
        assert "--trainer.default_root_dir DIR" in said
        assert "seed_everything: 1 there, 2 here" in fails(
            capsys, "fit", "-c", str(run / "config.yaml"), "--seed_everything", "2", *more
        )
    said = fails(capsys, *words, "--trainer.max_epochs", "3")
    assert "holds this run already" in said
    assert "sam-lightning fit --ckpt_path runs/digits-sam-seed1\n" in said
    assert "--overwrite" in said
    assert len(said.splitlines()) <= 6  # with the note of the seed
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    fit("--trainer.default_root_dir", "elsewhere", "--model.label_smoothing", "0.1")
    fit("--trainer.fast_dev_run", "1", epochs=9)  # writes nothing
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_equal_run_is_replaced_on_demand_and_other_files_stay():
    run = Path("runs/digits-sam-seed1")
    fit(epochs=2)
    first = names(run)
    Path(run, "notes.txt").write_text("mine")
    Path(run, "sharpness.json").write_text("{}")  # of the old weights
    again = fit("--overwrite", epochs=1)
    assert read_checkpoint(run / "checkpoints/last.ckpt")["epoch"] == 0
    assert names(run / "checkpoints") == {"best.ckpt", "last.ckpt"}
    kept = names(run) - {"notes.txt"}
    assert len(kept) == len(first)
    assert {name for name in kept if "events" not in name} == {name for name in first if "events" not in name}
    assert "overwrite" not in (run / "config.yaml").read_text()
    main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "2"])
    assert again.run == run


class Fails(Callback):
    """Ends a training at one of its hooks; sees what is there then."""

    def __init__(self, hook):
        def fail(*_):
            raise ZeroDivisionError(hook)

        setattr(self, hook, fail)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_sanity_check_start"])
def test_what_a_run_saved_stays_where_it_is_if_the_one_that_replaces_it_does_not_start(hook):
    fit()
    run = Path("runs/digits-sam-seed1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = ["fit", *BASE, "--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml", *QUICK, "--overwrite"]
    with pytest.raises(ZeroDivisionError):
        main([*words, "--trainer.num_sanity_val_steps", "1"], [Fails(hook)])
    assert before.items() <= {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}.items()


def test_what_a_run_saved_is_set_aside_until_the_one_that_replaces_it_has_saved_something():
    fit()
    run = Path("runs/digits-sam-seed1")
    saved = (run / "checkpoints/last.ckpt").read_bytes()
    words = ["fit", *BASE, "--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml", *QUICK]
    for more, expected in ((["--overwrite"], {"replaced-1"}), ([], {"replaced-1", "replaced-2"})):
        with pytest.raises(ZeroDivisionError):
            main([*words, *more], [Fails("on_train_batch_start")])
        assert (run / "replaced-1/checkpoints/last.ckpt").read_bytes() == saved
        assert {name for name in names(run) if name.startswith("replaced")} == expected
        assert not (run / "checkpoints").exists()
    fit()  # nothing is there that would have to be named
    assert not any(name.startswith("replaced") for name in names(run))
    assert names(run / "checkpoints") == {"best.ckpt", "last.ckpt"}


def test_checkpoints_that_are_nobodys_are_not_trained_into(capsys):
    Path("mine/checkpoints").mkdir(parents=True)
    Path("mine/checkpoints/a.ckpt").write_bytes(b"kept")
    words = ["fit", *BASE, "--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml", *QUICK]
    said = fails(capsys, *words, "--trainer.default_root_dir", "mine", "--overwrite")
    assert "mine holds checkpoints and no config.yaml" in said
    assert names("mine/checkpoints") == {"a.ckpt"}


def test_what_was_typed_is_what_runs(capsys):
    fit()
    path = "runs/digits-sam-seed1/checkpoints/last.ckpt"
    tested = main(["test", "--ckpt_path", path, "--model.label_smoothing", "0.3", "--data.batch_size", "100"])
    assert tested.model.label_smoothing == 0.3
    assert tested.datamodule.batch_size == 100
    assert "model.label_smoothing: 0.0 in the checkpoint, 0.3 here" in capsys.readouterr().err


def test_resuming_with_other_settings_is_refused(capsys):
    fit()
    run = "runs/digits-sam-seed1"
    words = ["--model.optimizer.init_args.rho", "0.2", "--data.batch_size", "32", "--seed_everything", "7"]
    said = fails(capsys, "fit", "--ckpt_path", run, *words, "--trainer.precision", "bf16-mixed")
    assert "seed_everything: 1 in the checkpoint, 7 here" in said
    assert "trainer.precision: 32-true in the checkpoint, bf16-mixed here" in said
    assert "model.optimizer.init_args.rho: 0.05 in the checkpoint, 0.2 here" in said
    assert "data.batch_size: 64 in the checkpoint, 32 here" in said
    assert f"fit --ckpt_path {run}" in said
    said = fails(capsys, "fit", "--ckpt_path", run, "--trainer.limit_train_batches", "3")
    assert re.search(r"trainer.limit_train_batches: 4(.0)? in the checkpoint, 3(.0)? here", said)
    main(["fit", "--ckpt_path", run, "--trainer.max_epochs", "2", "--data.num_workers", "0"])  # these may differ


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_checkpoint_that_is_not_there_is_an_error(capsys, which):
    said = fails(capsys, "test", *BASE, "--model.optimizer", "SGD", "--model.optimizer.lr", "0.1", "--ckpt_path", which)
    assert f"--ckpt_path {which}: no checkpoint in {Path.cwd()}/runs/digits-sgd-seed1/checkpoints" in said
    assert "Run `fit` first" in said


def test_damaged_and_foreign_checkpoints_are_refused(capsys):
    Path("damaged.ckpt").write_bytes(b"not a checkpoint")
    said = fails(capsys, "fit", *BASE, "--model.optimizer", "SGD", *QUICK, "--ckpt_path", "damaged.ckpt")
    assert "damaged.ckpt is damaged or no checkpoint" in said
    assert "absent.ckpt: no such file" in fails(capsys, "test", "--ckpt_path", "absent.ckpt")
    assert "no config.yaml in" in fails(capsys, "test", "--ckpt_path", "damaged.ckpt")
    fit()
    said = fails(capsys, "test", "--ckpt_path", "runs/digits-sam-seed1", "--model.network.init_args.width", "16")
    assert "the checkpoint is of another network" in said
    assert "size mismatch" in said
    assert "Traceback" not in said
    assert "no such file" in fails(capsys, "test", *BASE, "--model.optimizer", "SGD", "--ckpt_path", "absent.ckpt")


def test_best_is_the_monitored_checkpoint():
    scheduler = ["--model.lr_scheduler", "torch.optim.lr_scheduler.MultiStepLR"]
    spoilt = ["--model.lr_scheduler.milestones", "[1]", "--model.lr_scheduler.gamma", "1e4"]  # after the first epoch
    fit(*scheduler, *spoilt, epochs=3)
    tested = main(["test", "--ckpt_path", "runs/digits-sam-seed1", "--trainer.limit_test_batches", "1"])
    assert tested.config.test.ckpt_path.endswith("last.ckpt")
    words = ["test", *BASE, "--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml", "--ckpt_path", "best"]
    best = main([*words, *QUICK])
    assert best.config.test.ckpt_path == "runs/digits-sam-seed1/checkpoints/best.ckpt"
    assert read_checkpoint(Path(best.config.test.ckpt_path))["epoch"] == 0
    assert_same(state_of(best.model), read_checkpoint(Path(best.config.test.ckpt_path))["state_dict"])


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "asam"])
def test_resume_equals_an_undisturbed_run(optimizer):
    straight = fit("--trainer.default_root_dir", "straight", optimizer=optimizer, epochs=3)
    fit("--trainer.default_root_dir", "resumed", optimizer=optimizer, epochs=1)
    resumed = main(["fit", "--ckpt_path", "resumed", "--trainer.max_epochs", "3"])
    assert_same(state_of(resumed.model), state_of(straight.model))
    assert resumed.trainer.global_step == straight.trainer.global_step == 12
    for key in ("train/loss_epoch", "val/accuracy", "val/loss"):
        assert resumed.trainer.callback_metrics[key] == straight.trainer.callback_metrics[key]


def test_checkpoints_hold_primitives_only():
    fit()
    path = Path("runs/digits-sam-seed1/checkpoints/last.ckpt")
    content = torch.load(path, weights_only=True)
    hparams = content["hyper_parameters"]
    assert hparams["optimizer"]["class_path"] == "sam_lightning.SAM"
    assert hparams["optimizer"]["init_args"]["base"]["init_args"]["momentum"] == 0.9
    assert content["datamodule_hyper_parameters"]["batch_size"] == 64


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.optimizer.init_args.rhoo", "0.1"], "rhoo"),
        (["--model.labelsmoothing", "0.1"], "labelsmoothing"),
        (["--data.batchsize", "3"], "batchsize"),
        (["--trainer.max_epoch", "3"], "max_epoch"),
        (["--model.optimizer.init_args.rho", "-1"], "rho must be a finite number >= 0, got -1"),
        (["--model.optimizer.init_args.base.init_args.lr", "-1"], "Invalid learning rate: -1"),
        (["--model.micro_batches", "0"], "micro_batches must be an integer >= 1, got 0"),
        (["--model.batch_norm_stats", "none"], "batch_norm_stats"),
        (["--data.batch_size", "0"], "batch_size"),
        (["--data.validation", "some"], "validation"),
        (["--model.network.init_args.width", "wide"], "width"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_named(capsys, words, expected):
    said = fails(capsys, "fit", *BASE, "--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml", *QUICK, *words)
    assert expected in said
    assert len(said.replace("Seed set to 1\n", "").splitlines()) <= 5
    assert not Path("runs").exists()


class OwnModule(Regression):
    """A user's module: its options come from the command line too."""

    def __init__(self, optimizer: OptimizerCallable, width: int = 3):
        super().__init__(optimizer)
        self.width = width


class OwnData(LightningDataModule):
    def train_dataloader(self):
        return loader()


def test_a_users_own_module_and_data(capsys):
    own = main(
        [
            "fit",
            "--model",
            f"{__name__}.OwnModule",
            "--model.width",
            "5",
            "--data",
            f"{__name__}.OwnData",
            *QUICK[:6],
            "--model.optimizer",
            f"{ROOT}/configs/optimizers/sam.yaml",
            "--trainer.max_epochs",
            "1",
        ]
    )
    assert own.model.width == 5
    assert own.run == Path("runs/owndata-sam-seed1")
    assert own.trainer.global_step == 8
    assert {path.name for path in (own.run / "checkpoints").iterdir()} == {"epoch=0-step=8.ckpt", "last.ckpt"}
    again = main(["fit", "--ckpt_path", str(own.run), "--trainer.max_epochs", "2"])
    assert again.trainer.global_step == 16


def test_a_module_in_the_current_folder_is_found_and_interruptions_say_how_to_go_on():
    Path("mine.py").write_text(
        "import os, signal\n"
        "from sam_lightning.models import ImageClassifier\n"
        "class Interrupted(ImageClassifier):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        if self.trainer.current_epoch == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "        return super().training_step(batch, batch_idx)\n"
    )
    script = Path(sys.executable).with_name("sam-lightning")
    words = [
        script,
        "fit",
        *BASE,
        "--model",
        "mine.Interrupted",
        "--model.network",
        "sam_lightning.models.digits_cnn",
    ]
    words += ["--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml", *QUICK]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1] == "interrupted: go on with: sam-lightning fit --ckpt_path runs/digits-sam-seed1"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["configs", "--help", "study run a --dry-run"])
def test_output_that_nobody_reads_to_the_end_is_no_traceback(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sam_lightning", *words.split()]
    with forking.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 1


def test_predictions_are_saved():
    fit()
    main(["predict", "--ckpt_path", "runs/digits-sam-seed1"])
    batches = torch.load("runs/digits-sam-seed1/predictions.pt", weights_only=True)
    assert torch.cat(batches).shape == (360, 10)
    torch.testing.assert_close(torch.cat(batches).sum(1), torch.ones(360))


def test_a_fresh_process_exits_with_a_code():
    done = forking.run([sys.executable, "-m", "sam_lightning", "test", *BASE, "--model.optimizer", "SGD"])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("sam-lightning: error: --ckpt_path last: no checkpoint in")
    assert "Traceback" not in done.stderr


def test_sharpness_of_a_finished_run(capsys):
    trained = fit("--trainer.default_root_dir", "elsewhere")
    before = state_of(trained.model)
    words = ["--samples", "100", "--settings.draws", "2", "--settings.steps", "2", "--settings.rho", "0.1"]
    main(["sharpness", "--ckpt_path", "elsewhere", *words])
    out = capsys.readouterr().out
    found = json.loads(Path("elsewhere/sharpness.json").read_text())
    settings = Settings(draws=2, steps=2, rho=0.1)
    assert found["settings"] == asdict(settings)
    assert found["samples"] == 100
    batches = trained.datamodule.training_sample(100, seed=0)
    expected = measure(trained.model, lambda batch: trained.model.training_step(batch, 0), batches, settings).rows()
    assert set(found["measures"]) == set(expected)
    for name, (value, error) in expected.items():
        row = found["measures"][name]
        assert row["value"] == pytest.approx(value, rel=1e-6), name
        assert row["standard_error"] == (None if error is None else pytest.approx(error, rel=1e-6)), name
        assert re.search(rf"^{name.replace('_', ' ')} +{row['value']:.4g}", out, re.MULTILINE), name
    assert "elsewhere/checkpoints/last.ckpt" in out
    assert out.endswith("elsewhere/sharpness.json\n")
    assert_same(state_of(trained.model), before)


def test_what_cannot_be_measured_is_told(capsys):
    assert "--samples must be an integer >= 1, got 0" in (
        fit() and fails(capsys, "sharpness", "--ckpt_path", "runs/digits-sam-seed1", "--samples", "0")
    )
    said = fails(capsys, "sharpness", "--ckpt_path", "runs/digits-sam-seed1", "--settings.batch_norm", "eval")
    assert "batch_norm" in said
    assert not Path("runs/digits-sam-seed1/sharpness.json").exists()
