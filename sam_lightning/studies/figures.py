"""Figures of a study, for screen and print: colours that the colour-blind tell apart, and line styles besides."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from sam_lightning.runs.figure_files import STYLE
from sam_lightning.studies.results import Results
from sam_lightning.studies.sharpness_statistics import correlations
from sam_lightning.studies.spec import Cell, Study, short
from sam_lightning.studies.statistics import is_tested_every_epoch, validated

Point: TypeAlias = tuple[tuple[str, Any], ...]  # of a grid

# M. Okabe, K. Ito. Color Universal Design. 2008; yellow, which print loses, left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(study: Study, results: Results) -> dict[str, Figure]:
    """The study's figures by file name; one without data is left out."""
    kinds: dict[str, Callable[[Study, Results], Figure | None]] = {
        "accuracy": accuracy,
        "training loss": training_loss,
        "weights": weights,
        "sweep": sweep,
    }
    with rc_context(STYLE):
        drawn = {name: kinds[kind](study, results) for name, kind in study.figures.items()}
        if len(results.sharpness):
            drawn["sharpness"] = sharpness_and_accuracy(study, results)
        if len(results.sharpness_epochs):
            drawn["sharpness-epochs"] = sharpness_by_epoch(study, results)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def accuracy(study: Study, results: Results) -> Figure:
    """Accuracy per epoch: mean over seeds, band of one standard deviation; what was published, as crosses."""
    return _curves(
        study,
        results.epochs.assign(value=100 * results.epochs.accuracy),
        f"{_evaluated(results)} (%)",
        logarithmic=False,
        published="last",
    )


def training_loss(study: Study, results: Results) -> Figure:
    """Training loss per epoch, logarithmic: mean over seeds, band of one standard deviation; published ones too."""
    return _curves(
        study,
        results.epochs.assign(value=results.epochs.train_loss),
        "Training loss (cross entropy)",
        logarithmic=True,
        published="train_loss",
    )


def weights(study: Study, results: Results) -> Figure | None:
    """Numbers of weights in equal bins, logarithmic, at the end of training; mean over seeds."""
    if results.weights.empty:
        return None
    parameters = sorted(results.weights.parameter.unique())
    figure, panels = _panels(len(parameters))
    for panel, parameter in zip(panels, parameters, strict=True):
        for i, arm in enumerate(study.arms):
            of_it = results.weights[
                (results.weights.parameter == parameter) & results.weights.cell.isin(_labels(study, arm))
            ]
            if len(of_it):
                counts = of_it.groupby(["left", "right"])["count"].mean().reset_index()
                edges = [*counts.left, counts.right.iloc[-1]]
                panel.stairs(counts["count"], edges, label=arm, color=_COLOURS[i % 6], linestyle=_LINES[i % 4], lw=1.3)
        panel.set(yscale="log", xlabel=f"Weights of {parameter.removesuffix('.weight')}")
    panels[0].set_ylabel("Number of weights per bin")
    # Outside: matplotlib's search for a free place does not see stairs.
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def sweep(study: Study, results: Results) -> Figure | None:
    """Accuracy at the last epoch against the grid's value: mean over seeds, bars of one standard deviation.

    It is the accuracy on the set that was evaluated after every epoch: values are chosen on validation data, if there
    are any. An arm without a grid is a horizontal line.
    """
    keys = {key for cell in study.cells() for key, _ in cell.point}
    if len(keys) != 1:
        return None
    figure, (panel,) = _panels(1)
    outcome = validated(results)
    for i, arm in enumerate(study.arms):
        style: dict[str, Any] = {"color": _COLOURS[i % 6], "linestyle": _LINES[i % 4], "label": arm}
        rows = []
        for cell in (cell for cell in study.cells() if cell.arm == arm):
            values = 100 * outcome[outcome.cell == cell.label]["last"]
            if len(values):
                rows.append((cell.point[0][1] if cell.point else None, values.mean(), values.std(ddof=1)))
        if rows and rows[0][0] is None:
            panel.axhline(rows[0][1], **style)
        elif rows:
            x, mean, sd = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
            panel.errorbar(x, mean, np.nan_to_num(sd), marker="o", ms=4, capsize=2, **style)
    name = short(next(iter(keys))).replace("_", " ")
    values = sorted({value for cell in study.cells() for _, value in cell.point})
    panel.set(xscale="log", xlabel=name, ylabel=f"{_evaluated(results)} at the last epoch (%)")
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.legend()
    return figure


