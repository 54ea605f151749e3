"""Pictures of loss landscapes, each with what it shows below it."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from sam_lightning.runs.figure_files import STYLE


def line(axis: Sequence[float], losses: np.ndarray, name: str, caption: str, ends: Sequence[str] = ()) -> Figure:
    """The loss along a direction; `ends` name the solutions at 0 and 1."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.6), layout="constrained")
        panel = figure.subplots()
        panel.plot(axis, losses, color="#0072B2", marker=".", ms=4)
        for at, end in enumerate(ends):
            panel.axvline(at, color="0.4", lw=0.8, ls="--")
            panel.annotate(end, (at, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
        panel.set(xlabel=name, ylabel="Training loss", yscale="log" if (losses > 0).all() else "linear")
        figure.supxlabel(caption, fontsize=7, color="0.3")
    return figure


def planes(axes: Sequence[Sequence[float]], losses: Mapping[str, np.ndarray], caption: str) -> Figure:
    """The loss over planes side by side, by their titles, in the same logarithmic levels.

    A `+` marks the weights in the middle; points that are not finite stay white.
    """
    shown = {title: np.ma.masked_invalid(np.maximum(values, np.finfo(float).tiny)) for title, values in losses.items()}
    low = min(float(values.min()) for values in shown.values())
    high = max(float(values.max()) for values in shown.values())
    levels = np.geomspace(low, max(high, low * 1.01), 16)
    with rc_context(STYLE):
        figure = Figure(figsize=(1.4 + 3 * len(shown), 3.5), layout="constrained")
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for panel, (title, values) in zip(panels, shown.items(), strict=True):
            filled = panel.contourf(*axes, values.T, levels=levels, norm=LogNorm(low, levels[-1]), cmap="viridis")
            panel.contour(*axes, values.T, levels=levels, colors="white", linewidths=0.4)
            panel.plot(0, 0, marker="+", color="white", ms=9)
            panel.set(title=title, xlabel="First direction", aspect="equal")
            panel.locator_params(nbins=5)
            panel.grid(visible=False)
        panels[0].set_ylabel("Second direction")
        bar = figure.colorbar(filled, ax=list(panels), format="%.3g", ticks=levels[::3])
        bar.set_label("Training loss")
        bar.minorticks_off()
        figure.supxlabel(caption, fontsize=7, color="0.3")
    return figure
