"""What every method reached, and what it cost."""

from pathlib import Path

from matplotlib.figure import Figure
from study_tables import STUDIES

from sam_lightning.studies.results import read
from sam_lightning.studies.spec import load
from sam_lightning.studies.statistics import outcomes, summary


def accuracy_and_cost(folder: Path) -> Figure:
    """Test accuracy by method, in the order of what a step costs: at full length, and at equal compute."""
    study, results = load(str(STUDIES / "methods.yaml")), read(folder)
    cost = results.runs.groupby("cell").gradients_per_step.mean().round(2)
    full, cut = (summary(study, outcomes(results, at)).set_index("cell") for at in (False, True))
    order = sorted(full.index, key=lambda arm: (cost[arm], -full["last"][arm]))
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    panel = figure.subplots()
    places = {}
    for i, arm in enumerate(order):  # a gap between methods of different cost
        places[arm] = i + sorted(set(cost)).index(cost[arm]) * 0.7
    for table, shift, style in (
        (full, -0.13, {"marker": "o", "color": "#0072B2", "label": "all 30 epochs"}),
        (cut, 0.13, {"marker": "s", "color": "#D55E00", "mfc": "white", "label": "at equal compute"}),
    ):
        x = [places[arm] + shift for arm in order]
        rows = table.loc[order]
        panel.errorbar(x, rows["last"], rows.last_sd.fillna(0), linestyle="", capsize=2, ms=5, **style)
    for gradients in sorted(set(cost)):
        here = [places[arm] for arm in order if cost[arm] == gradients]
        label = f"{gradients:g} gradient{'s' if gradients != 1 else ''} a step"
        panel.annotate(
            label, (sum(here) / len(here), 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=9
        )
        if min(here) > 0:
            panel.axvline(min(here) - 0.85, color="0.8", lw=0.8)
    panel.set_xticks([places[arm] for arm in order], order, rotation=35, ha="right", rotation_mode="anchor")
    panel.set_ylabel("Test accuracy (%)")
    panel.legend(loc="lower right")
    return figure
