"""Tables and figures of stored results: against a golden report, and against numbers computed otherwise."""

import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sam_lightning.runs.directory import RESULT, WEIGHTS
from sam_lightning.studies.command import main
from sam_lightning.studies.conclusions import conclusions
from sam_lightning.studies.figures import draw
from sam_lightning.studies.report import markdown
from sam_lightning.studies.results import Results, collect, missing, read, write
from sam_lightning.studies.runs import runs_of
from sam_lightning.studies.spec import StudyError, load
from sam_lightning.studies.statistics import differences, outcomes, summary
from sam_lightning.studies.tables import tables
from study_files import ROOT, finished, written

GOLDEN = Path(__file__).parent / "golden"
ACCURACIES = {1: [0.40, 0.55, 0.65, 0.66], 2: [0.42, 0.57, 0.66, 0.65]}  # SAM's, batch size 32, by seed
SGD_LAST = {1: 0.61, 2: 0.63}


@pytest.fixture
def study():
    return load(str(GOLDEN / "study.yaml"))


@pytest.fixture
def results():
    return read(GOLDEN)


def row(table, label, **more):
    found = table[(table.cell == label) & np.logical_and.reduce([table[k] == v for k, v in more.items()] or [True])]
    assert len(found) == 1
    return found.iloc[0]


def test_the_golden_report(study, results):
    assert markdown(study, results, draw(study, results)) == (GOLDEN / "report.md").read_text()


def test_means_and_deviations(study, results):
    sam = row(summary(study, outcomes(results, equal_compute=False)), "SAM, batch size 32")
    assert (sam.n, sam.epochs) == (2, 4)
    best, last = ([100 * value(a) for a in ACCURACIES.values()] for value in (max, lambda a: a[-1]))
    assert [sam.best, sam.best_sd, sam["last"], sam.last_sd] == pytest.approx(
        [mean(best), stdev(best), mean(last), stdev(last)], abs=1e-12
    )


def test_equal_compute_takes_the_first_half_of_two_gradients_a_step(study, results):
    table = summary(study, outcomes(results, equal_compute=True))
    sam, sgd = (row(table, f"{arm}, batch size 32") for arm in ("SAM", "SGD"))
    assert (sam.epochs, sgd.epochs) == (2, 4)
    assert sam.best == sam["last"] == pytest.approx(100 * mean(a[1] for a in ACCURACIES.values()))
    full = row(summary(study, outcomes(results, equal_compute=False)), "SGD, batch size 32")
    assert sgd.best == full.best
    assert sgd.train_loss == full.train_loss


@pytest.mark.parametrize(("epochs", "kept"), [(5, {1: 4, 2: 2}), (3, {1: 2, 2: 1}), (1, {})])
def test_equal_compute_is_equal_for_odd_lengths_too(study, results, epochs, kept):
    runs = results.runs.assign(epochs=epochs)
    rows = [
        row._replace(epoch=e)
        for row in results.epochs[results.epochs.epoch == 1].itertuples(index=False)
        for e in range(1, epochs + 1)
    ]
    cut = outcomes(replace(results, runs=runs, epochs=pd.DataFrame(rows)), equal_compute=True)
    found = cut.merge(runs[["cell", "seed", "gradients_per_step"]], on=["cell", "seed"])
    assert dict(zip(found.gradients_per_step, found.epochs, strict=True)) == kept


def test_equal_compute_of_a_fraction_of_a_gradient_ends_with_the_last_whole_epoch_before():
    runs = pd.DataFrame(
        [
            {"cell": cell, "seed": 1, "epochs": 20, "gradients_per_step": gradients, "selected_on": "test"}
            for cell, gradients in (("SGD", 1.0), ("SAM", 2.0), ("every 5", 1.2), ("every 10", 1.1))
        ]
    )
    epochs = runs[["cell", "seed"]].merge(
        pd.DataFrame({"epoch": range(1, 21), "accuracy": 0.5, "train_loss": 1.0}), "cross"
    )
    cut = outcomes(Results(runs, epochs, pd.DataFrame()), equal_compute=True)
    assert dict(zip(cut.cell, cut.epochs, strict=True)) == {"SGD": 20, "SAM": 10, "every 5": 16, "every 10": 18}


