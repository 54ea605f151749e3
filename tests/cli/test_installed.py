"""The wheel, installed without a checkout beside it: commands in an empty folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import forking
from commands import ROOT

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "sam_lightning", "configs")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment in which the installed package is found, and its folder."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "source").mkdir()
    for name in BUILT_FROM:  # a build leaves files beside its source
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    quiet = ["--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *quiet, "--no-build-isolation", "-w", folder, folder / "source"], check=True)
    wheel = next(folder.glob("*.whl"))
    subprocess.run([*pip, "install", *quiet, "--target", folder / "site", wheel], check=True)
    shutil.rmtree(folder / "source")
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}, folder / "site/sam_lightning"


@pytest.fixture
def run(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def command(words, code=0):
        words = [sys.executable, "-m", "sam_lightning", *words.split()]
        done = forking.run(words, env=installed[0], imported=False)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout if code == 0 else done.stderr

    return command


def test_the_wheel_holds_every_room_and_every_configuration(installed):
    def content(folder, ending):
        return {str(path.relative_to(folder)) for path in folder.rglob(f"*{ending}")}

    assert content(installed[1], ".py") == content(ROOT / "sam_lightning", ".py")
    assert content(installed[1] / "configs", ".yaml") == content(ROOT / "configs", ".yaml")
    assert (installed[1] / "py.typed").is_file()


def test_configurations_are_listed_with_what_they_say_of_themselves(run):
    lines = run("configs").splitlines()
    assert {line.split()[0] for line in lines} == {
        str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert all(len(line.split()) > 1 for line in lines), "a file without a first comment line"


def test_configurations_are_copied_to_be_edited_and_nothing_is_written_over(run):
    assert run("configs copy mine").endswith("files copied into mine\n")
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert (Path("mine") / path.relative_to(ROOT / "configs")).read_bytes() == path.read_bytes()
    Path("mine/base.yaml").write_text("edited")
    Path("mine/data/digits.yaml").unlink()
    said = run("configs copy mine", code=1)
    assert said.startswith("sam-lightning: error: mine has base.yaml and ")
    assert Path("mine/base.yaml").read_text() == "edited"
    assert not Path("mine/data/digits.yaml").exists()


def test_a_study_is_shown_as_commands_that_can_be_pasted(run):
    first, *_ = run("study run a --dry-run").splitlines()
    assert first.startswith(
        "OMP_NUM_THREADS=1 sam-lightning fit -c base.yaml -c paper/ab.yaml --model.optimizer optimizers/paper-sgd.yaml "
    )


def test_a_local_file_is_taken_before_a_packaged_one(run):
    run("configs copy configs")
    study = Path("configs/studies/a.yaml")
    study.write_text(study.read_text().replace("seeds: [20, 30, 40]", "seeds: [5]"))
    assert "-c configs/base.yaml" in run("study run a --dry-run")
    assert "--seed_everything 5" in run("study run a --dry-run")
    shutil.rmtree("configs")
    Path("base.yaml").write_text("trainer: {}\n")  # not what the packaged study means by its own
    shown = run("study run a --dry-run")
    assert "--seed_everything 20" in shown
    assert "-c base.yaml" not in shown
    assert "sam_lightning/configs/base.yaml" in shown
    Path("own.yaml").write_text(
        "question: Which?\nlayers: [base.yaml, data/digits.yaml]\narms: {SAM: optimizers/sam.yaml}\nseeds: [1]\n"
    )
    shown = run("study run own.yaml --dry-run")
    assert " -c base.yaml -c data/digits.yaml --model.optimizer optimizers/sam.yaml " in shown


QUICK = "--trainer.max_epochs 1 --trainer.limit_train_batches 3 --trainer.accelerator cpu"


def test_a_training_and_its_test(run):
    words = "fit -c base.yaml -c data/digits.yaml --model.optimizer optimizers/sam.yaml --seed_everything 4"
    assert "val accuracy" in run(f"{words} {QUICK}")
    config = yaml.safe_load(Path("runs/digits-sam-seed4/config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "sam_lightning.SAM"
    assert "test accuracy" in run("test --ckpt_path runs/digits-sam-seed4")


def test_a_study_as_it_is_typed(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = f"-m sam_lightning study run quickstart --jobs 1 --only seed=1 --only arm=SAM {QUICK}".split()
    assert "1 runs in runs, 1 to do" in subprocess.check_output([sys.executable, *words], env=installed[0], text=True)
    assert len(list(Path("runs").glob("sam-*/result.json"))) == 1
