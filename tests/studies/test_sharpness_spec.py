"""The key `sharpness`: each run measured at its end, during training, and again where that is missing."""

import json
from dataclasses import asdict

import pytest

from sam_lightning.runs.directory import RESULT
from sam_lightning.sharpness import Settings
from sam_lightning.studies import execute as executing
from sam_lightning.studies.execute import execute
from sam_lightning.studies.figures import draw
from sam_lightning.studies.results import collect, read, write
from sam_lightning.studies.runs import runs_of
from sam_lightning.studies.sharpness_spec import SHARPNESS, SharpnessSpec
from sam_lightning.studies.spec import StudyError, load
from study_files import ROOT, finished, written

SHORT = {"trainer.max_epochs": "2", "trainer.accelerator": "cpu", "trainer.limit_train_batches": "3"}
CHEAP = {"samples": 64, "settings": {"steps": 2, "draws": 2}}
ARMS = {"SAM": f"{ROOT}/configs/optimizers/sam-every-5.yaml"}


class Stopped(Exception):
    """As if the machine had gone down."""


def study(folder, **sharpness):
    return load(str(written(folder, arms=ARMS, seeds=[1], sharpness={**CHEAP, **sharpness})), SHORT)


def run_of(study):
    (run,) = runs_of(study)
    return run


def test_a_run_is_measured_before_its_result_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    asked = study(tmp_path)
    run, called = run_of(asked), []
    main, folder = executing.main, tmp_path / run.name

    def stopped(words, *more):
        called.append(words[0])
        if called == ["fit", "sharpness"]:
            raise Stopped
        return main(words, *more)

    monkeypatch.setattr(executing, "main", stopped)
    with pytest.raises(Stopped):
        execute(run.words, folder, sharpness=run.sharpness)
    assert not (folder / RESULT).exists()
    assert not run.is_finished(tmp_path)
    execute(run.words, folder, sharpness=run.sharpness)
    assert run.is_finished(tmp_path)
    content = json.loads((folder / SHARPNESS).read_text())
    assert content["samples"] == content["samples_asked"] == 64
    assert content["settings"] == {**asdict(Settings()), **CHEAP["settings"]}
    assert len(json.loads((folder / RESULT).read_text())["epochs"]) == 2

    before = (folder / RESULT).read_bytes()  # a finished run is measured only, and only if it was not
    (folder / SHARPNESS).unlink()
    called.clear()
    for _ in range(2):
        execute(run.words, folder, sharpness=run.sharpness)
    assert called == ["sharpness"]
    assert (folder / RESULT).read_bytes() == before
    assert len(collect(asked, tmp_path).sharpness) == 10


def test_what_is_measured_during_training_is_the_same_and_of_a_run_of_its_own(tmp_path):
    asked = study(tmp_path, every=1)
    run = run_of(asked)
    assert run.name != run_of(study(tmp_path)).name
    execute(run.words, tmp_path / run.name, sharpness=run.sharpness)
    results = collect(asked, tmp_path)
    during = results.sharpness_epochs
    assert sorted(set(during.epoch)) == [1, 2]
    last = during[during.epoch == 2].set_index("measure").value
    assert last.to_dict() == pytest.approx(results.sharpness.set_index("measure").value.to_dict(), rel=1e-4)
    assert results.epochs.gradients_per_step.tolist() == pytest.approx([4 / 3, 4 / 3])  # steps 0 and 5 of 0..5
    write(results, tmp_path / "report")
    figure = draw(asked, read(tmp_path / "report"))["sharpness-epochs"]
    curve = figure.axes[0].lines[0]
    eigenvalues = during[during.measure == "largest_eigenvalue"].value.tolist()
    assert curve.get_ydata().tolist() == pytest.approx(eigenvalues)


def test_a_run_that_was_measured_otherwise_is_not_finished_and_not_shown(tmp_path):
    asked = study(tmp_path)
    run = run_of(asked)
    finished(run, tmp_path)
    content = {
        "checkpoint": "checkpoints/last.ckpt",
        "samples": 64,
        "samples_asked": 64,
        "settings": asdict(run.sharpness.settings),
        "measures": {"trace": {"value": 3.0, "standard_error": 0.5}},
    }
    other = {"checkpoint": "best.ckpt", "samples_asked": 65, "settings": asdict(Settings())}
    for name, value in [(None, None), *other.items()]:
        (tmp_path / run.name / SHARPNESS).write_text(json.dumps({**content, **({name: value} if name else {})}))
        assert run.is_finished(tmp_path) == (name is None)
        assert len(collect(asked, tmp_path).sharpness) == (name is None)


@pytest.mark.parametrize(
    ("sharpness", "message"),
    [
        ({"samples": 0}, "samples"),
        ({"every": -1}, "every"),
        ({"sample": 5}, "sample"),
        ({"settings": {"rho": 0.0}}, r"small.yaml: sharpness: settings: must be > 0, got rho 0.0"),
        ({"settings": {"draw": 3}}, "draw"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_trains(tmp_path, sharpness, message):
    with pytest.raises(StudyError, match=message):
        study(tmp_path, **{**CHEAP, **sharpness})


def test_a_study_without_the_key_measures_nothing(tmp_path):
    run = run_of(load(str(written(tmp_path, arms=ARMS, seeds=[1]))))
    assert run.sharpness is None
    assert run.words == run_of(load(str(written(tmp_path, arms=ARMS, seeds=[1], sharpness=CHEAP)))).words
    assert run_of(load(str(written(tmp_path, arms=ARMS, seeds=[1], sharpness={})))).sharpness == SharpnessSpec()
