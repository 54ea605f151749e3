"""A run's settings, and where two runs differ in what they train."""

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# Where data lie and how they are read does not change what is trained.
FREE_OF_CONSEQUENCE = {"root", "num_workers", "download", "eval_batch_size"}
# Of the trainer's settings, those that change what is trained or which epoch is the best; `null` means this.
_OF_THE_TRAINER = {
    "precision": "32-true",
    "limit_train_batches": None,
    "limit_val_batches": None,
    "overfit_batches": 0.0,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "accumulate_grad_batches": 1,
}


def differences_to_checkpoint(
    checkpoint: Mapping[str, Any], config: Mapping[str, Any], run_config: Path
) -> list[tuple[str, Any, Any]]:
    """(setting, in the checkpoint, here) of each that differs and changes what is trained.

    Args:
        checkpoint: Content of the checkpoint, which knows its model and data.
        config: The command's configuration.
        run_config: The configuration file of the checkpoint's run, if there is one.
    """
    there = settings(yaml.safe_load(run_config.read_text())) if run_config.is_file() else {}
    for key, saved in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        there.pop(key, None)
        if checkpoint.get(saved):
            there[key] = checkpoint[saved]
    return differences(there, {key: value for key, value in settings(config).items() if key in there})


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration, what changes the training: model, data, seed, and a part of the trainer's."""
    trainer = config.get("trainer") or {}
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    sharp = [hparams_of(c) for c in callbacks if c["class_path"].rpartition(".")[2] == "SharpnessAwareTraining"]
    used = {key: usual if trainer.get(key) is None else trainer[key] for key, usual in _OF_THE_TRAINER.items()}
    return {
        "model": hparams_of(config.get("model")),
        "data": hparams_of(config.get("data")),
        "seed_everything": config.get("seed_everything"),
        "trainer": {**used, "callbacks": sharp[0] if sharp else {}},
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(setting, there, here) of each that differs; `not set` for one that is missing and has no default.

    A run that was written before a class gained an option has trained with what is now its default.
    """
    named = {**dict(flatten(there)), **dict(flatten(here))}
    a, b = dict(flatten(_with_defaults(there))), dict(flatten(_with_defaults(here)))
    return [
        (key, a.get(key, "not set"), b.get(key, "not set"))
        for key in sorted(named)
        if a.get(key) != b.get(key) and key.rpartition(".")[2] not in FREE_OF_CONSEQUENCE
    ]


def _with_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the defaults of its classes where it says nothing."""
    filled = {key: _with_defaults(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    if "_class_path" in tree:
        return {**_defaults(tree["_class_path"]), **filled}
    if "class_path" in tree:
        return {**filled, "init_args": {**_defaults(tree["class_path"]), **(filled.get("init_args") or {})}}
    return filled


def _defaults(class_path: str) -> dict[str, Any]:
    """A class's options with plain defaults; nothing is imported, since a checkpoint may name anything."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    found: dict[str, Any] = {}
    for base in inspect.getmro(cls) if inspect.isclass(cls) else ():
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        for parameter in parameters:
            if parameter.default is None or isinstance(parameter.default, (bool, int, float, str)):
                found.setdefault(parameter.name, parameter.default)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break  # it hands no options on
    return found


def as_text(found: Sequence[tuple[str, Any, Any]], where: str) -> str:
    """Differences for people: a line each, or all in one line if there are more than three."""
    said = [f"{key}: {_word(there)} {where}, {_word(here)} here" for key, there, here in found]
    return "\n".join(f"  {line}" for line in said) if len(said) <= 3 else f"  {'; '.join(said)}"


def _word(value: Any) -> str:
    """A value as a configuration file has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def hparams_of(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """A configured class as one flat dictionary, in Lightning's own form for checkpoints."""
    if not config:
        return {}
    return {"_class_path": config["class_path"], **config.get("init_args", {}), **config.get("dict_kwargs", {})}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf, without Lightning's note on how to rebuild a module."""
    for key, value in tree.items():
        if key == "_instantiator":
            continue
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
