"""How every figure looks, and how it becomes files."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from sam_lightning.runs.atomic_files import replacing

STYLE: Any = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 200,
    "figure.dpi": 100,
}


def save(figure: Figure, path: Path) -> None:
    """Writes `path` with the endings png and pdf; equal figures make equal files."""
    for kind in ("png", "pdf"):
        with rc_context(STYLE), replacing(path.with_name(f"{path.name}.{kind}")) as draft:
            figure.savefig(draft, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