def sharpness_and_accuracy(study: Study, results: Results) -> Figure:
    """Test accuracy of the last epoch against each measure of sharpness, a point per run; plain above adaptive."""
    ranks = correlations(results.sharpness, results.runs)
    points = results.sharpness.merge(results.runs[["cell", "seed", "last"]], on=["cell", "seed"])
    measures = list(dict.fromkeys(points.measure))
    columns = (len(measures) + 1) // 2
    figure = Figure(figsize=(1.2 + 2.3 * columns, 5.0), layout="constrained")
    panels = figure.subplots(2, columns, sharey=True, squeeze=False).ravel()
    for panel, measure in zip(panels, measures, strict=False):
        of_it = points[points.measure == measure]
        for i, arm in enumerate(study.arms):
            here = of_it[of_it.cell.isin(_labels(study, arm))]
            if len(here):
                marker = _MARKERS[(i + i // 6) % 6]  # 36 arms before colour and marker are another's
                panel.scatter(here.value, 100 * here["last"], s=16, label=arm, color=_COLOURS[i % 6], marker=marker)
        rank = ranks[ranks.measure == measure].iloc[0]
        interval = "" if np.isnan(rank.low) else f"\n[{rank.low:+.2f}, {rank.high:+.2f}], n = {rank.n}"
        if not np.isnan(rank.correlation):
            panel.set_title(f"rank correlation {rank.correlation:+.2f}{interval}", fontsize=8)
        panel.set_xlabel(measure.replace("_", " "))
        if (of_it.value > 0).all():
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
    for panel in panels[len(measures) :]:
        panel.set_axis_off()
    for panel in panels[::columns]:
        panel.set_ylabel("Test accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(study.arms), 6))
    return figure


def sharpness_by_epoch(study: Study, results: Results) -> Figure:
    """The largest eigenvalue of the Hessian where it was measured during training, logarithmic."""
    measured = results.sharpness_epochs
    of_it = measured[(measured.measure == "largest_eigenvalue") & (measured.value > 0)]
    return _curves(study, of_it, "Largest eigenvalue", logarithmic=True)


def _evaluated(results: Results) -> str:
    return f"{'Test' if is_tested_every_epoch(results) else 'Validation'} accuracy"


def _curves(study: Study, epochs: pd.DataFrame, name: str, logarithmic: bool, published: str = "") -> Figure:
    """A panel per point of the grid, a line per arm, and crosses at the published numbers of this name."""
    points = list(dict.fromkeys(cell.point for cell in study.cells() if cell.label in set(epochs.cell)))
    figure, panels = _panels(len(points))
    for panel, point in zip(panels, points, strict=True):
        draw_curves(panel, study, epochs, point, logarithmic)
        _draw_published(panel, study, epochs, point, published)
        if len(points) > 1:
            panel.set_title(", ".join(f"{short(key).replace('_', ' ')} {value}" for key, value in point))
    panels[0].set_ylabel(name)
    return figure


def draw_curves(panel: Axes, study: Study, epochs: pd.DataFrame, point: Point = (), logarithmic: bool = False) -> None:
    """Draws the `value` of each epoch into a panel, a line per arm: mean over seeds, band of one standard deviation.

    Args:
        panel: Where to draw.
        study: Whose arms.
        epochs: A row per run and epoch: `cell`, `seed`, `epoch`, `value`.
        point: The point of the grid whose runs are drawn.
        logarithmic: Whether the vertical axis is.
    """
    for i, arm in enumerate(study.arms):
        of_it = epochs[epochs.cell == Cell(arm, point).label]
        if of_it.empty:
            continue
        by_epoch = of_it.groupby("epoch").value
        mean, sd = by_epoch.mean(), by_epoch.std(ddof=1).fillna(0)
        label = f"{arm} (n = {of_it.seed.nunique()})"
        marker = "o" if len(mean) < 3 else None  # a single epoch is no line
        panel.plot(mean.index, mean, label=label, color=_COLOURS[i % 6], linestyle=_LINES[i % 4], marker=marker)
        low = mean - sd
        if logarithmic:  # a band that reaches 0 has no place on this axis; it ends at the least value instead
            low = low.where(low > 0, by_epoch.min())
        panel.fill_between(mean.index, low, mean + sd, color=_COLOURS[i % 6], alpha=0.2, lw=0)
    panel.set(xlabel="Epoch", yscale="log" if logarithmic else "linear")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if epochs.epoch.max() < 3:
        panel.set_xlim(0.5, epochs.epoch.max() + 0.5)
    panel.legend()


def _draw_published(panel: Axes, study: Study, epochs: pd.DataFrame, point: Point, metric: str) -> None:
    """Crosses in the colours of the arms, at epochs that some run has reached."""
    drawn = []
    for i, arm in enumerate(study.arms):
        rows = [row for row in study.reference if row["arm"] == arm and all(row.get(key) == v for key, v in point)]
        rows = [row for row in rows if metric in row and row["epochs"] <= epochs.epoch.max()]
        if rows and Cell(arm, point).label in set(epochs.cell):
            values = [row[metric] for row in rows]
            drawn += panel.plot([row["epochs"] for row in rows], values, "x", color=_COLOURS[i % 6], ms=5)
    if drawn:
        drawn[0].set_label("published")
        panel.legend()


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(1.2 + 3.4 * count, 3.0), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _labels(study: Study, arm: str) -> set[str]:
    return {cell.label for cell in study.cells() if cell.arm == arm}
