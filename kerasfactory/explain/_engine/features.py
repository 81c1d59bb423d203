"""Which entries of a model's inputs make which feature, and which of the keys of an attribution are these features."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from keras import tree

from kerasfactory.explain._engine.data import check_rows_finite, named_inputs, samples_in, shape_of
from kerasfactory.explain._engine.view import named_keys, names_of


class Features(NamedTuple):
    """The features of a sample: sets of entries of its inputs, which are removed together."""

    masks: Any  # for each input, in their structure: integers that broadcast to a sample; -1 is in no feature
    total: int

    def replaced(self, own: Any, removed: np.ndarray, others: Any) -> Any:
        """The inputs `own` with the `removed` features, (sample, feature), of `others`."""
        removed = np.pad(removed, ((0, 0), (0, 1)))  # the last column is for what is never removed, -1

        def of_input(mask, own, other):
            return own if (mask < 0).all() else np.where(removed[:, mask], other, own)

        return tree.map_structure(of_input, self.masks, own, others)

    def entries(self, feature: int, x: Any) -> list[tuple[np.ndarray, ...] | None]:
        """Where the entries of a feature are in a sample, for each of the inputs in the order of `tree.flatten`."""
        places: list[tuple[np.ndarray, ...] | None] = []
        for mask, array in zip(tree.flatten(self.masks), tree.flatten(x), strict=True):
            is_there = np.broadcast_to(mask == feature, array.shape[1:])
            places.append((np.nonzero(is_there) if is_there.ndim else ()) if is_there.any() else None)
        return places

    def by_entry(self, values: np.ndarray, rest: Any) -> Any:
        """Values (row, feature) for each entry, as far as entries differ; `rest` for those that are in no feature."""
        padded = np.pad(values, ((0, 0), (0, 1)), constant_values=rest)
        return tree.map_structure(lambda mask: padded[:, mask], self.masks)


def features_of(x: Any, feature_mask: Any) -> Features:
    """What a `feature_mask` says of the arrays `x`; without one, the features are the positions of axis 1."""
    if feature_mask is None:
        return _along_axis_1(x)
    inputs = named_inputs(x)
    given = _named_masks(inputs, feature_mask, isinstance(x, dict))
    masks = {name: _fitted(name, given[name], array.shape[1:]) for name, array in inputs.items()}
    given_numbers = np.unique(np.concatenate([mask.reshape(-1) for mask in masks.values()]))
    numbers = given_numbers[given_numbers >= 0]
    gaps = np.flatnonzero(numbers != np.arange(len(numbers)))
    if len(gaps) or not len(numbers) or given_numbers[0] < -1:
        wrong = f"No entry has number {gaps[0] if len(gaps) else len(numbers)}"
        raise ValueError(
            "`feature_mask` must hold the numbers of the features, from 0 without a gap, over all inputs together, or "
            f"-1 for what is never removed. {wrong if given_numbers[0] >= -1 else f'One is {given_numbers[0]}'}. If "
            "each of the numbers is a feature, and none stands for what is never removed, "
            "`numpy.unique(mask, return_inverse=True)[1]` numbers them from 0. Received the numbers: "
            f"{given_numbers[:10].tolist()}"
        )
    return Features(_packed(x, masks), len(numbers))


def _along_axis_1(x: Any) -> Features:
    flat = tree.flatten(x)
    if len(flat) > 1:
        inputs = named_inputs(x)
        first = next(iter(inputs))
        examples = dict.fromkeys(inputs, "-1") | {first: f"numpy.arange({inputs[first].shape[1]})"}
        shown = ", ".join(f"{name!r}: {mask}" if isinstance(x, dict) else mask for name, mask in examples.items())
        raise ValueError(
            f"`x` holds several inputs, {', '.join(map(repr, inputs))}: it is not clear which of them hold the "
            "features. Say which feature each entry belongs to, with `feature_mask`: for each input, integers shaped "
            "like one sample of it, numbered on from input to input, or -1 for an input that must not change, such as "
            f"{f'{{{shown}}}' if isinstance(x, dict) else f'[{shown}]'}."
        )
    if flat[0].ndim > 3:
        raise ValueError(
            f"`x` has the axes of pictures, {flat[0].shape}: a key of the attention is not an entry of axis 1. Say "
            "which feature each entry belongs to, with `feature_mask`: integers shaped like one sample, such as the "
            "numbers of the patches, `explain.patches(height, width, size)`."
        )
    count = flat[0].shape[1]
    mask = np.arange(count).reshape(-1, *[1] * (flat[0].ndim - 2))
    return Features(tree.map_structure(lambda _: mask, x), count)


def _named_masks(inputs: dict[str, np.ndarray], feature_mask: Any, is_dict: bool) -> dict[str, Any]:
    if "" in inputs:
        if isinstance(feature_mask, dict):
            raise ValueError(
                "`x` is one array, and `feature_mask` has keys: give the integers themselves. Received the keys: "
                f"{list(feature_mask)}"
            )
        return {"": feature_mask}
    if is_dict and isinstance(feature_mask, dict):
        given = {str(key): mask for key, mask in feature_mask.items()}
    elif not is_dict and isinstance(feature_mask, list | tuple):
        given = {str(number): mask for number, mask in enumerate(feature_mask)}
    else:
        kind = "dictionary" if is_dict else "list"
        raise ValueError(
            f"`x` is a {kind} of {len(inputs)} inputs: `feature_mask` must be a {kind} as well, with a mask for each. "
            f"Received: {type(feature_mask).__name__}"
        )
    unknown = [name for name in given if name not in inputs]
    missing = [name for name in inputs if name not in given]
    if unknown or missing:
        near = difflib.get_close_matches(unknown[0], inputs, n=1) if unknown else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            "`feature_mask` must hold a mask for each input, or -1 for one that is never changed. "
            f"There are: {', '.join(map(repr, inputs))}. Not there: {', '.join(map(repr, unknown)) or 'none'}. "
            f"Missing: {', '.join(map(repr, missing)) or 'none'}.{hint}"
        )
    return given


def _fitted(name: str, given: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The mask of an input with all axes of a sample, some of them of size 1: it may lack the last ones."""
    try:
        mask = np.asarray(given)
    except ValueError:  # lists of different lengths
        mask = np.asarray(None)
    said = f"`feature_mask[{name!r}]`" if name else "`feature_mask`"
    fits = mask.shape == shape[: mask.ndim] or (
        mask.ndim == len(shape) and all(size in (1, all_of) for size, all_of in zip(mask.shape, shape, strict=True))
    )
    if not fits or mask.dtype.kind not in "iu":
        raise ValueError(
            f"{said} must have the shape of one sample, {shape}, or that without its last axes, and hold integers: the "
            "number of the feature that an entry belongs to, from 0, or -1 for what is never removed. What is the same "
            f"along the first axes becomes such with `numpy.broadcast_to(mask, {shape})`. Received: shape "
            f"{mask.shape}, dtype {mask.dtype}"
        )
    if 0 < mask.ndim < len(shape) and mask.shape == shape[-mask.ndim :]:
        raise ValueError(
            f"{said} has the shape of the first axes of a sample, {shape}, and of its last ones, so it is not clear "
            "which are meant. Write `mask[..., numpy.newaxis]` for the first ones, or `numpy.broadcast_to(mask, "
            f"{shape})` for the last. Received: shape {mask.shape}"
        )
    return mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim)).astype(int)


