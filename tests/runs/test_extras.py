"""Without the extras: the core trains, and whatever needs more says how to install it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from commands import fails, fit
from fake_cifar10 import fake_cifar10  # noqa: F401  # a fixture
from sam_lightning.data import CIFAR10, Digits
from sam_lightning.runs.extras import MissingExtraError, require
from sam_lightning.studies import command

ROOT = Path(__file__).parents[2]
EXTRAS = {"scipy", "matplotlib", "sklearn", "pandas", "tabulate", "submitit"}


def without(monkeypatch, *packages):
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


def test_what_is_missing_and_how_to_install_it(monkeypatch):
    require("studies", "A table", "pandas", "tabulate")
    without(monkeypatch, "tabulate")
    with pytest.raises(MissingExtraError) as error:
        require("studies", "A table", "pandas", "tabulate")
    assert str(error.value) == "A table needs tabulate, not installed here. Run: pip install 'sam-lightning[studies]'"


def test_data_say_what_they_need(monkeypatch, fake_cifar10):  # noqa: F811
    without(monkeypatch, "sklearn")
    with pytest.raises(MissingExtraError, match=r"The digits data needs sklearn.*'sam-lightning\[studies\]'"):
        Digits().setup("fit")
    with pytest.raises(MissingExtraError, match=r"validation: split\) needs sklearn.*'sam-lightning\[studies\]'"):
        CIFAR10(root=fake_cifar10, validation="split").setup("fit")
    CIFAR10(root=fake_cifar10, validation="none").setup("fit")


def test_a_command_says_it(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    fit("--trainer.default_root_dir", "run")
    without(monkeypatch, "matplotlib")
    message = (
        "sam-lightning landscape needs matplotlib, not installed here. Run: pip install 'sam-lightning[sharpness]'"
    )
    assert message in fails(capsys, "landscape", "--ckpt_path", "run")


def test_a_study_says_it_before_its_first_run(monkeypatch):
    without(monkeypatch, "pandas")
    with pytest.raises(SystemExit, match=r"sam-lightning study needs pandas.*'sam-lightning\[studies\]'"):
        command.main(["run", "quickstart"])


def test_the_core_trains_without_any_of_them(tmp_path):
    code = f"""
import sys
from lightning.pytorch import Trainer  # first: it asks the package index which of them it may use
sys.modules |= dict.fromkeys({EXTRAS})  # as if none of them were installed
from regression import Regression, loader
from sam_lightning.callbacks import EpochHistory, HyperparameterPage
from sam_lightning.cli import main
Trainer(accelerator="cpu", max_steps=1, callbacks=[EpochHistory(), HyperparameterPage()]).fit(Regression(), loader())
for module in ("data", "models", "sharpness", "studies.command", "studies.launch"):
    __import__(f"sam_lightning.{{module}}")
main(["fit", "--help"])
"""
    path = f"{ROOT}:{ROOT}/tests/helpers"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PATH": "", "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--trainer.max_epochs" in done.stdout


def test_the_extras_are_the_packages_that_the_core_does_without():
    """So that the test above leaves none out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"scikit-learn": "sklearn"}
    extras = [line.partition(">")[0] for name in ("sharpness", "studies", "slurm") for line in extra(project, name)]
    assert {names.get(name, name) for name in extras} == EXTRAS


def extra(project, name):
    return project["optional-dependencies"][name]
