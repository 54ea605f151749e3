"""The pages for people: their Python runs, their commands and links name what exists, their tables are the results'."""

import re
import runpy
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from sam_lightning.data import CIFAR10, Digits
from sam_lightning.runs import configs
from sam_lightning.studies.command import main
from sam_lightning.studies.spec import Arm, Study, load

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "configs/README.md", "notebooks/README.md", "tests/README.md", "tests/benchmarks/README.md"]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
README, CONFIGS = TEXTS["README.md"], TEXTS["configs/README.md"]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
GENERATED = r"<!-- ([\w-]+): by notebooks/regenerate.py -->(.*?)<!-- end of \1 -->"


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].global_step == 16
    else:
        assert names["optimizer"].state  # it has stepped


def test_there_are_examples_for_both_worlds():
    assert ["lightning.pytorch" in code for code in PYTHON].count(True) == 1
    assert len(PYTHON) == 2


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXTS[page]) if "://" not in link]
    assert links or page in {"configs/README.md", "tests/benchmarks/README.md"}
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link


def commands(program):
    """What follows the words `program` in the pages' blocks, without comments."""
    for page, text in TEXTS.items():
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[: len(program)] == program:
                    yield page, words[len(program) :]


def test_commands_name_files_that_exist():
    named = [
        words[at + 1]
        for program in ("fit", "test")
        for _, words in commands(["sam-lightning", program])
        for at, word in enumerate(words)
        if word in ("-c", "--model.optimizer") and words[at + 1] != "..."
    ]
    assert len(named) > 5
    for name in named:
        assert configs.packaged(name), name


def test_study_commands_name_studies_and_their_keys(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(commands(["sam-lightning", "study"]))
    assert len(found) > 5
    for page, (command, *rest) in found:
        rest = [word for word in rest if word != "--dry-run"]
        if command == "run":
            assert main(["run", *rest, "--dry-run"]) == 0, (page, rest)
            assert "sam-lightning fit -c configs/base.yaml" in capsys.readouterr().out
        else:
            load(rest[0])


def test_the_two_lines_stand_by_themselves():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv .venv")]
    assert len(lines) == 2
    assert "sam-lightning study run quickstart" in lines[0]
    assert "pytest" in lines[1]


def test_the_readme_can_be_read_in_one_go():
    assert len(README.splitlines()) < 150
    first_screen = README.splitlines()[:40]
    assert any(line.startswith("![") for line in first_screen)
    assert any("study run quickstart" in line for line in first_screen)
    ((name, section),) = re.findall(GENERATED, README, re.DOTALL)
    assert name == "quickstart"
    assert len(section.splitlines()) < 15


def test_tables_and_figures_are_those_of_the_stored_results(monkeypatch):
    sections = {page: [name for name, _ in re.findall(GENERATED, text, re.DOTALL)] for page, text in TEXTS.items()}
    assert {page: names for page, names in sections.items() if names} == {
        "README.md": ["quickstart"],
        "notebooks/README.md": ["results", "label-noise", "methods", "sharpness", "cifar-sharpness"],
        "tests/benchmarks/README.md": ["cost"],
    }
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    monkeypatch.setattr(sys, "argv", ["regenerate.py", "--check"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "notebooks/regenerate.py"), run_name="__main__")
    assert done.value.code == 0


def test_every_key_of_a_study_file_is_explained():
    explained = set(re.findall(r"^\| `(\w+)`", CONFIGS.partition("## Study files")[2], re.MULTILINE))
    keys = {field.name for field in fields(Study)} - {"path", "overrides"}
    assert explained == keys
    for field in fields(Arm):
        assert f"`{field.name}`" in CONFIGS


def test_the_study_file_that_is_shown_is_one(tmp_path):
    (shown,) = re.findall(r"```yaml\n(.*?)```", CONFIGS, re.DOTALL)
    folder = tmp_path / "studies"
    folder.mkdir()
    (folder / "shown.yaml").write_text(shown)
    cells = [cell.label for cell in load(str(folder / "shown.yaml")).cells()]
    assert cells == ["SGD, batch size 64", "SGD, batch size 128", "SAM, rho 0.05", "SAM, rho 0.1"]
    assert all((ROOT / "configs" / layer.removeprefix("../")).is_file() for layer in yaml.safe_load(shown)["layers"])


def test_every_option_of_the_data_is_explained():
    for name in {*Digits().hparams, *CIFAR10().hparams} - {"download", "random_crop", "horizontal_flip", "root"}:
        assert f"`{name}`" in CONFIGS, name
    assert "`--data.root`" in CONFIGS


def test_every_configuration_file_is_listed():
    listed = re.findall(r"^\| `([\w/*.]+\.yaml)`", CONFIGS, re.MULTILINE)
    files = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    for path in files:
        assert any(path.match(pattern) for pattern in listed), path
