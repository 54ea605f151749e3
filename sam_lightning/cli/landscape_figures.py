"""Pictures of loss landscapes, each with what it shows below it."""

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from sam_lightning.runs.figure_files import STYLE


def line(axis: Sequence[float], losses: np.ndarray, name: str, caption: str, ends: Sequence[str] = ()) -> Figure:
    """The loss along a direction; `ends` name the solutions at 0 and 1."""
    with rc_context(STYLE):
        figure, panel = _figure(4.6)
        panel.plot(axis, losses, color="#0072B2", marker=".", ms=4)
        for at, end in enumerate(ends):
            panel.axvline(at, color="0.4", lw=0.8, ls="--")
            panel.annotate(end, (at, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
        panel.set(xlabel=name, ylabel="Training loss", yscale="log" if (losses > 0).all() else "linear")
        figure.supxlabel(caption, fontsize=7, color="0.3")
    return figure


def contour(axes: Sequence[Sequence[float]], losses: np.ndarray, caption: str) -> Figure:
    """The loss over a plane, in logarithmic levels; points that are not finite stay white."""
    shown = np.ma.masked_invalid(np.maximum(losses, np.finfo(float).tiny))
    low, high = float(shown.min()), float(shown.max())
    levels = np.geomspace(low, max(high, low * 1.01), 16)
    with rc_context(STYLE):
        figure, panel = _figure(5.4)
        filled = panel.contourf(*axes, shown.T, levels=levels, norm=LogNorm(low, levels[-1]), cmap="viridis")
        panel.contour(*axes, shown.T, levels=levels, colors="white", linewidths=0.4)
        panel.plot(0, 0, marker="+", color="white", ms=9)
        panel.set(xlabel="First direction", ylabel="Second direction", aspect="equal")
        panel.grid(visible=False)
        bar = figure.colorbar(filled, format="%.2g", ticks=levels[::3])
        bar.set_label("Training loss")
        bar.minorticks_off()
        figure.supxlabel(caption, fontsize=7, color="0.3")
    return figure


def _figure(width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    return figure, figure.subplots()
