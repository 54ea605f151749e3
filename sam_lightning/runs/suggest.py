"""The nearest of the names that exist, for messages about one that does not."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean NAME?` for the name most like `word`, else an empty text.

    Case does not count, and a dotted name is also found by its last part.

    Args:
        word: What came.
        names: What is allowed.
        cutoff: How alike they must be, from 0 to 1.
    """
    by_key: dict[str, str] = {}
    for name in names:
        by_key.setdefault(name.lower(), name)
    for name in list(by_key.values()):
        by_key.setdefault(name.rpartition(".")[2].lower(), name)
    for key in dict.fromkeys((word.lower(), word.rpartition(".")[2].lower())):
        near = difflib.get_close_matches(key, by_key, n=1, cutoff=cutoff)
        if near:
            return f"; did you mean {by_key[near[0]]}?"
    return ""