def test_equal_compute_counts_what_an_epoch_has_cost():
    """Late SAM costs a gradient a step at first and two in the end: 24 epochs and half of the last 6."""
    runs = pd.DataFrame(
        [
            {"cell": cell, "seed": 1, "epochs": 30, "gradients_per_step": gradients, "selected_on": "test"}
            for cell, gradients in (("SGD", 1.0), ("late SAM", 1.2))
        ]
    )
    epochs = runs[["cell", "seed"]].merge(
        pd.DataFrame({"epoch": range(1, 31), "accuracy": 0.5, "train_loss": 1.0}), "cross"
    )
    late = (epochs.cell == "late SAM") & (epochs.epoch > 24)
    results = Results(runs, epochs.assign(gradients_per_step=np.where(late, 2.0, 1.0)), pd.DataFrame())
    cut = outcomes(results, equal_compute=True)
    assert dict(zip(cut.cell, cut.epochs, strict=True)) == {"SGD": 30, "late SAM": 27}
    older = replace(results, epochs=epochs)  # without the column
    assert dict(outcomes(older, equal_compute=True).set_index("cell").epochs) == {"SGD": 30, "late SAM": 25}


def test_differences_are_paired_by_seed(study, results):
    found = row(differences(study, outcomes(results, equal_compute=False)), "SAM, batch size 32", epoch="last")
    values = [100 * (ACCURACIES[seed][-1] - SGD_LAST[seed]) for seed in (1, 2)]
    half = 12.7062047 * stdev(values) / 2**0.5  # Student's t for one degree of freedom, from a printed table
    assert [found["mean"], found.low, found.high] == pytest.approx(
        [mean(values), mean(values) - half, mean(values) + half]
    )
    assert found.n == 2


def test_only_common_seeds_are_compared(study, results):
    fewer = replace(
        results, runs=results.runs[~((results.runs.cell == "SGD, batch size 32") & (results.runs.seed == 1))]
    )
    found = row(differences(study, outcomes(fewer, equal_compute=False)), "SAM, batch size 32", epoch="best")
    assert found.n == 1
    assert found["mean"] == pytest.approx(100 * (0.66 - 0.63))
    assert np.isnan(found.low)


def test_a_run_without_a_value_leaves_the_other_seeds_theirs(study, results):
    first = (results.runs.cell == "SAM, batch size 32") & (results.runs.seed == 1)
    fewer = replace(results, runs=results.runs.assign(best=results.runs.best.mask(first)))
    kept = row(differences(study, outcomes(fewer, equal_compute=False)), "SAM, batch size 32", epoch="best")
    assert kept.n == 1
    assert kept.by_seed.startswith("2:")


def test_a_difference_too_small_to_show_has_no_sign_of_its_own(study, results):
    nearly = results.runs.assign(best=0.6 - 1e-6 * (results.runs.cell == "SAM, batch size 32"))
    _, _, text = tables(study, replace(results, runs=nearly))["differences"]
    found = text[(text.arm == "SAM, batch size 32") & (text.epoch == "best")].iloc[0]
    assert [found["mean"], found["by seed"]] == ["+0.00", "1:+0.00 2:+0.00"]


def two_arms(sgd, sam, selected_on="test", tested=None):
    """Results of two arms from the evaluated accuracy by seed and epoch, and from the test accuracy by seed."""
    runs, epochs = [], []
    for cell, gradients, curves in (("SGD", 1, sgd), ("SAM", 2, sam)):
        for seed, curve in enumerate(curves, start=1):
            last = curve[-1] if tested is None else tested[cell][seed - 1]
            of_all = {"cell": cell, "seed": seed, "train_loss": 1.0}
            conditions = {"gradients_per_step": gradients, "selected_on": selected_on, "epochs": len(curve)}
            runs.append({**of_all, **conditions, "best": last, "last": last})
            epochs += [{**of_all, "epoch": i, "accuracy": value} for i, value in enumerate(curve, start=1)]
    return Results(pd.DataFrame(runs), pd.DataFrame(epochs), pd.DataFrame())


def said(tmp_path, *curves, **more):
    seeds = list(range(1, len(curves[0]) + 1))
    (sentence,) = conclusions(load(str(written(tmp_path, seeds=seeds))), two_arms(*curves, **more))
    return sentence


FLAT, RISING = [[0.5] * 4, [0.52] * 4, [0.54] * 4], [[0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.82], [0.5, 0.6, 0.7, 0.84]]


