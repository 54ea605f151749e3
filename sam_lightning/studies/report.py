"""Writes a study's tables and figures, and says what came out."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from sam_lightning.runs.atomic_files import replacing
from sam_lightning.runs.figure_files import save
from sam_lightning.studies import results as stored
from sam_lightning.studies.conclusions import conclusions
from sam_lightning.studies.figures import draw
from sam_lightning.studies.results import Results, missing
from sam_lightning.studies.runs import directory_of
from sam_lightning.studies.spec import Study, StudyError
from sam_lightning.studies.tables import tables


def publish(study: Study, root: Path, source: Path | None = None, output: Path | None = None) -> None:
    """Writes `report.md`, tables as CSV and LaTeX, figures as PNG and PDF and for TensorBoard, and the results.

    Args:
        study: The study.
        root: Where its runs are.
        source: A folder with the CSV files of a report, read instead of the runs.
        output: Where to write; by default the study's directory.

    Raises:
        StudyError: If there are no results yet.
    """
    results = stored.read(source) if source else stored.collect(study, root)
    absent = missing(study, results)
    if results.runs.empty:
        settings = "".join(f" --{key} {value}" for key, value in study.overrides.items())
        raise StudyError(
            f"{study.path}: none of its {len(absent)} runs in {root} is finished: study run {study.path}{settings} "
            "(settings that runs were made with belong to their report, too)."
        )
    folder = output or directory_of(study, root)
    folder.mkdir(parents=True, exist_ok=True)
    stored.write(results, folder)
    made, figures = tables(study, results), draw(study, results)
    for name, (caption, numbers, text) in made.items():
        with replacing(folder / f"{name}.csv") as draft:
            numbers.to_csv(draft, index=False)
        with replacing(folder / f"{name}.tex") as draft:
            draft.write_text(_latex(text, caption))
    for name, figure in figures.items():
        save(figure, folder / name)
    with replacing(folder / "report.md") as draft:
        draft.write_text(markdown(study, results, figures))
    _to_tensorboard(figures, folder, len(results.runs))
    print("", *_head(study, results), *_tables(study, results), "", sep="\n\n")
    if not source:
        print(f"{'runs':<15}{folder / 'runs'}: log, checkpoints/ and TensorBoard's files of each")
    print(f"{'report':<15}{folder / 'report.md'}")
    print(f"{'figures':<15}{', '.join(str(folder / f'{name}.png') for name in figures)}")
    print(f"{'tensorboard':<15}tensorboard --host 127.0.0.1 --logdir '{folder}'")
    print("", *conclusions(study, results), sep="\n", flush=True)


def markdown(study: Study, results: Results, figures: dict[str, Figure]) -> str:
    """The report as one page."""
    words = "\n".join(f"- {sentence}" for sentence in conclusions(study, results))
    parts = [*_head(study, results), words, *_tables(study, results), *(f"![{name}]({name}.png)" for name in figures)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(study: Study, results: Results) -> list[str]:
    return [f"# {study.path.stem}", study.question, _status(results, missing(study, results))]


def _tables(study: Study, results: Results) -> list[str]:
    parts = []
    for caption, _, text in tables(study, results).values():
        parts += [caption, text.to_markdown(index=False, disable_numparse=True)]
    if study.reference:
        epochs = sorted({row["epochs"] for row in study.reference})
        parts.append(
            f"Published: {study.source}, after {' or '.join(map(str, epochs))} epochs; compared only with runs as long."
        )
    return parts


def _status(results: Results, absent: list[str]) -> str:
    """What is there, what is not, and under which conditions the numbers came about."""
    runs = results.runs
    lines = [f"{len(runs)} of {len(runs) + len(absent)} runs, mean ± standard deviation over seeds."]
    if absent:
        lines.append(f"Missing: {'; '.join(absent)}.")
    columns = ["device", "threads", "precision", "torch", "lightning", "sam_lightning", "commit"]
    for values, group in runs.assign(commit=runs.commit.astype(object).fillna("unknown")).groupby(columns, sort=False):
        named = dict(zip(columns, values, strict=True))
        lines.append(
            f"{len(group)} runs on {named['device']} ({named['threads']} threads each), {named['precision']}, "
            f"torch {named['torch']}, lightning {named['lightning']}, sam_lightning {named['sam_lightning']} "
            f"({named['commit']}), {group.seconds.sum() / 60:.1f} minutes of training."
        )
    return "\n".join(lines)


def _latex(text: pd.DataFrame, caption: str) -> str:
    table: str = text.to_latex(index=False, escape=True, caption=caption.replace("%", r"\%"))
    return table.replace("±", r"$\pm$")


def _to_tensorboard(figures: dict[str, Figure], folder: Path, step: int) -> None:
    for old in folder.glob("events.out.tfevents.*"):  # each report stands for itself
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            writer.add_figure(name, figure, global_step=step, close=False)
