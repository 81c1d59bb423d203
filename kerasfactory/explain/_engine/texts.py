"""The words of texts: names of positions that differ by sample."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import xarray as xr
from keras import tree

from kerasfactory._warnings import warn
from kerasfactory.explain._engine.data import are_arrays, batches_of, check_no_texts, token_ids

_Labeled = TypeVar("_Labeled", xr.DataArray, xr.Dataset)


def differ_by_sample(feature_names: Any) -> bool:
    """Whether they are a function from ids to strings, an array (sample, key), or a list of lists."""
    rows = _rows(feature_names)
    return callable(feature_names) or any(isinstance(row, list | tuple | np.ndarray) for row in rows)


class Words:
    """A string for each position of each sample, `""` for padding.

    A function from ids to strings is applied once to each distinct id. If `x` comes in batches, it is applied to those
    that were taken from the attribute `x`, which stands in for the given one.
    """

    def __init__(self, x: Any, feature_names: Any):
        self.x = x
        self._known: dict[int, str] = {}
        if not callable(feature_names):
            self._parts = [_checked_rows(x, _rows(feature_names))]
        elif are_arrays(x):
            self._parts = [self._found(x, feature_names)]
        else:
            self._parts = []
            self.x = self._noted(x, feature_names)

    @property
    def length(self) -> int:
        """The number of positions."""
        return self._parts[0].shape[1]

    def of_samples(self) -> np.ndarray:
        """(sample, position), of all samples."""
        return np.concatenate(self._parts) if len(self._parts) > 1 else self._parts[0]

    def on(self, labeled: _Labeled) -> _Labeled:
        """The result with the coordinates `query_token`, `key_token` and `feature_token` where these axes fit."""
        words = self.of_samples()
        for dim in ("query", "key", "feature"):
            if {"sample", dim} <= set(labeled.dims) and (labeled.sizes["sample"], labeled.sizes[dim]) == words.shape:
                labeled = labeled.assign_coords({f"{dim}_token": (("sample", dim), words)})
        return labeled

    def warn_of_padding(self, in_view: np.ndarray | bool) -> None:
        """Says so if positions that are padding are in view, (sample, position)."""
        padded = np.flatnonzero(np.any((self.of_samples() == "") & in_view, axis=1))
        if len(padded):
            warn(
                f'Padding, which `feature_names` calls "", is in view in {len(padded)} of {len(self.of_samples())} '
                f"samples, the first of them number {padded[0]}. It keeps its weight. Either the model has no mask for "
                "it, such as `keras.layers.Embedding(..., mask_zero=True)` makes, or the words stand at other "
                'positions than their ids. `attribute(..., special_tokens=[""])` leaves it out of view.'
            )

    def _noted(self, x: Any, function: Callable[[int], str]) -> Iterator[tuple]:
        for batch in batches_of(x, None)[0]:
            self._parts.append(self._found(batch[0], function))
            yield batch

    def _found(self, x: Any, function: Callable[[int], str]) -> np.ndarray:
        ids, received = token_ids(x)
        if ids is None:
            check_no_texts("x", x)
            raise ValueError(
                "If `feature_names` is a function from ids to strings, `x` must be one array of integers, (sample, "
                "key), or a dictionary with such `token_ids`. Convert ids that are floats with `x.astype(int)`, or "
                f"give the strings themselves, as an array (sample, key). Received x: {received}"
            )
        distinct, numbers = np.unique(ids, return_inverse=True)
        for number in distinct.tolist():
            if number not in self._known:
                self._known[number] = _word_of(number, function)
        words = np.array([self._known[number] for number in distinct.tolist()], object)
        return words[numbers.reshape(ids.shape)]


def _word_of(number: int, function: Callable[[int], str]) -> str:
    said = f"`feature_names` must be a function from each id in `x` to a string. For the id {number} it"
    if number < 0:
        raise ValueError(f"`x` holds the id {number}. Ids of tokens count from 0.")
    try:
        word = function(number)
    except Exception as error:  # somebody's own function may raise anything
        raise ValueError(
            f"{said} raised {type(error).__name__}: {error}. Check that it belongs to the same vocabulary."
        ) from error
    if not isinstance(word, str):
        raise ValueError(f"{said} returned {word!r}. Check that it belongs to the same vocabulary.")
    return str(word)


def _rows(feature_names: Any) -> Any:
    """An array or a list as it is, a DataFrame or a tensor as an array; nothing of all else."""
    if hasattr(feature_names, "__array__"):
        return np.atleast_1d(np.asarray(feature_names))
    return feature_names if isinstance(feature_names, list | tuple) else []


def _checked_rows(x: Any, feature_names: Any) -> np.ndarray:
    """(sample, position); lists that are shorter than the samples of `x` are filled with `""`."""
    if not are_arrays(x):
        raise ValueError(
            "`feature_names` of each sample need `x` as arrays. For batches, give a function from ids to strings, such "
            f"as `vectorize.get_vocabulary().__getitem__`. Received: x of type {type(x).__name__}"
        )
    arrays = tree.flatten(x)
    rows = [_checked_row(number, row) for number, row in enumerate(feature_names)]
    samples, longest = len(arrays[0]), max(map(len, rows))
    if len(rows) != samples:
        raise ValueError(
            f"`feature_names` must hold a row for each sample in `x`, {samples}. Received {len(rows)} rows."
        )
    positions = {np.shape(array)[1] for array in arrays if np.ndim(array) > 1}
    length = max(longest, *positions) if len(positions) == 1 and isinstance(feature_names, list | tuple) else longest
    words = np.full((samples, length), "", object)
    for number, row in enumerate(rows):
        words[number, : len(row)] = row
    return words


def _checked_row(number: int, row: Any) -> list[str]:
    is_list = isinstance(row, list | tuple | np.ndarray)
    words = list(row) if is_list else []
    if not is_list or not all(isinstance(word, str) for word in words):
        wrong = next((word for word in words if not isinstance(word, str)), row)
        raise ValueError(
            'Each row of `feature_names` must be a list of strings, the words of a sample, with "" for padding. Row '
            f"{number} holds {wrong!r} of type {type(wrong).__name__}."
        )
    return words
