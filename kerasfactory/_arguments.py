"""Checks of arguments that several parts of the package share."""

import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def positive_integer(name: str, value: Any) -> int:
    """The value as an `int`, or a `ValueError` that names the argument."""
    number = _integer(value)
    if number is None or number <= 0:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return number


def checked_seed(seed: Any) -> int:
    """The seed as an `int` of at least 0, or a `ValueError`."""
    number = _integer(seed)
    if number is None or number < 0:
        raise ValueError(
            f"`seed` must be an integer, at least 0. Received: seed={seed!r}. The same seed gives the same result: "
            "keep the default, or choose another integer, such as seed=1."
        )
    return number


def checked_level(level: Any) -> float:
    """The error level as a `float`, or a `ValueError` that explains how it differs from a confidence."""
    number = float(level) if isinstance(level, numbers.Real) else 0.0
    if not 0 < number < 0.5:
        raise ValueError(
            f"`level` must be a number between 0 and 0.5. Received: level={level!r}. `level` is an error level: 0.05 "
            "gives 95% intervals."
        )
    return number


def generator(seed: int, name: str) -> np.random.Generator:
    """A random generator of its own for each function that is named.

    People give one seed to all of them, and to the generator of their data. From one stream, what a test draws would
    depend on the attribution or the data that it tests.
    """
    return np.random.default_rng([*name.encode(), checked_seed(seed)])


def _integer(value: Any) -> int | None:
    """The value as an `int`, NumPy's integers included; None for anything else, `bool` included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def hint_at_codes(array: np.ndarray) -> str:
    """How labels that are texts become numbers, if these are."""
    return " `pandas.factorize(y)[0]` makes numbers of texts." if array.dtype.kind in "OUST" else ""


def checked_names(feature_names: Any) -> list[str]:
    """The names of features as a list, or a `ValueError` that says what is wrong with them."""
    is_sequence = isinstance(feature_names, Iterable) and not isinstance(feature_names, str | set | frozenset)
    names = list(feature_names) if is_sequence else []
    if not names or not all(isinstance(name, str) for name in names):
        hint = " `[str(name) for name in feature_names]` makes strings of other names, such as dates." if names else ""
        if isinstance(feature_names, Mapping):
            hint = " For words by their ids, give the function `feature_names=words.get`."
        raise ValueError(
            f"`feature_names` must be a list of strings, one per feature.{hint} Received: {feature_names!r}"
        )
    ended = [name for name in names if name.endswith("\0")]
    if ended:
        raise ValueError(
            f"The names of features must not end in the character NUL, which NumPy drops. Received: {ended!r}"
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"`feature_names` must differ from each other. Received more than once: {repeated}")
    return [str(name) for name in names]  # NumPy's strings are no JSON
