"""Python objects among a configuration's values: the defaults of somebody's own class, which no file can hold."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from sam_lightning.cli.messages import SettingsError
from sam_lightning.runs.settings import flatten

_NOT_WRITABLE = "Unable to serialize instance"  # what jsonargparse writes instead


def without_partials(config: Namespace, parser: ArgumentParser) -> Namespace:
    """The configuration, in which each `partial` of a class is written as its `class_path` and `init_args`."""
    tree = _as_class_paths(config)
    return config if tree == config else parser.parse_object(tree)  # which adds the classes' other defaults


def _as_class_paths(value: Any) -> Any:
    if isinstance(value, Namespace):
        return _namespace({key: _as_class_paths(entry) for key, entry in vars(value).items()})
    if isinstance(value, partial) and isinstance(value.func, type) and not value.args:
        arguments = {key: _as_class_paths(entry) for key, entry in value.keywords.items()}
        path = f"{value.func.__module__}.{value.func.__qualname__}"
        return _namespace({"class_path": path, "init_args": _namespace(arguments)})
    return value


def _namespace(entries: dict[str, Any]) -> Namespace:
    return Namespace(entries)  # type: ignore[no-untyped-call]  # jsonargparse gives no types


def refuse_objects(config: Mapping[str, Any]) -> None:
    """Refuses a configuration that could not be read back, before anything is trained with it.

    Raises:
        SettingsError: With the option that must be given.
    """
    for key, value in flatten(config):
        if isinstance(value, str) and value.startswith(_NOT_WRITABLE):
            raise SettingsError(
                f"--{key.replace('.init_args', '')}: the default is a Python object that the run's config.yaml cannot "
                "hold. Give the option, as a class path or a file."
            )
