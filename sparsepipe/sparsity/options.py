"""Checks of the options that methods, targets and patterns take: each failure names the option and what is allowed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from sparsepipe.errors import RecipeError


def number(name: str, value: Any, *, low: float = 0.0, high: float = math.inf, below: bool = False) -> float:
    """`value` as a float in [low, high], or in [low, high) with `below`; never infinite.

    Raises:
        RecipeError: not a finite number, or outside of the range.
    """
    valid = isinstance(value, Real) and not isinstance(value, bool)
    if valid and not isinstance(value, int):  # an int may be too large for a float
        value = float(value)
    if not valid or not low <= value <= min(high, sys.float_info.max) or (below and value == high):
        closing = ")" if below or high == math.inf else "]"
        raise RecipeError(f"'{name}' must be a number in [{low:g}, {high:g}{closing}, not {value!r}.")
    return float(value)


def positive(name: str, value: Any) -> float:
    """`value` as a float greater than zero.

    Raises:
        RecipeError: not a number, or not above zero.
    """
    if number(name, value) == 0:
        raise RecipeError(f"'{name}' must be greater than 0.")
    return float(value)


def count(name: str, value: Any) -> int:
    """`value` as an integer of at least 1.

    Raises:
        RecipeError: not an integer, or below 1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"'{name}' must be an integer of at least 1, not {value!r}.")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """`value` as a bool.

    Raises:
        RecipeError: anything but true or false.
    """
    if not isinstance(value, bool):
        raise RecipeError(f"'{name}' must be true or false, not {value!r}.")
    return value


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """`value`, one of the words `allowed`.

    Raises:
        RecipeError: any other value.
    """
    words = list(allowed)
    if value not in words:
        raise RecipeError(f"'{name}' must be one of {', '.join(words)}; not {value!r}.")
    return str(value)
