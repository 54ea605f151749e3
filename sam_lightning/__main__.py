"""`python -m sam_lightning`, the same as the command `sam-lightning`.

Only the commands that build a model import Lightning, which takes seconds.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sam_lightning.runs import configs
from sam_lightning.runs.suggest import did_you_mean

COMMANDS = {
    "fit": "train a model",
    "validate": "evaluate a run's checkpoint on the validation data",
    "test": "evaluate a run's checkpoint on the test data",
    "predict": "save a run's predictions",
    "sharpness": "measure how sharp the training loss is at a run's weights",
    "landscape": "draw the training loss around a run's weights",
    "study": "compare optimizers: many runs and their report",
    "configs": "list the packaged configuration files, or copy them",
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line's words.

    Args:
        args: `None`: those of the process.

    Raises:
        SystemExit: With a message, or a code other than 0, if the command fails.
    """
    try:
        try:
            _run(list(sys.argv[1:] if args is None else args))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        sys.exit(1)


def _is_unread() -> bool:
    """Whether nobody reads what is printed any more, as behind `| head`; if so, the rest goes nowhere."""
    try:
        print(flush=True)  # what failed to be printed is no longer there to be flushed
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _run(words: list[str]) -> None:
    sys.path.append(os.getcwd())  # --model my_file.MyModule, as python -m finds it
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        print(_help())
    elif first == "study":
        from sam_lightning.studies import command

        sys.exit(command.main(words[1:]))
    elif first == "configs":
        _configs(words[1:])
    elif first in COMMANDS or first.startswith("-"):
        from sam_lightning import cli

        cli.main(words)
    else:
        near = did_you_mean(first, COMMANDS) or f": give one of {', '.join(COMMANDS)}."
        sys.exit(f"sam-lightning: error: {first} is no command{near}")


def _help() -> str:
    lines = ["usage: sam-lightning COMMAND ...", "", "Sharpness-aware minimization from the command line.", ""]
    lines += [f"  {name:<11}{what}" for name, what in COMMANDS.items()]
    return "\n".join([*lines, "", "Options of each: sam-lightning COMMAND --help"])


def _configs(words: list[str]) -> None:
    """`configs` lists the packaged files, `configs copy DIR` copies them."""
    if not words:
        for name in configs.names():
            print(f"{name:<36}{configs.first_comment(name)}".rstrip())
    elif words[0] == "copy" and len(words) == 2 and not words[1].startswith("-"):
        try:
            configs.copy_to(Path(words[1]))
        except (configs.ConfigFileError, OSError) as error:
            sys.exit(f"sam-lightning: error: {error}")
        print(f"{len(configs.names())} files copied into {words[1]}")
    elif words in (["-h"], ["--help"]):
        print("usage: sam-lightning configs             list the packaged configuration files")
        print("       sam-lightning configs copy DIR    copy them into DIR, to be edited there")
    else:
        sys.exit(
            f"sam-lightning: error: configs {' '.join(words)}: give `configs` alone, which lists the packaged files, "
            "or `configs copy DIR`."
        )


if __name__ == "__main__":
    main()
