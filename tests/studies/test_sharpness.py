"""Sharpness in a study's report, against rank correlations worked out by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from sam_lightning.runs.directory import RESULT
from sam_lightning.studies.command import main
from sam_lightning.studies.figures import draw
from sam_lightning.studies.results import collect, read, write
from sam_lightning.studies.runs import runs_of
from sam_lightning.studies.sharpness_statistics import correlations, summary
from sam_lightning.studies.spec import StudyError, load
from sam_lightning.studies.tables import tables
from study_files import ROOT, finished, written

# By run: (seed, cell), accuracy, trace. Ranks of the accuracy 1 2 3 4, of the trace 4 2 3 1.
RUNS = {(1, "SGD"): (0.90, 40.0), (1, "SAM"): (0.92, 20.0), (2, "SGD"): (0.94, 30.0), (2, "SAM"): (0.96, 10.0)}


@pytest.fixture
def study(tmp_path):
    return load(str(written(tmp_path)))


@pytest.fixture
def results(study, tmp_path):
    """A study whose four runs are finished and measured."""
    for run in runs_of(study):
        accuracy, trace = RUNS[run.seed, run.cell.label]
        finished(run, tmp_path, accuracy=accuracy)
        measures = {
            "trace": {"value": trace, "standard_error": 0.5},
            "one_step": {"value": -0.1, "standard_error": None},  # a tie of all, and no logarithm
        }
        (tmp_path / run.name / "sharpness.json").write_text(json.dumps({"samples": 100, "measures": measures}))
    return collect(study, tmp_path)


def test_the_rank_correlation_and_its_interval(results):
    found = correlations(results.sharpness, results.runs).set_index("measure")
    differences = [1 - 4, 2 - 2, 3 - 3, 4 - 1]
    r = 1 - 6 * sum(d * d for d in differences) / (4 * (16 - 1))
    half = 1.959963985 * math.sqrt((1 + r * r / 2) / (4 - 3))
    row = found.loc["trace"]
    assert [row.n, row.correlation] == [4, pytest.approx(r)]
    assert r == pytest.approx(-0.8)
    assert [row.low, row.high] == pytest.approx([math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)])
    assert np.isnan(found.loc["one_step"].correlation)


def test_perfect_order_and_few_runs_have_no_interval(results):
    ordered = results.sharpness.assign(value=[10.0, 0, 20, 0, 30, 0, 40, 0])
    runs = results.runs.assign(last=[1.0, 2, 3, 4])
    row = correlations(ordered, runs).iloc[0]
    assert row.correlation == 1
    assert np.isnan(row.low)
    row = correlations(results.sharpness, results.runs[:3]).iloc[0]
    assert row.n == 3
    assert np.isnan(row.low)


def test_arms_have_means_and_deviations(results):
    found = summary(results.sharpness, ["SGD", "SAM"])
    row = found[(found.cell == "SGD") & (found.measure == "trace")].iloc[0]
    assert [row.n, row["mean"], row.sd] == [2, 35.0, pytest.approx(math.sqrt(50))]


def test_tables_and_figure(study, results):
    made = tables(study, results)
    caption, _, text = made["sharpness-by-arm"]
    assert "100 training samples" in caption
    assert text.to_dict("records")[0] == {"measure": "trace", "SGD (n = 2)": "35 ± 7.1", "SAM (n = 2)": "15 ± 7.1"}
    _, _, ranks = made["sharpness-accuracy"]
    assert ranks.to_dict("records")[0]["rank correlation"] == "-0.80"
    assert ranks.to_dict("records")[1] == {
        "measure": "one step",
        "n": "4",
        "rank correlation": "",
        "95 % interval": "",
    }
    trace, one_step = draw(study, results)["sharpness"].axes
    points = {c.get_label(): sorted(map(tuple, c.get_offsets().tolist())) for c in trace.collections}
    assert points["SGD"] == [(30.0, pytest.approx(94)), (40.0, pytest.approx(90))]
    assert points["SAM"] == [(10.0, pytest.approx(96)), (20.0, pytest.approx(92))]
    assert (trace.get_xlabel(), trace.get_xscale(), one_step.get_xscale()) == ("trace", "log", "linear")
    assert "rank correlation -0.80" in trace.get_title()
    assert "nan" not in one_step.get_title()


def test_a_report_can_be_made_again_from_its_files(study, results, tmp_path, capsys):
    for words in (["--root", str(tmp_path)], ["--results", str(tmp_path / "one")]):
        output = tmp_path / ("one" if "--root" in words else "two")
        assert main(["report", str(study.path), *words, "--output", str(output)]) == 0
    for name in ("sharpness.csv", "sharpness-by-arm.csv", "sharpness-accuracy.csv", "sharpness.png", "report.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    pd.testing.assert_frame_equal(read(tmp_path / "one").sharpness, results.sharpness, check_exact=True)


def test_only_measured_runs_have_rows_and_they_survive_their_files(study, results, tmp_path):
    first = runs_of(study)[0]
    (tmp_path / first.name / "sharpness.json").unlink()
    fewer = collect(study, tmp_path)
    assert len(fewer.sharpness) == 6
    write(fewer, tmp_path / "report")
    pd.testing.assert_frame_equal(read(tmp_path / "report").sharpness, fewer.sharpness, check_exact=True)


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"samples": 1, "measures": {"trace": 3}}'])
def test_a_damaged_measurement_is_named(study, results, tmp_path, damage):
    path = tmp_path / runs_of(study)[0].name / "sharpness.json"
    path.write_text(damage)
    with pytest.raises(StudyError, match=r"sharpness\.json cannot be read .*Remove it and measure the run again"):
        collect(study, tmp_path)
    assert (path.parent / RESULT).is_file()


def test_every_arm_has_a_look_of_its_own(tmp_path):
    arms = {f"arm {i}": {"optimizer": f"{ROOT}/configs/optimizers/sam.yaml"} for i in range(12)}
    for i, arm in enumerate(arms.values()):
        arm["set"] = {"model.optimizer.rho": i + 1.0}
    study = load(str(written(tmp_path, arms=arms, seeds=[1])))
    for run in runs_of(study):
        finished(run, tmp_path)
        measures = {"trace": {"value": 1.0, "standard_error": None}}
        (tmp_path / run.name / "sharpness.json").write_text(json.dumps({"samples": 100, "measures": measures}))
    panel = draw(study, collect(study, tmp_path))["sharpness"].axes[0]
    looks = {(tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in panel.collections}
    assert len(looks) == 12
