"""Names of axes, features and samples."""

from typing import Any, NamedTuple, TypeVar

import keras
import numpy as np
import pandas as pd
import xarray as xr

from kerasfactory._arguments import checked_names
from kerasfactory.explain._engine.attention import all_layers, attention_axes
from kerasfactory.explain._engine.observe import Batch, Found
from kerasfactory.explain._engine.texts import Words, differ_by_sample
from kerasfactory.layers import FeatureTokenizer

_Labeled = TypeVar("_Labeled", xr.DataArray, xr.Dataset)


class Given(NamedTuple):
    """What the user calls the features."""

    x: Any  # the data, to be used in place of the argument `x`: the words of batches are found on the way
    names: list[str] | None  # the argument `feature_names`, an error if they fit no axis
    words: Words | None  # the same, if they differ by sample
    columns: list[str] | None  # those of a DataFrame, which a model may put together to other features

    @property
    def length(self) -> int | None:
        """The number of names, or of words in a sample; `None` if the user gave none."""
        if self.words is not None:
            return self.words.length
        return None if self.names is None else len(self.names)

    def on(self, result: _Labeled) -> _Labeled:
        """The result with the words of each sample, if there are any."""
        return result if self.words is None else self.words.on(result)


def given_labels(x: Any, feature_names: Any) -> Given:
    """What `feature_names` and `x` say, if it is a DataFrame."""
    names = words = None
    if differ_by_sample(feature_names):
        words = Words(x, feature_names)
        x = words.x
    elif feature_names is not None:
        names = checked_names(feature_names)
    if not isinstance(x, pd.DataFrame):
        return Given(x, names, words, None)
    columns = [str(column) for column in x.columns]
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated and names is None and words is None:
        raise ValueError(
            "The columns of `x` are the names of its features, so they must differ from each other. Rename them, or "
            f"give `feature_names`. Received more than once: {repeated}"
        )
    return Given(x, names, words, columns if names or repeated else checked_names(columns))


def with_rows_of(x: Any, result: _Labeled) -> _Labeled:
    """The result with the index of `x` as its coordinate `sample`, if `x` is a DataFrame of these samples."""
    if not isinstance(x, pd.DataFrame) or result.sizes.get("sample") != len(x):
        return result
    rows = x.index
    if isinstance(rows, pd.MultiIndex):
        taken = {None, *result.dims, *result.coords}
        levels = [f"sample_level_{n}" if name in taken else name for n, name in enumerate(rows.names)]
        return result.assign_coords(xr.Coordinates.from_pandas_multiindex(rows.set_names(levels), "sample"))
    if isinstance(rows, pd.DatetimeIndex) and rows.tz is not None:  # NumPy has no time zones
        rows = rows.tz_convert("UTC").tz_localize(None)
    elif not isinstance(rows.dtype, np.dtype):
        rows = pd.Index(np.asarray(rows), dtype=object)
    return result.assign_coords(sample=rows.rename("sample"))


def warn_of_padding(given: Given, batch: Batch) -> None:
    """Says so if there are words for padding, and a layer without a mask."""
    if given.words is not None and any(call.masks == "none" for call in batch.found.values()):
        given.words.warn_of_padding(True)


def labels_of(
    model: Any, batch: Batch, name: str, shape: tuple[int, ...], given: Given, folded: bool
) -> dict[str, Any]:
    """What makes a labeled array of scores: names of the axes, coordinates of all but the first, attributes."""
    possible = [given.names] if given.names else [given.columns, _tokenizer_names(model, batch)]
    call = batch.found[name]
    dims = ["sequence" if folded else "sample", *axis_names(call.layer, len(shape))]
    coordinates: dict[str, Any] = {"head": np.arange(shape[dims.index("head")])}
    for dim, size in zip(dims, shape, strict=True):
        fitting = [names for names in possible if names is not None and size == len(names)]
        if fitting and dim.startswith(("query", "key")):
            coordinates[dim] = fitting[0]
    attributes = attributes_of(call) | {"prediction_difference": batch.difference}
    return {"coords": coordinates, "dims": dims, "attrs": attributes}


def _tokenizer_names(model: Any, batch: Batch) -> list[str] | None:
    """What the model's own tokenizer calls its features."""
    tokenizers = [layer for layer in all_layers(model) if isinstance(layer, FeatureTokenizer)]
    return tokenizers[0].feature_names if len(tokenizers) == 1 and batch.inputs == 1 else None


def attributes_of(call: Found) -> dict[str, Any]:
    """What a result says of the call it belongs to, and of where it was computed."""
    return {
        "layer": call.name,
        "class": type(call.layer).__name__,
        "call": call.number,
        "masks": call.masks,
        "read_from": call.read_from,
        "backend": keras.config.backend(),
        "keras_version": keras.__version__,
    }


def axis_names(layer: Any, rank: int) -> list[str]:
    """Names of all axes of the scores but the first."""
    axes = attention_axes(layer)
    if len(axes) == 1:
        queries, keys = ["query"], ["key"]
    else:
        queries, keys = ([f"{kind}_{number}" for number in range(len(axes))] for kind in ("query", "key"))
    other = [axis for axis in range(1, rank - len(axes)) if axis not in axes][: rank - 2 - 2 * len(axes)]
    return [*(f"axis_{axis}" for axis in other), "head", *queries, *keys]


def sink_of(scores: np.ndarray) -> np.ndarray:
    """The weight of each query that went to no key: (…, query), where rows without a sink would sum to 1."""
    return np.clip(1 - scores.sum(axis=-1), 0, 1)


def check_axes(name: str, layer: Any, shape: tuple[int, ...], given: Given) -> None:
    """Raises an error if scores of this shape have other axes than the layer's, or not as many keys as names."""
    dims = axis_names(layer, len(shape))
    if len(dims) != len(shape) - 1:
        raise ValueError(
            f"The scores of layer {name!r} must have the axes (sample, {', '.join(dims)}). Its own "
            f"`_compute_attention` returned scores of shape {shape}. Leave it out with `layers=[...]`."
        )
    keys = [size for dim, size in zip(dims, shape[1:], strict=True) if dim.startswith("key")]
    if given.length is not None and given.length not in keys:
        received = (
            f'{given.length} words for each sample. Where padding follows them, its words are `""`'
            if given.names is None
            else f"{given.length} names: {given.names}"
        )
        raise ValueError(
            f"`feature_names` must hold one name for each key. Layer {name!r} attends over "
            f"{' x '.join(map(str, keys))} keys. Give as many names, or choose other layers with `layers=[...]`. "
            "Words by their ids are a function, such as `feature_names=vocabulary.__getitem__` of a list. "
            f"Received {received}"
        )


def check_same_lengths(name: str, shape: tuple[int, ...], first: tuple[int, ...]) -> None:
    """Raises an error if the scores of a sample, (…, query, key), have another shape than those in the first batch."""
    if shape != first:
        raise ValueError(
            f"Layer {name!r} has {shape[-2]} queries and {shape[-1]} keys in one batch, but {first[-2]} and "
            f"{first[-1]} in those before (its scores have the shapes {shape} and {first}): the batches in `x` differ "
            "in length. Pad them all to one length, or give each by itself."
        )