def _packed(x: Any, masks: dict[str, np.ndarray]) -> Any:
    if isinstance(x, dict):
        return {key: masks[str(key)] for key in x}
    return list(masks.values()) if isinstance(x, list | tuple) else masks[""]


class Table(NamedTuple):
    """Arrays as one table, with a column for each entry of a sample."""

    columns: np.ndarray  # (sample, column)
    feature: np.ndarray  # (column,): the number of the feature, or -1
    inputs: Callable[[np.ndarray], Any]  # from rows of such a table to what the model takes


def columns_of(x: Any) -> np.ndarray:
    """The entries of samples, (sample, entry), those of several inputs in the order of `tree.flatten`."""
    parts = [array.reshape(len(array), -1) for array in tree.flatten(x)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def table_of(x: Any, features: Features) -> Table:
    arrays, masks = tree.flatten(x), tree.flatten(features.masks)
    borders = np.cumsum([array[0].size for array in arrays])[:-1]
    numbers = [np.broadcast_to(mask, array.shape[1:]).reshape(-1) for mask, array in zip(masks, arrays, strict=True)]

    def inputs(rows):
        parts = zip(np.split(rows, borders, axis=1), arrays, strict=True)
        return tree.pack_sequence_as(
            x, [part.reshape(len(rows), *array.shape[1:]).astype(array.dtype, copy=False) for part, array in parts]
        )

    return Table(columns_of(x), np.concatenate(numbers), inputs)


class Matched(NamedTuple):
    """An attribution to the features of the data: without the keys that are the model's own, such as a class token."""

    attribution: Any  # as it was given, to all keys
    values: np.ndarray  # (sample, feature), float64
    kept: np.ndarray  # (feature,): the keys that they are to
    keys: int
    special_tokens: Any


def sizes_of(values: np.ndarray) -> np.ndarray:
    """Absolute values, if some are above 0 and some below: then a sign is a direction, and not a low rank."""
    return np.abs(values) if (values > 0).any() and (values < 0).any() else values


def match(attribution: Any, x: Any, counts: tuple[int, ...], special_tokens: Any) -> Matched:
    """The attribution to the features of `x`, of which there are one of `counts`; the first that fits is meant.

    If it has a number for each feature, they are these, special or not. If it has more, those that `special_tokens`
    names are no entries of the data, and are left out.
    """
    samples = samples_in(x)
    if special_tokens is None:
        special_tokens = getattr(attribution, "attrs", {}).get("special_tokens")
    if isinstance(attribution, pd.DataFrame):
        names = {"feature": attribution.columns.astype(str)}
        attribution = xr.DataArray(attribution.to_numpy(), names, ("sample", "feature"))
    if isinstance(attribution, xr.DataArray) and set(attribution.dims) == {"sample", "feature"}:
        attribution = attribution.transpose("sample", "feature")
    values = np.asarray(attribution)
    shape = values.shape
    kept = np.arange(shape[1] if values.ndim == 2 else 0)
    own = np.flatnonzero(named_keys(special_tokens, names_of(attribution), len(kept)).all(axis=0))
    fitting = [keys for count in counts for keys in (kept, np.setdiff1d(kept, own)) if len(keys) == count]
    if values.ndim != 2 or len(values) != samples or not fitting:
        wanted = (samples, counts[0])
        raise ValueError(
            f"`attribution` must have a number for each sample and feature, {wanted} as in `x`; "
            f"`numpy.broadcast_to(values, {wanted})` makes it of one number for each feature. If `x` has other "
            "features, describe them with `feature_mask`. Keys that are not in `x`, such as a class token, are left "
            "out if they "
            'have a name: `attribute(..., feature_names=["[CLS]", ...], special_tokens=["[CLS]"])`. Received: '
            f"attribution of shape {shape}, x of shape {shape_of(x)}"
        )
    values, kept = values[:, fitting[0]], fitting[0]
    if values.shape[1] < 2:
        raise ValueError("`x` has one feature: there is nothing to rank. Give at least 2.")
    check_rows_finite(values, "`attribution`")
    return Matched(attribution, values.astype("float64"), kept, shape[1], special_tokens)