def test_words_say_who_is_ahead_at_full_length_and_at_equal_compute(tmp_path):
    sentence = said(tmp_path, FLAT, RISING)
    # After two of SAM's epochs: +10, +8 and +6 points; t = 4.3027 from a printed table.
    assert sentence == (
        "SAM is ahead of SGD by 30.0 points of test accuracy at the last epoch [+30.0, +30.0] (95 %, n = 3); at equal "
        "compute (epochs: 2 against 4) SAM is ahead of SGD by 8.0 points of test accuracy [+3.0, +13.0] (95 %, n = 3)."
    )


def test_words_say_who_is_behind(tmp_path):
    falling = [[0.3, 0.2, 0.1, 0.4], [0.3, 0.2, 0.1, 0.4], [0.3, 0.2, 0.1, 0.4]]
    sentence = said(tmp_path, FLAT, falling)
    assert sentence.startswith(
        "SAM is behind SGD by 12.0 points of test accuracy at the last epoch [-17.0, -7.0] (95 %"
    )
    assert "at equal compute (epochs: 2 against 4) SAM is behind SGD by 32.0 points" in sentence


def test_words_say_where_an_interval_contains_0(tmp_path):
    crossing = [[0.5, 0.5, 0.5, 0.56], [0.5, 0.5, 0.5, 0.54], [0.5, 0.5, 0.5, 0.52]]
    assert said(tmp_path, FLAT, crossing).startswith(
        "SAM and SGD cannot be told apart: +2.0 points of test accuracy at the last epoch, and [-7.9, +11.9] contains "
        "0 (95 %, n = 3); at equal compute"
    )


def test_words_of_a_single_seed_claim_no_interval(tmp_path):
    assert said(tmp_path, FLAT[:1], RISING[:1]).startswith(
        "SAM ends 30.0 points of test accuracy at the last epoch ahead of SGD (one seed, so no interval); at equal "
    )


def test_words_name_the_set_that_was_evaluated(tmp_path):
    sentence = said(
        tmp_path, FLAT, RISING, selected_on="validation", tested={"SGD": [0.5, 0.5, 0.5], "SAM": [0.4, 0.41, 0.42]}
    )
    assert sentence.startswith("SAM is behind SGD by 9.0 points of test accuracy at the last epoch")
    assert "SAM is ahead of SGD by 8.0 points of validation accuracy" in sentence


def test_settings_are_chosen_on_validation_accuracy(tmp_path):
    study = load(str(written(tmp_path, seeds=[1, 2, 3])))
    tested = {"SGD": [0.9, 0.9, 0.9], "SAM": [0.1, 0.1, 0.1]}
    results = two_arms(FLAT, RISING, selected_on="validation", tested=tested)
    _, numbers, _ = tables(study, results)["validation"]
    assert row(numbers, "SAM")["last"] == pytest.approx(82.0)
    assert row(numbers, "SAM").epochs == 4
    assert "validation" not in tables(study, two_arms(FLAT, RISING))
    grid = {"model.optimizer.rho": [0.1, 0.2]}
    arms = {"SGD": f"{ROOT}/configs/optimizers/sgd.yaml", "SAM": f"{ROOT}/configs/optimizers/sam.yaml"}
    swept = load(str(written(tmp_path, "swept", figures={"sweep": "sweep"}, grid=grid, arms=arms, seeds=[1, 2, 3])))
    relabelled = replace(
        results,
        runs=results.runs.replace({"cell": {"SGD": "SGD, rho 0.1", "SAM": "SAM, rho 0.1"}}),
        epochs=results.epochs.replace({"cell": {"SGD": "SGD, rho 0.1", "SAM": "SAM, rho 0.1"}}),
    )
    panel = draw(swept, relabelled)["sweep"].axes[0]
    assert panel.get_ylabel() == "Validation accuracy at the last epoch (%)"
    line = next(box.lines[0] for box in panel.containers if box.get_label() == "SAM")
    assert line.get_ydata() == pytest.approx([82.0])


