"""A command's words, parsed; what is wrong with them is one short message."""

from collections.abc import Mapping, Sequence

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from sam_lightning.cli.messages import SettingsError
from sam_lightning.cli.mistyped import what_is_mistyped
from sam_lightning.cli.setting_sources import with_contents


def parse(parser: ArgumentParser, words: Sequence[str], commands: Mapping[str, ArgumentParser]) -> Namespace:
    """The command's configuration.

    Args:
        parser: Of the whole command line.
        words: What was typed.
        commands: The parser of each command.

    Raises:
        SettingsError: With the option that is wrong, and what is allowed.
    """
    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        text = str(error)
    if "Config file loop detected" in text:  # jsonargparse's word for an option's file that has an error in it
        try:
            parser.parse_args(with_contents(words))
        except ArgumentError as error:
            text = str(error)
    raise SettingsError(what_is_mistyped(text, words, commands))
