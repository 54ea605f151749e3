"""Checks of options: an error names the option, what is allowed, and what came."""

import math
from numbers import Real
from typing import Any


def check_non_negative(name: str, value: float) -> float:
    """`value` if it is a finite number of at least 0, else a ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")
    return float(value)


def check_integer(name: str, value: Any, least: int = 1, note: str = "") -> int:
    """`value` if it is an integer of at least `least`, else a ValueError, with a note behind what is allowed."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}{note}, got {value!r}.")
    return value
