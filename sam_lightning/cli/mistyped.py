"""What was mistyped: jsonargparse's message, of up to twenty lines, as one about the option that is meant."""

import importlib
import itertools
import re
from collections.abc import Mapping, Sequence

from jsonargparse import ArgumentParser

from sam_lightning.cli.setting_sources import Typed, typed, unreadable_file
from sam_lightning.runs.configs import ENDINGS, no_such_file
from sam_lightning.runs.suggest import did_you_mean

# Where the classes are that people name.
_MODULES = (
    "sam_lightning",
    "sam_lightning.models",
    "sam_lightning.data",
    "sam_lightning.callbacks",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)
_KEY = re.compile(r'Parser key "([^"]+)":')
_LEAF = re.compile(
    r"Option '(?P<option>[^']+)' is not accepted"
    r"|unrecognized arguments: --(?P<nested>[\w.]+)="
    r"|module '(?P<module>\S+)' has no attribute '(?P<attribute>\w+)'"
    r"|No module named '(?P<missing>\S+)'"
    r"|(?:Expected a dot import path string|Unexpected import path format): (?P<name>\S+)"
    r"|arguments are required: (?P<required>[\w.]*\w(?:, [\w.]*\w)*)"
    r"|Expected an? (?P<type>[^\n]+)"
)
# What stands between a key and what is wrong with its value.
_FRAME = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|- Expected a path but .*"
    r"|(- )?Problem with given class_path .*|Type .* expects a function or a callable class: "
)
_TYPE = re.compile(
    r"Expected an? (?!path but)(?:<class '([\w.]+)'>|(?:typing\.)?Literal\[(.*?)\]|([^\n]+?))(?:\.? Got|\n|$)"
)


def what_is_mistyped(text: str, words: Sequence[str], parsers: Mapping[str, ArgumentParser]) -> str:
    """One message: the option or the file's key, what came, and what is allowed or the nearest name.

    Args:
        text: jsonargparse's message.
        words: The command.
        parsers: The parser of each command.
    """
    parser = parsers.get(words[0]) if words else None
    if found := re.search(r"invalid choice: '([^']*)'", text):
        return f"{found[1]} is no command{did_you_mean(found[1], parsers) or f': give one of {_list(parsers)}.'}"
    if parser is None or "to be one of" in text:
        return f"the first word must be a command: {_list(parsers)}."
    if found := re.match(r"unrecognized arguments: (.*)", text, re.DOTALL):
        return _unknown(next((word for word in found[1].split() if word.startswith("-")), found[1]), parser)
    if found := re.match(r"argument (\S+): expected", text):
        return f"{found[1].rpartition('/')[2]} needs a value."
    if found := re.search(r"does not accept option '([^']+)'", text):
        at = typed(found[1], words)
        return _unknown(f"--{found[1]}", parser, at)
    if found := re.search(r"File does not exist: '([^']+)'", text):
        name = next((word for word in words if word and found[1].endswith(word)), found[1])
        return f"--config: {no_such_file(name)}"
    if re.match(r"(the following )?arguments are required", text):
        missing = " and ".join(f"--{key.partition('.')[2]}" for key in re.findall(r"[\w.]+\.[\w.]+", text))
        return f"{missing} must be given, or files that set them: -c base.yaml -c data/digits.yaml, for example."
    if _KEY.match(text):
        return _of_a_value(text, words)
    return unreadable_file(words) or _short(text)


def _unknown(option: str, parser: ArgumentParser, at: Typed | None = None) -> str:
    if not option.startswith("-"):
        return f"{option}: this word belongs to no option."
    option = option.partition("=")[0]
    known = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    root, dot, rest = option.partition(".")
    roots = {name.partition(".")[0] for name in known}
    if dot and root not in roots:  # the first part of the name is wrong
        near = did_you_mean(root, roots)
        near = near and f"{near[:-1]}.{rest}?"
    else:
        near = did_you_mean(option.removeprefix("--"), {name.removeprefix("--") for name in known})
        near = near.replace("mean ", "mean --")
    if at is not None and at.file:
        option, near = f"{at.file}: {option.removeprefix('--')}", near.replace("--", "")
    return f"{option}: there is no such option{near or f' (see sam-lightning {parser.subcommand} --help).'}"  # type: ignore[attr-defined]  # set by jsonargparse


