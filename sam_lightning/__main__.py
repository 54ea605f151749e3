"""`python -m sam_lightning`, the same as the command `sam-lightning`."""

import os
import sys

from sam_lightning import cli


def main() -> None:
    """Runs the command line's words; what a script's entry point returns would become its exit code."""
    sys.path.append(os.getcwd())  # --model my_file.MyModule, as python -m finds it
    cli.main()


if __name__ == "__main__":
    main()
