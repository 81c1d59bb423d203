"""Names of axes and features."""

from typing import Any

import keras
import numpy as np

from kerasfactory.explain._engine.attention import all_layers, attention_axes
from kerasfactory.explain._engine.observe import Batch, Found
from kerasfactory.layers import FeatureTokenizer


def labels_of(
    model: Any, batch: Batch, name: str, shape: tuple[int, ...], names: list[str] | None, folded: bool
) -> dict[str, Any]:
    """What makes a labeled array of scores: names of the axes, coordinates of all but the first, attributes."""
    if names is None and batch.inputs == 1:
        tokenizers = [layer for layer in all_layers(model) if isinstance(layer, FeatureTokenizer)]
        names = tokenizers[0].feature_names if len(tokenizers) == 1 else None
    call = batch.found[name]
    dims = ["sequence" if folded else "sample", *axis_names(call.layer, len(shape))]
    coordinates: dict[str, Any] = {"head": np.arange(shape[dims.index("head")])}
    for dim, size in zip(dims, shape, strict=True):
        if names is not None and dim.startswith(("query", "key")) and size == len(names):
            coordinates[dim] = names
    attributes = attributes_of(call) | {"prediction_difference": batch.difference}
    return {"coords": coordinates, "dims": dims, "attrs": attributes}


def attributes_of(call: Found) -> dict[str, Any]:
    """What a result says of the call it belongs to, and of where it was computed."""
    return {
        "layer": call.name,
        "class": type(call.layer).__name__,
        "call": call.number,
        "masks": call.masks,
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


def check_axes(name: str, layer: Any, shape: tuple[int, ...], names: list[str] | None) -> None:
    """Raises an error if scores of this shape have other axes than the layer's, or not as many keys as names."""
    dims = axis_names(layer, len(shape))
    if len(dims) != len(shape) - 1:
        raise ValueError(
            f"The scores of layer {name!r} must have the axes (sample, {', '.join(dims)}). Its own "
            f"`_compute_attention` returned scores of shape {shape}. Leave it out with `layers=[...]`."
        )
    keys = [size for dim, size in zip(dims, shape[1:], strict=True) if dim.startswith("key")]
    if names is not None and len(names) not in keys:
        raise ValueError(
            f"`feature_names` must hold one name for each key. Layer {name!r} attends over "
            f"{' x '.join(map(str, keys))} keys. Give as many names, or choose other layers with `layers=[...]`. "
            f"Received {len(names)} names: {names}"
        )


def check_same_lengths(name: str, shape: tuple[int, ...], first: tuple[int, ...]) -> None:
    """Raises an error if the scores of a sample, (…, query, key), have another shape than those in the first batch."""
    if shape != first:
        raise ValueError(
            f"Layer {name!r} has {shape[-2]} queries and {shape[-1]} keys in one batch, and {first[-2]} and "
            f"{first[-1]} in those before (its scores have the shapes {shape} and {first}): the batches in `x` differ "
            "in length. Pad them all to one length, or give each by itself."
        )
