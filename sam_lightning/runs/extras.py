"""Packages that a part of this one needs and the others do without."""

from importlib.util import find_spec


class MissingExtraError(ImportError):
    """A package of an extra is needed and not installed."""


def require(extra: str, who: str, *packages: str) -> None:
    """Asks for packages before they are imported.

    Args:
        extra: The extra that installs them, a key of `[project.optional-dependencies]`.
        who: What needs them, as the message names it.
        packages: Their import names.

    Raises:
        MissingExtraError: If one is not there; the message says how to install it.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{who} needs {', '.join(missing)}, not installed here. Run: pip install 'sam-lightning[{extra}]'"
        )
