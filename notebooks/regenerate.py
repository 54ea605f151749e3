"""Makes tables and figures of the pages anew from the files in `results/`, then runs the notebooks."""

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from cost_tables import cost_section
from matplotlib import rc_context
from matplotlib.figure import Figure
from method_figure import accuracy_and_cost
from method_tables import methods_section
from PIL import Image
from study_tables import (
    HERE,
    STUDIES,
    cifar_sharpness_section,
    label_noise_section,
    quickstart_section,
    results_section,
    sharpness_section,
)

from sam_lightning.cli.landscape_figures import planes
from sam_lightning.runs.figure_files import STYLE
from sam_lightning.studies.figures import accuracy, draw_curves, sharpness_and_accuracy
from sam_lightning.studies.results import read
from sam_lightning.studies.spec import load

ROOT = HERE.parent
FIGURES = HERE / "figures"
# By page: what stands between `<!-- name: by notebooks/regenerate.py -->` and `<!-- end of name -->`.
SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"quickstart": quickstart_section},
    "notebooks/README.md": {
        "results": results_section,
        "label-noise": label_noise_section,
        "methods": methods_section,
        "sharpness": sharpness_section,
        "cifar-sharpness": cifar_sharpness_section,
    },
    "tests/benchmarks/README.md": {"cost": cost_section},
}


def quickstart(folder: Path) -> Figure:
    """Test accuracy beside training loss: who memorises the wrong labels loses accuracy."""
    study, results = load(str(STUDIES / "quickstart.yaml")), read(folder)
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, study, results.epochs.assign(value=100 * results.epochs.accuracy))
    left.set_title("Test accuracy (%), right labels")
    draw_curves(right, study, results.epochs.assign(value=results.epochs.train_loss))
    right.set_title("Training loss, 36 % of the labels wrong")
    right.get_legend().remove()
    return figure


def landscape(folder: Path) -> Figure:
    """The loss around two of the quickstart's solutions, as `sam-lightning landscape --other` draws it."""
    tables = {arm: pd.read_csv(folder / f"{arm}.csv", index_col=0) for arm in ("SGD", "SAM")}
    axes = [tables["SGD"].index.to_numpy(), tables["SGD"].columns.to_numpy(dtype=float)]
    caption = "Two random directions around each solution, filter-normalised, 1000 noisy training samples."
    return planes(axes, {arm: table.to_numpy() for arm, table in tables.items()}, caption)


def figures() -> dict[str, tuple[str, Callable[[Path], Figure]]]:
    """By file name: the folder in results/ that a figure shows, and what draws it."""

    def curves(file: str) -> Callable[[Path], Figure]:
        return lambda folder: accuracy(load(str(STUDIES / f"{file}.yaml")), read(folder))

    return {
        "quickstart": ("quickstart", quickstart),
        "landscape": ("landscape", landscape),
        "study-a": ("a-h200", curves("a")),
        "study-a-seed-20": ("a-h200-seed-20", curves("a")),
        "study-b": ("b-64", curves("b")),
        "study-c": ("c", curves("c")),
        "label-noise": ("label-noise", curves("label-noise")),
        "methods": ("methods", accuracy_and_cost),
        "sharpness": (
            "sharpness",
            lambda folder: sharpness_and_accuracy(load(str(STUDIES / "sharpness.yaml")), read(folder)),
        ),
    }


def digest(folder: Path) -> str:
    """Of all stored results in a folder."""
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.csv")))
    return hashlib.sha256(content).hexdigest()


def is_current(name: str, folder: Path) -> bool:
    """Whether a figure was drawn from these results; its bytes depend on the version of matplotlib, too."""
    path = FIGURES / f"{name}.png"
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get("Source") == digest(folder)


def rewritten(page: str, sections: dict[str, Callable[[], str]]) -> str:
    """A page with each section between its two marks made anew."""
    text = (ROOT / page).read_text()
    for name, make in sections.items():
        begin, end = f"<!-- {name}: by notebooks/regenerate.py -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{page} has no section between {begin.strip()} and {end}.")
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page or figure would change")
    parser.add_argument("--no-notebooks", action="store_true", help="make pages and figures only")
    options = parser.parse_args()
    pages = {page: rewritten(page, sections) for page, sections in SECTIONS.items()}
    old = [page for page, text in pages.items() if text != (ROOT / page).read_text()]
    drawn = {name: (HERE / "results" / folder, draw) for name, (folder, draw) in figures().items()}
    old += [f"notebooks/figures/{name}.png" for name, (folder, _) in drawn.items() if not is_current(name, folder)]
    if options.check:
        sys.exit(f"not what `python notebooks/regenerate.py` makes of the results: {', '.join(old)}." if old else 0)
    for page, text in pages.items():
        (ROOT / page).write_text(text)
    FIGURES.mkdir(exist_ok=True)
    for name, (folder, draw) in drawn.items():
        with rc_context(STYLE):
            draw(folder).savefig(FIGURES / f"{name}.png", dpi=130, metadata={"Source": digest(folder)})
    if not options.no_notebooks:
        notebooks = [str(path) for path in sorted(HERE.glob("*.ipynb"))]
        sys.exit(subprocess.call([sys.executable, "-m", "pytest", "--nbmake", "--overwrite", *notebooks], cwd=ROOT))


if __name__ == "__main__":
    main()