def test_published_numbers_stand_beside_runs_as_long_and_no_others(study, results):
    table = summary(study, outcomes(results, equal_compute=False))
    sgd, sam = (row(table, f"{arm}, batch size 32") for arm in ("SGD", "SAM"))
    assert sgd.published_best == 60.0
    assert sgd.best_difference == pytest.approx(100 * mean([0.62, 0.63]) - 60.0)
    assert np.isnan(sam.published_best)  # published after 100 epochs, ours have 4


def test_what_is_missing_is_named(study, results):
    assert missing(study, results) == [
        "ASAM, batch size 64, seed 1",
        "SGD, batch size 64, seed 2",
        "SAM, batch size 64, seed 2",
    ]


def test_arms_of_one_length_and_cost_need_no_equal_compute(study, results):
    sam = results.runs.cell.str.startswith("SAM")
    assert set(tables(study, replace(results, runs=results.runs[sam]))) == {"accuracy"}


def test_results_survive_their_files(results, tmp_path):
    write(results, tmp_path)
    again = read(tmp_path)
    for name in ("runs", "epochs", "weights"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(results, name), check_exact=True)


def test_a_report_writes_equal_files_for_equal_results(tmp_path, capsys):
    for folder in ("one", "two"):
        words = ["report", str(GOLDEN / "study.yaml"), "--results", str(GOLDEN), "--output", str(tmp_path / folder)]
        assert main(words) == 0
    names = {path.name for path in (tmp_path / "one").iterdir()}
    figures = {f"{name}.{kind}" for name in ("curves", "loss", "weights", "sweep") for kind in ("png", "pdf")}
    kinds = ("accuracy", "differences", "equal-compute", "equal-compute-differences")
    expected = {"report.md", "runs.csv", "epochs.csv", "weights.csv"} | figures
    expected |= {f"{name}.{kind}" for name in kinds for kind in ("csv", "tex")}
    assert {name for name in names if not name.startswith("events")} == expected
    for name in expected:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert r"66.00 $\pm$ 0.00" in (tmp_path / "one/accuracy.tex").read_text()
    shown = EventAccumulator(str(tmp_path / "one")).Reload()
    assert set(shown.Tags()["images"]) == {"curves", "loss", "weights", "sweep"}
    out = capsys.readouterr().out
    assert "SAM, batch size 32  | 2   | 4 " in out
    words = [
        line.removeprefix("- ") for line in (tmp_path / "one/report.md").read_text().splitlines() if "apart" in line
    ]
    assert len(words) == 1
    assert words[0] in out.splitlines()[-3:]  # the command ends with what came out


def test_every_figure_has_axes_legend_and_data(study, results):
    figures = draw(study, results)
    assert set(figures) == set(study.figures)
    for name, figure in figures.items():
        for panel in figure.axes:
            assert panel.get_xlabel(), name
            (legend,) = figure.legends or [panel.get_legend()]
            labels = [text.get_text() for text in legend.get_texts()]
            assert labels, name
            names = {*study.arms, "published"}
            assert all(label.partition(" (")[0] in names for label in labels), labels  # no directory names
        assert figure.axes[0].get_ylabel(), name
    assert figures["loss"].axes[0].get_yscale() == figures["weights"].axes[0].get_yscale() == "log"
    assert figures["curves"].axes[0].get_ylabel() == "Test accuracy (%)"


def test_curves_are_means_with_a_band_of_one_deviation(study, results):
    panel = draw(study, results)["curves"].axes[0]
    line = next(line for line in panel.lines if line.get_label() == "SAM (n = 2)")
    by_epoch = 100 * np.array(list(ACCURACIES.values()))
    assert line.get_xdata().tolist() == [1, 2, 3, 4]
    assert line.get_ydata() == pytest.approx(by_epoch.mean(0))
    band = panel.collections[list(panel.lines).index(line)].get_paths()[0].vertices
    at_two = sorted({round(y, 9) for x, y in band if x == 2})
    center, deviation = by_epoch[:, 1].mean(), by_epoch[:, 1].std(ddof=1)
    assert at_two == pytest.approx([center - deviation, center + deviation])


