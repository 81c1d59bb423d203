"""Checks of arguments that several layers share."""

import operator
from typing import Any


def positive_integer(name: str, value: Any) -> int:
    """The value as an `int`, or a `ValueError` that names the argument."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number <= 0:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return number
