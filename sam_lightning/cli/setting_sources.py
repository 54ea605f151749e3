"""Where a setting was given: on the command line, or in which file."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sam_lightning.runs.configs import ENDINGS


@dataclass(frozen=True)
class Typed:
    """A setting as it was given.

    Args:
        name: Its dotted name, as in the command or the file.
        value: What was given.
        file: The file; empty for the command line.
    """

    name: str
    value: Any = None
    file: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.name}" if self.file else f"--{self.name}"


def typed(path: str, words: Sequence[str], value: str | None = None) -> Typed:
    """The setting that is meant by a dotted name without `init_args`; one with this value first.

    The command line goes before files, a later word before an earlier one.
    """
    found = [setting for setting in _settings(words) if _plain(setting.name) == _plain(path)]
    found.sort(key=lambda setting: (value is not None and str(setting.value) == value, not setting.file))
    return found[-1] if found else Typed(path)


def unreadable_file(words: Sequence[str]) -> str:
    """What is wrong with the first file of the command that is no YAML mapping; empty if all are."""
    for _, path in _files(words):
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f" in line {mark.line + 1}" if mark else ""
            return f"{path}: no valid YAML{where}: {getattr(error, 'problem', None) or error}."
        if not isinstance(content, dict):
            return f"{path}: must hold settings by name, got {type(content).__name__}."
    return ""


def with_contents(words: Sequence[str]) -> list[str]:
    """The command with an option's file replaced by what is in it; configurations stay."""
    files = {path for option, path in _files(words) if option}
    return [json.dumps(yaml.safe_load(Path(word).read_text())) if word in files else word for word in words]


def _settings(words: Sequence[str]) -> Iterator[Typed]:
    for option, value in _options(words):
        if option:
            yield Typed(option, value)
    for option, path in _files(words):
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        for name, value in _leaves(content):
            yield Typed(f"{option}.{name}" if option else name, value, path)


def _files(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, file) of each value that is one."""
    for option, value in _options(words):
        if (not option or value.endswith(ENDINGS)) and len(value) < 255 and Path(value).is_file():
            yield option, value


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, value); the option is empty for a configuration."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-"):
            option, equals, value = word.partition("=")
            name = option.lstrip("-")
            yield "" if name in ("c", "config") else name, value if equals else following


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key, inner ones included; a list's entries have the list's name."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield f"{prefix}{key}", value
            yield from _leaves(value, f"{prefix}{key}.")
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, prefix)


def _plain(name: str) -> str:
    """A name without what may be left out: `init_args`, `dict_kwargs`, `class_path`, the `+` of an appended list."""
    return re.sub(r"\.(init_args|dict_kwargs)(?=\.|$)|\.class_path$|\+", "", name)