@pytest.mark.parametrize(("figure", "value"), [("curves", 59.0), ("loss", 0.5)])
def test_published_numbers_stand_beside_the_curves_as_far_as_these_go(study, results, figure, value):
    panel = draw(study, results)[figure].axes[0]
    crosses = [line for line in panel.lines if line.get_marker() == "x"]
    assert [(list(c.get_xdata()), list(c.get_ydata())) for c in crosses] == [([4], [value])]  # SAM's is of epoch 100
    sgd = next(line for line in panel.lines if line.get_label().startswith("SGD"))
    assert crosses[0].get_color() == sgd.get_color()
    assert "published" in [text.get_text() for text in panel.get_legend().get_texts()]
    assert not [
        line for line in draw(replace(study, reference=[]), results)[figure].axes[0].lines if line.get_marker() == "x"
    ]


@pytest.mark.parametrize("epochs", [1, 3])
def test_epochs_are_whole_numbers(study, results, epochs):
    begun = replace(results, epochs=results.epochs[results.epochs.epoch <= epochs])
    panel = draw(study, begun)["curves"].axes[0]
    low, high = panel.get_xlim()
    ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
    assert ticks == list(range(1, epochs + 1))


def test_arms_differ_in_colour_and_in_line(study, results):
    for figure in draw(study, results).values():
        lines = [line for line in figure.axes[0].lines if line.get_label().partition(" (")[0] in study.arms]
        assert (
            len({to_hex(line.get_color()) for line in lines})
            == len({line.get_linestyle() for line in lines})
            == len(lines)
        )


def test_histograms_show_the_mean_count_of_every_bin(study, results):
    panel = draw(study, results)["weights"].axes[0]
    assert {patch.get_label(): patch.get_data().values.tolist() for patch in panel.patches} == {
        "SGD": [0, 22, 28, 0],
        "SAM": [3, 21, 21, 5],
        "ASAM": [10, 15, 15, 10],
    }


def test_a_sweep_is_over_the_grids_values(study, results):
    panel = draw(study, results)["sweep"].axes[0]
    assert panel.get_xlabel() == "batch size"
    assert panel.get_xscale() == "log"
    line = next(box.lines[0] for box in panel.containers if box.get_label() == "SAM")
    assert line.get_xdata().tolist() == [32, 64]
    assert line.get_ydata() == pytest.approx([65.5, 55.0])


@pytest.mark.parametrize(("selected_on", "best", "last"), [("validation", 0.5, 0.5), ("test", 0.52, 0.53)])
def test_results_are_collected_from_runs(tmp_path, selected_on, best, last):
    study = load(str(written(tmp_path)))
    for run in runs_of(study)[:3]:
        finished(run, tmp_path, selected_on=selected_on)
    results = collect(study, tmp_path)
    assert len(results.runs) == 3
    first = results.runs.iloc[0]
    assert (first.cell, first.seed, first.best, first["last"], first.best_epoch, first.seconds) == (
        "SGD",
        1,
        best,
        last,
        2,
        6.0,
    )
    assert first.train_loss == pytest.approx(1 / 3)
    assert results.epochs.accuracy.tolist() == pytest.approx([0.51, 0.52, 0.53] * 3)
    of_one = results.weights[(results.weights.cell == "SGD") & (results.weights.seed == 1)]
    assert of_one["count"].sum() == 4
    assert (of_one.left.iloc[0], of_one.right.iloc[-1]) == (-1, 1)


@pytest.mark.parametrize("damage", ["", "{", "{}", "[]", '{"epochs": 3}'])
def test_a_damaged_result_is_named(tmp_path, damage):
    study = load(str(written(tmp_path)))
    run = runs_of(study)[0]
    finished(run, tmp_path)
    (tmp_path / run.name / RESULT).write_text(damage)
    with pytest.raises(StudyError, match=rf"{run.name}/{RESULT} cannot be read .*Remove it and run the study again"):
        collect(study, tmp_path)


def test_a_hostile_weights_file_is_refused(tmp_path):
    study = load(str(written(tmp_path)))
    run = runs_of(study)[0]
    finished(run, tmp_path)
    np.savez(tmp_path / run.name / WEIGHTS, a=np.array([object()]))
    with pytest.raises(StudyError, match="cannot be read"):
        collect(study, tmp_path)


def test_a_report_of_an_incomplete_study(tmp_path, capsys):
    path = written(tmp_path)
    finished(runs_of(load(str(path)))[0], tmp_path / "runs")
    assert main(["report", str(path), "--root", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "1 of 4 runs" in out
    assert "Missing: SAM, seed 1; SGD, seed 2; SAM, seed 2." in out
    shutil.rmtree(tmp_path / "runs")
