"""`sam-lightning study run | report`."""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sam_lightning.runs.extras import MissingExtraError, require
from sam_lightning.runs.suggest import did_you_mean
from sam_lightning.studies.spec import StudyError, load

_SETTINGS = (
    "--a.setting VALUE, such as --trainer.max_epochs 10, changes every run of the study; with other settings it is "
    "another study, with a directory of its own."
)


def main(args: Sequence[str]) -> int:
    """Runs one command.

    Args:
        args: The words behind `sam-lightning study`.

    Returns:
        The process's exit code.
    """
    try:
        words, overrides = _split(args)
        options = _parser().parse_args(words)
        require("studies", "sam-lightning study", "pandas", "scipy", "tabulate", "matplotlib")
        study = load(options.study, overrides)
        # What is imported only now takes a second, which a mistyped command need not wait for.
        if options.command == "report":
            from sam_lightning.studies.report import publish

            publish(study, options.root, options.results, options.output)
            return 0
        from sam_lightning.studies.launch import launch

        return launch(study, options)
    except (StudyError, MissingExtraError) as error:
        sys.exit(f"sam-lightning: error: {error}")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest name."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses what it does not know here, where the command's own options are known."""
        options, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            if not word.startswith("-"):
                self.error(f"{word} is too much.")
            known = [name for action in self._actions for name in action.option_strings]
            self.error(f"{word}: there is no such option{did_you_mean(word, known) or f'. It has {_list(known)}.'}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Raises a StudyError instead of printing the usage."""
        name = self.prog.removeprefix("sam-lightning ")
        if "required: study" in message:
            message = "needs a study: a file or one of the packaged ones, which `sam-lightning configs` lists."
        elif "required: run" in message:
            message = "needs a command: run or report."
        elif found := re.match(r"argument (\S+): invalid choice: '([^']*)'", message):
            names = ((action, (action.metavar, *action.option_strings)) for action in self._actions)
            choices = next(action.choices for action, its in names if found[1] in its)
            if found[1].startswith("-"):
                message = f"{found[1]}: must be {' or '.join(choices or ())}, got {found[2]}."
            else:
                near = did_you_mean(found[2], choices or ())
                message = f"{found[2]}: there is no such command{near or f': give {_list(choices)}.'}"
        else:
            message = message.removeprefix("argument ").replace("expected one argument", "needs a value.")
        raise StudyError(f"{name} {message}")


def _list(names: Iterable[str] | None) -> str:
    return ", ".join(names or ())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sam-lightning study", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|report")
    run = commands.add_parser("run", help="execute what is missing of a study, then report")
    report = commands.add_parser("report", help="tables and figures of what is there")
    for command in (run, report):
        command.allow_abbrev = False
        command.epilog = _SETTINGS
        command.add_argument("study", help="a study file, or the name of a packaged study, such as quickstart")
        command.add_argument("--root", type=Path, default=Path("runs"), help="where runs are written (default: runs)")
    run.add_argument("--dry-run", action="store_true", help="print each run's commands; train nothing")
    run.add_argument("--only", action="append", default=[], metavar="KEY=VALUE,...", help="a part: arm, seed, grid key")
    run.add_argument("--jobs", type=_positive, help="runs at once (default: what the GPUs, else the CPU's cores allow)")
    run.add_argument("--jobs-per-device", type=_positive, default=1, help="runs at once on each GPU (default: 1)")
    run.add_argument("--threads", type=_positive, default=1, help="CPU threads of each run (default: 1)")
    run.add_argument("--launcher", choices=["local", "slurm"], default="local", help="who executes (default: local)")
    run.add_argument("--slurm", type=Path, metavar="FILE", help="YAML of SLURM options: partition, time, gpus, ...")
    report.add_argument("--results", type=Path, metavar="DIR", help="a report's CSV files, read instead of the runs")
    report.add_argument("--output", type=Path, metavar="DIR", help="for tables and figures (default: ROOT/STUDY)")
    return parser


def _positive(word: str) -> int:
    if not word.isdigit() or word == "0":
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {word}")
    return int(word)


def _split(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command's own words, and the settings among them: `--a.setting VALUE` or `--a.setting=VALUE`."""
    words, overrides = [], {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if not key.startswith("--") or "." not in key:
            words.append(word)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise StudyError(f"{key} needs a value.")
            value = rest.pop(0)
        overrides[key[2:]] = value
    return words, overrides
