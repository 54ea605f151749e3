"""Study files and the runs that they name."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sam_lightning.studies.command import main
from sam_lightning.studies.runs import directory_of, runs_of, select
from sam_lightning.studies.spec import Cell, StudyError, load
from study_files import FOLDER, ROOT, SMALL, written


@pytest.mark.parametrize(
    ("name", "count", "seeds"),
    [
        ("a", 6, {20, 30, 40}),
        ("b", 18, {20, 30, 40}),
        ("c", 8, {1, 2, 3}),
        ("quickstart", 9, {1, 2, 3}),
        ("rho", 33, {101, 102, 103}),
        ("corrected", 15, {1, 2, 3}),
    ],
)
def test_the_studies_name_their_runs(name, count, seeds):
    study = load(str(FOLDER / f"{name}.yaml"))
    runs = runs_of(study)
    assert len(runs) == len({run.name for run in runs}) == count
    assert {run.seed for run in runs} == seeds
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    with_norm = [run for run in runs if "BatchNorm" in run.cell.arm]
    assert len(with_norm) == (2 if name == "c" else 0)


def test_a_is_a_part_of_b():
    a, b = ({run.name: run.words for run in runs_of(load(str(FOLDER / f"{name}.yaml")))} for name in "ab")
    assert a.items() <= b.items()


def test_a_name_finds_the_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load("quickstart") == load("configs/studies/quickstart.yaml")
    with pytest.raises(StudyError, match=r"no study quickstrat: .*; did you mean quickstart\?"):
        load("quickstrat")


def test_a_run_is_told_by_its_content(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for path in SMALL["layers"]:
            (tmp_path / folder / Path(path).name).write_text(Path(path).read_text())
    layers = ["base.yaml", "digits.yaml"]
    one, two = (written(tmp_path / folder, layers=layers) for folder in ("one", "two"))
    names = [run.name for run in runs_of(load(str(one)))]
    assert [run.name for run in runs_of(load(str(two)))] == names
    assert [run.name for run in runs_of(load(str(written(tmp_path))))] == names  # the same content elsewhere
    changed = tmp_path / "two/base.yaml"
    changed.write_text(changed.read_text().replace("max_epochs: 20", "max_epochs: 21"))
    assert not set(names) & {run.name for run in runs_of(load(str(two)))}


def test_settings_make_another_study(tmp_path):
    path = written(tmp_path)
    plain, changed, moved = (
        load(str(path), overrides)
        for overrides in ({}, {"trainer.max_epochs": "3", "model.optimizer.rho": "[1, 2]"}, {"data.root": "/data"})
    )
    assert directory_of(plain, Path("r")) == Path("r/small")
    assert re.fullmatch(r"r/small,[0-9a-f]{8}", str(directory_of(changed, Path("r"))))  # no file name by itself
    shorter = load(str(path), {"trainer.max_epochs": "3"})
    assert directory_of(shorter, Path("r")) == Path("r/small,trainer.max_epochs=3")
    assert not {run.name for run in runs_of(plain)} & {run.name for run in runs_of(shorter)}
    assert [run.name for run in runs_of(plain)] == [
        run.name for run in runs_of(moved)
    ]  # where data lie changes nothing
    assert directory_of(moved, Path("r")) == Path("r/small")
    assert runs_of(moved)[0].words[-4:] == ("--data.root", "/data", "--seed_everything", "1")


def test_parts_of_a_study():
    runs = runs_of(load(str(FOLDER / "b.yaml")))
    part = select(runs, ["data.batch_size=16,64", "seed=20", "arm=SAM"])
    assert [(run.cell.label, run.seed) for run in part] == [("SAM, batch size 16", 20), ("SAM, batch size 64", 20)]
    with pytest.raises(StudyError, match=r"--only seed=20,21: allowed are the values 20, 30, 40"):
        select(runs, ["seed=20,21"])
    with pytest.raises(
        StudyError, match=r"--only sed=20: allowed are KEY=VALUE.* with the keys arm, data.batch_size, seed"
    ):
        select(runs, ["sed=20"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": [1]}, "'sed' is not accepted"),
        ({"question": None}, "question"),
        ({"seeds": [1, 2, 1]}, r"seeds of SGD: must be different integers >= 0, at least one, got \[1, 2, 1\]"),
        ({"seeds": [-1]}, r"seeds of SGD: .* got \[-1\]"),
        ({"seeds": []}, "seeds of SGD"),
        ({"seeds": ["x"]}, "seeds"),
        ({"layers": []}, "layers: must name at least one"),
        ({"layers": ["none.yaml"]}, r"layers\[0\]: no such file: .*none.yaml"),
        ({"arms": {}}, "arms: must name at least one"),
        ({"arms": {"SAM": "none.yaml"}}, "arms.SAM.optimizer: no such file: .*none.yaml"),
        ({"arms": {"SAM": {"optimiser": "x"}}}, "(?s)arms.*optimiser"),
        ({"arms": {"one": SMALL["arms"]["SAM"], "two": SMALL["arms"]["SAM"]}}, "arms: one and two are the same runs"),
        ({"baseline": "sgd"}, r"baseline: must be an arm \(SGD, SAM\), got sgd"),
        ({"grid": {"data.batch_size": []}}, "grid of SGD: data.batch_size: must be different values, at least one"),
        ({"grid": {"data.batch_size": [8, 8]}}, "must be different values"),
        ({"grid": {"data.batch_size": [[8]]}}, "must be single values"),
        (
            {
                "grid": {"data.batch_size": [8]},
                "arms": {"SAM": {"optimizer": SMALL["arms"]["SAM"], "set": {"data.batch_size": 4}}},
            },
            "arms.SAM.set.data.batch_size: is varied by the grid",
        ),
        ({"figures": {"one": "pie"}}, "figures"),
        ({"reference": [{"arm": "SGD", "best": 1.0}]}, r"reference\[0\]: must have epochs, an arm"),
        ({"reference": [{"arm": "sgd", "epochs": 1}]}, r"reference\[0\]"),
        ({"reference": [{"arm": "SGD", "epochs": 1, "bets": 2}]}, r"reference\[0\]"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_file_and_key(tmp_path, changes, message):
    path = written(tmp_path, **changes)
    with pytest.raises(StudyError, match=message) as error:
        runs_of(load(str(path)))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must be a mapping, got list"),
        ("a: [1\n", "while parsing"),
        ("seeds: [1]\nseeds: [2]\n", "key 'seeds' is given twice"),
        ("arms: {SAM: a.yaml, SAM: b.yaml}\n", "key 'SAM' is given twice"),
    ],
)
def test_yaml_that_hides_something_is_refused(tmp_path, text, message):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(StudyError, match=message) as error:
        load(str(path))
    assert str(path) in str(error.value)


def test_an_arms_own_grid_and_seeds(tmp_path):
    arms = {
        **SMALL["arms"],
        "wide": {"optimizer": SMALL["arms"]["SAM"], "grid": {"model.optimizer.rho": [0.1]}, "seeds": [5]},
    }
    study = load(str(written(tmp_path, arms=arms, grid={"data.batch_size": [8, 16]})))
    assert [cell.label for cell in study.cells()] == [
        *(f"{arm}, batch size {size}" for arm in ("SGD", "SAM") for size in (8, 16)),
        "wide, rho 0.1",
    ]
    assert [(run.cell, run.seed) for run in runs_of(study)][-1] == (Cell("wide", (("model.optimizer.rho", 0.1),)), 5)


def command(capsys, *words):
    """What `sam-lightning study` prints for these words, and its exit code."""
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return captured.out + captured.err + (code if isinstance(code, str) else ""), code


@pytest.mark.parametrize("is_measured", [False, True])
def test_a_dry_run_prints_commands_and_writes_nothing(tmp_path, capsys, monkeypatch, is_measured):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, **({"sharpness": {"samples": 64}} if is_measured else {}))
    out, code = command(
        capsys, "run", str(path), "--dry-run", "--trainer.max_epochs=2", "--only", "seed=2", "--root", "r s"
    )
    assert code == 0
    study = load(str(path), {"trainer.max_epochs": "2"})
    runs = select(runs_of(study), ["seed=2"])
    assert [shlex.split(line)[2:] for line in out.splitlines()] == [
        words for run in runs for words in run.commands(Path("r s"))
    ]
    starts = ["fit -c ", *(["sharpness --ckpt_path 'r s/"] if is_measured else [])] * len(runs)
    for line, start in zip(out.splitlines(), starts, strict=True):
        assert line.startswith(f"OMP_NUM_THREADS=1 sam-lightning {start}")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "PATH", "--jbos", "2"], "--jbos"),
        (["run", "PATH", "--jobs", "0"], "must be an integer >= 1, got 0"),
        (["run", "PATH", "--trainer.max_epochs"], "--trainer.max_epochs needs a value"),
        (["run", "PATH", "--trainer.max_epochs", "--dry-run"], "--trainer.max_epochs needs a value"),
        (["run", "PATH", "--launcher", "cloud"], "cloud"),
        (["run", "missing"], "no study missing"),
        (["report", "PATH", "--root", "empty"], "none of its 4 runs in empty is finished: study run"),
        (
            ["report", "PATH", "--root", "empty", "--trainer.max_epochs", "2"],
            "small.yaml --trainer.max_epochs 2 (settings",
        ),
        (["report", "PATH", "--results", "empty"], "no results in empty"),
        ([], "study needs a command"),
    ],
)
def test_commands_that_cannot_be_meant(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path)
    out, code = command(capsys, *(str(path) if word == "PATH" else word for word in words))
    assert code not in (0, None)
    assert message in out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "key", ["data.batch_size", "data.init_args.batch_size", "model.optimizer", "model.optimizer.class_path"]
)
def test_settings_that_the_study_varies_are_refused(tmp_path, capsys, key):
    path = written(tmp_path, grid={"data.batch_size": [8, 16]})
    out, code = command(capsys, "run", str(path), f"--{key}", "8", "--dry-run")
    assert code != 0
    assert f"--{key} 8: {path} sets it itself, in SGD. To run a part of the study use --only" in out


def test_the_console_script_knows_studies():
    words = [sys.executable, "-m", "sam_lightning", "study", "run", "none"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("sam-lightning: error: no study none")
