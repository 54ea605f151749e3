"""`python -m sam_lightning`, the same as the command `sam-lightning`."""

import os
import sys


def main() -> None:
    """Runs the command line's words."""
    sys.path.append(os.getcwd())  # --model my_file.MyModule, as python -m finds it
    if sys.argv[1:2] == ["study"]:  # apart from the others, whose imports take seconds
        from sam_lightning.studies import command

        sys.exit(command.main(sys.argv[2:]))
    from sam_lightning import cli

    cli.main()


if __name__ == "__main__":
    main()
