"""Checks of arguments that several parts of the package share."""

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np


def positive_integer(name: str, value: Any) -> int:
    """The value as an `int`, or a `ValueError` that names the argument."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number <= 0:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return number


def generator(seed: int, name: str) -> np.random.Generator:
    """A random generator of its own for each function that is named.

    People give one seed to all of them, and to the generator of their data. From one stream, what a test draws would
    depend on the attribution or the data that it tests.
    """
    return np.random.default_rng([*name.encode(), seed])


def checked_names(feature_names: Any) -> list[str]:
    """The names of features as a list, or a `ValueError` that says what is wrong with them."""
    is_sequence = isinstance(feature_names, Iterable) and not isinstance(feature_names, str | set | frozenset)
    names = list(feature_names) if is_sequence else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`feature_names` must be a list of strings, one per feature. Received: {feature_names!r}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"`feature_names` must differ from each other. Received more than once: {repeated}")
    return [str(name) for name in names]  # NumPy's strings are no JSON


def checked_level(level: float) -> None:
    if not 0 < level < 0.5:
        raise ValueError(f"`level` must be a number between 0 and 0.5. Received: level={level!r}")
