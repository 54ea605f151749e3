"""The configuration files that come with the package: found by name from any folder."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import sam_lightning
from sam_lightning.runs.suggest import did_you_mean

ENDINGS = (".yaml", ".yml")


class ConfigFileError(ValueError):
    """A configuration file that does not exist, or one that is not to be written over."""


def folder() -> Path:
    """Where they are: in the installed package, or in the checkout that the package is imported from."""
    package = Path(sam_lightning.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Their paths within the folder, such as `data/digits.yaml`."""
    return sorted(path.relative_to(folder()).as_posix() for path in folder().rglob("*.yaml"))


def first_comment(name: str) -> str:
    """What a file says about itself in its first line."""
    with (folder() / name).open() as file:
        line = file.readline()
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def packaged(name: str, beside: str = "") -> Path | None:
    """The packaged file of this name; `beside` is a packaged folder that the name may also be relative to."""
    if Path(name).is_absolute():
        return None
    paths = [Path(os.path.normpath(folder() / under / name)) for under in (beside, "")]
    return next((path for path in paths if path.is_file()), None)


def find(name: str) -> Path | None:
    """The file that `name` means: a local file first, then a packaged one."""
    return Path(name) if Path(name).is_file() else packaged(name)


def no_such_file(name: str) -> str:
    """What to say of a name that is neither a local file nor a packaged one."""
    known = [*names(), *(path.name for path in Path().glob("*.yaml"))]
    near = did_you_mean(name.removesuffix(".yaml"), [path.removesuffix(".yaml") for path in known])
    said = near.replace("?", ".yaml?") or ", neither here nor among those that `sam-lightning configs` lists."
    return f"no such file: {name}{said}"


def as_typed(path: Path) -> str:
    """A short word that means this file here: for a packaged one its name, unless a local file has that name."""
    relative, whole = os.path.relpath(path), path.resolve()
    if not relative.startswith("..") or not whole.is_relative_to(folder().resolve()):
        return relative
    name = whole.relative_to(folder().resolve()).as_posix()
    return str(whole) if Path(name).exists() else name


def with_packaged_files(words: Sequence[str]) -> list[str]:
    """A command's words, in which names of packaged files have become paths; those of local files stay."""
    found = []
    for word in words:
        option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
        path = find(value) if value.endswith(ENDINGS) else None
        found.append(f"{option}{equals}{path}" if path is not None else word)
    return found


def copy_to(target: Path) -> None:
    """Copies them into `target`, to be edited there.

    Raises:
        ConfigFileError: If one of them is there already; nothing is copied then.
    """
    there = [name for name in names() if (target / name).exists()]
    if there:
        raise ConfigFileError(
            f"{target} has {there[0]}{f' and {len(there) - 1} more of them' if there[1:] else ''} already: name a new "
            "folder. Nothing was copied."
        )
    for name in names():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder() / name, target / name)
