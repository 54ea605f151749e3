"""The README's Python runs, and its commands name files that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sam_lightning.studies.command import main
from sam_lightning.studies.spec import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", PYTHON, ids=["plain-pytorch", "own-module"])
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    if "module" in names:
        assert names["module"].trainer.global_step == 16
    else:
        assert names["optimizer"].state  # it has stepped


def test_commands_name_files_that_exist():
    named = re.findall(r"configs/[\w/.-]+\.yaml", README)
    assert len(named) > 3
    for name in named:
        assert (ROOT / name).is_file(), name


def test_study_commands_name_studies_and_their_keys(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = re.findall(r"^sam-lightning study (.*?)(?:  +#.*)?$", README, re.MULTILINE)
    assert len(words) > 4
    for line in words:
        command, *rest = shlex.split(line)
        rest = [word for word in rest if word != "--dry-run"]
        if command == "run":
            assert main(["run", *rest, "--dry-run"]) == 0, line
            assert "sam-lightning fit -c configs/base.yaml" in capsys.readouterr().out
        else:
            load(rest[0])


def test_the_two_lines_stand_by_themselves():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv .venv")]
    assert len(lines) == 2
    assert "sam-lightning study run quickstart" in lines[0]
    assert "pytest" in lines[1]


def test_it_can_be_read_in_one_go():
    tables = re.findall(r"<!-- (\w+): by .*? -->.*?<!-- end of \1 -->", README, re.DOTALL)
    assert tables == ["results", "cost", "sharpness"]
    assert len(re.sub(r"<!-- (\w+): by .*? -->.*?<!-- end of \1 -->", "", README, flags=re.DOTALL).splitlines()) <= 220


def test_its_tables_are_those_of_the_stored_results():
    done = subprocess.run(
        [sys.executable, "notebooks/regenerate.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_strategy_table_names_tests_that_exist():
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert (ROOT / "tests" / name).is_file(), name
