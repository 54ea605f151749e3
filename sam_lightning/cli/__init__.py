"""The command line: `sam-lightning fit | validate | test | predict | sharpness | landscape`."""

from sam_lightning.cli.command import CLI, main

__all__ = ["CLI", "main"]