def _of_a_value(text: str, words: Sequence[str]) -> str:
    """Of an option's value, or of an option of the class that is its value."""
    leaf = _LEAF.search(text, _KEY.match(text).end())  # type: ignore[union-attr]  # asked before
    while leaf and leaf["type"] and leaf["type"].startswith("path but"):
        leaf = _LEAF.search(text, leaf.end())
    if leaf is None:
        return _short(text)
    keys = list(_KEY.finditer(text, 0, leaf.start()))
    path = ".".join(key[1] for key in keys)
    if leaf["type"] and (other := _FRAME.sub("", text[keys[-1].end() : leaf.start()]).strip(" -\n")):
        return f"{typed(path, words)}: {_short(other)}"
    if option := leaf["option"] or leaf["nested"]:
        kind = _class_at(text, leaf)
        at = typed(f"{path}.{option}", words)
        near = did_you_mean(option, _options_of(kind))
        return f"{at}: {kind.rpartition('.')[2]} has no such option{near or _allowed(kind)}"
    if leaf["required"]:
        kind = _class_at(text, leaf)
        needs = [f"--{path}.{name}" for name in leaf["required"].strip().split(", ")]
        return f"{' and '.join(needs)} must be given: {kind.rpartition('.')[2]} has no default for it."
    if leaf["type"]:
        value = re.search(r"(?:Got value|Given value): ([^\n]*)", text[leaf.start() :])
        came = re.sub(r"\. Got value: .*", "", value[1]) if value else "another"
        return f"{typed(path, words, came)}: must be {_types(text, leaf.start())}, got {came}."
    return _no_class(path, leaf, text, words)


def _no_class(path: str, leaf: re.Match[str], text: str, words: Sequence[str]) -> str:
    """Of a class path, or a file's name, that leads nowhere."""
    value = leaf["name"] or (f"{leaf['module']}.{leaf['attribute']}" if leaf["module"] else "")
    if not value:
        named = re.search(r"Got value: (\S+?)\.?(?:\s|$)", text[leaf.end() :])
        given = re.findall(r"given class_path '([^']+)'", text[: leaf.start()])
        plain = named and not named[1].startswith("Namespace")
        value = named[1] if plain and named else given[-1] if given else leaf["missing"]
    at = typed(path, words, value)
    if value.endswith(ENDINGS):
        return f"{at}: {no_such_file(value)}"
    if leaf["missing"] and not f"{value}.".startswith(f"{leaf['missing']}."):
        return f"{at}: {value} cannot be imported: there is no module {leaf['missing']}."
    near = did_you_mean(value, _classes(), cutoff=0.75)
    why = f"there is no module {leaf['missing']}" if leaf["missing"] else "there is no such class"
    return f"{at}: {value}: {why}{near or '. Give its path, such as my_module.MyClass, or a file.'}"


def _class_at(text: str, leaf: re.Match[str]) -> str:
    """The class whose option is meant: named behind the fault for factories, before it for objects."""
    line = text[leaf.end() :].partition("\n")[0]
    behind = re.search(r"class_path='([^']+)'", line)
    before = re.findall(r"given class_path '([^']+)'", text[: leaf.start()])
    return behind[1] if behind else before[-1] if before else "it"


def _options_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    kind = getattr(importlib.import_module(module), name) if module else None
    add = parser.add_class_arguments if isinstance(kind, type) else parser.add_function_arguments
    return list(add(kind, fail_untyped=False)) if kind else []


def _allowed(class_path: str) -> str:
    options = _options_of(class_path)
    return f". It has {_list(options)}." if 0 < len(options) <= 12 else "."


def _classes() -> list[str]:
    return [
        f"{module}.{name}"
        for module in _MODULES
        for name, value in vars(importlib.import_module(module)).items()
        if callable(value) and not name.startswith("_")
    ]


def _types(text: str, start: int) -> str:
    """`int, float or null`: the type that is named at `start`, or those of the list that begins there."""
    first, *others = text[start:].splitlines()
    item = text[:start].rpartition("\n")[2] + "Expected a"  # how the list's other lines begin
    lines = [first, *itertools.takewhile(lambda line: "- " in item and line.startswith(item), others)]
    names = {"NoneType": "null", "str": "text", "bool": "true, false"}
    found: dict[str, None] = {}
    for kind, literal, other in (match for line in lines for match in _TYPE.findall(line)):
        words = literal.replace("'", "").split(", ") if literal else [kind.rpartition(".")[2] or other]
        found.update(dict.fromkeys(names.get(word, word) for word in words))
    allowed = list(found)
    return allowed[0] if len(allowed) == 1 else f"{', '.join(allowed[:-1])} or {allowed[-1]}"


def _list(names: Mapping[str, object] | Sequence[str]) -> str:
    return ", ".join(names)


def _short(text: str) -> str:
    """At most four lines of a message of another kind."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(line[:300] for line in lines[:4])
