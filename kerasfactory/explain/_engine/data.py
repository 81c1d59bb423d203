"""What a model takes: arrays and batches, checked, cut and counted."""

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import pandas as pd
import xarray as xr
from keras import ops, tree

from kerasfactory import _backend
from kerasfactory._arguments import positive_integer
from kerasfactory.explain._engine.tables import in_arrays

# In a batch, if the number of its samples is not given: see `batch_size_of`.
_SAMPLES, _POSITIONS, _PAIRS = 2**10, 2**13, 2**22
_UNKNOWN = 32  # where the data do not say how many positions a sample has in the model


def progress_bar(expected: int | None, verbose: Any, unit: str = "batch") -> Any:
    """Keras', for so many batches, or something else."""
    if verbose not in ("auto", 0, 1, 2):
        raise ValueError(f'`verbose` must be "auto", 0, 1 or 2. Received: verbose={verbose!r}')
    if verbose == "auto":
        verbose = 1 if keras.config.is_interactive_logging_enabled() else 2
    return keras.utils.Progbar(expected, verbose=verbose, unit_name=unit)


def batches_of(x: Any, batch_size: int | None) -> tuple[Iterator[tuple], int | None]:
    """The batches that `model.predict` would make of `x`, each as a tuple `(inputs,)`, and how many, if known."""
    _backend.check_process()
    x = in_arrays(x)
    if isinstance(x, dict | list | tuple) or hasattr(x, "__array__"):
        arrays = tree.map_structure(lambda array: array if hasattr(array, "shape") else np.asarray(array), x)
        shapes = [tuple(array.shape) for array in tree.flatten(arrays)]
        if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
            raise ValueError(
                "`x` must be an array, or a dictionary or list of arrays, with the samples along the first axis, as "
                f"many in each. Received arrays of shapes: {shapes}"
            )
        samples = shapes[0][0]
        step = positive_integer("batch_size", batch_size_of(arrays) if batch_size is None else batch_size)
        parts = [slice(start, start + step) for start in range(0, samples, step)]

        def batch(part):
            return as_inputs((tree.map_structure(lambda array: array[part], arrays),))

        return map(batch, parts), len(parts)

    if batch_size is not None:
        raise ValueError(
            f"`batch_size` is for arrays; {type(x).__name__} makes its own batches. Received: batch_size={batch_size!r}"
        )
    if isinstance(x, keras.utils.PyDataset):
        expected = x.num_batches
        batches: Iterator[Any] | None = None if expected is None else (x[number] for number in range(expected))
    elif isinstance(x, Iterable) and not isinstance(x, str | bytes):
        try:
            expected = len(x)  # type: ignore[arg-type]
        except TypeError:
            expected = None
        infinite = hasattr(x, "cardinality") and int(x.cardinality()) == -1  # of a tf.data.Dataset
        batches = None if infinite else iter(x)
    else:
        raise ValueError(
            "`x` must be an array, a dictionary or list of arrays, a tf.data.Dataset, a keras.utils.PyDataset, a "
            f"DataLoader or a generator of batches. Received: x={x!r} of type {type(x).__name__}"
        )
    if batches is None:
        raise ValueError("`x` never ends: take as many batches of it as you want, as with `dataset.take(10)`.")
    return map(as_inputs, batches), expected


def batch_size_of(x: Any) -> int | None:
    """How many samples go into a batch if that is not given, so that it is fast and its scores fit into memory.

    The positions of a sample are the columns of a table or the length of a sequence, and the most of several inputs.
    Each pair of them is a score. A model makes fewer positions of a picture, and more of a string.
    """
    if not (isinstance(x, dict | list | tuple) or hasattr(x, "__array__")):
        return None  # it makes its own batches
    arrays = [array if hasattr(array, "dtype") else np.asarray(array) for array in tree.flatten(x)]
    if any(len(array.shape) > 3 or _holds_strings(array) for array in arrays):
        return _UNKNOWN
    positions = max((array.shape[1] for array in arrays if len(array.shape) > 1), default=1) or 1
    return max(1, min(_SAMPLES, _POSITIONS // positions, _PAIRS // positions**2))


def _holds_strings(array: Any) -> bool:
    return getattr(array.dtype, "kind", "") in tuple("OSTU") or "string" in str(array.dtype)


def as_inputs(batch: Any) -> tuple:
    """What the model gets of a batch: labels and weights are left out, and numbers are as Keras makes them."""
    inputs, _, _ = keras.utils.unpack_x_y_sample_weight(batch)

    def converted(array):
        if ops.is_tensor(array):
            return array
        array = np.asarray(array)
        return ops.convert_to_tensor(array, keras.config.floatx() if array.dtype == "float64" else None)

    return (tree.map_structure(converted, inputs),)


def size_of(data: tuple) -> int:
    return tree.flatten(data)[0].shape[0]


def chosen_samples(samples: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    """The numbers of all samples, or of some."""
    return np.arange(samples) if samples <= limit else np.sort(rng.choice(samples, limit, replace=False))


def sampled(x: Any, limit: int, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
    """The numbers of all samples of the arrays `x`, or of some, and these samples. A DataFrame remains one."""
    if not isinstance(x, dict | list | tuple) and not hasattr(x, "__array__"):
        raise ValueError(
            f"`x` must be an array, or a dictionary or list of arrays. Received: x of type {type(x).__name__}"
        )
    chosen = chosen_samples(len(tree.flatten(x)[0]), limit, rng)
    if isinstance(x, pd.DataFrame):
        return chosen, x.iloc[chosen]
    return chosen, tree.map_structure(lambda array: np.asarray(array)[chosen], x)


def feature_array(name: str, given: Any) -> np.ndarray:
    if not hasattr(given, "__array__") and not ops.is_tensor(given):
        raise ValueError(
            f"`{name}` must be an array with the features along axis 1. Received: {name} of type {type(given).__name__}"
        )
    array = _backend.as_numpy(given) if ops.is_tensor(given) else np.asarray(in_arrays(given))
    if array.ndim < 2 or 0 in array.shape or array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{name}` must be an array of numbers with the features along axis 1. Received: shape {array.shape}, "
            f"dtype {array.dtype}"
        )
    return array


def check_rows_finite(values: np.ndarray, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} is NaN or infinite in {len(bad)} of {len(values)} samples, the first of them number {bad[0]}. "
            "Leave them out, or find out why."
        )


def checked_feature_mask(feature_mask: Any, x: np.ndarray) -> np.ndarray:
    """The number of the feature that each entry of a sample belongs to, from 0, or -1: in the shape of a sample."""
    mask = np.asarray(feature_mask)
    numbers = np.unique(mask[mask >= 0]) if mask.dtype.kind in "iu" else np.array([])
    if mask.shape != x.shape[1:] or not len(numbers) or numbers[-1] != len(numbers) - 1:
        raise ValueError(
            f"`feature_mask` must have the shape of one sample, {x.shape[1:]}, and hold integers: the number of the "
            "feature that an entry belongs to, from 0 without a gap, or -1 for what is never removed. Received: shape "
            f"{mask.shape}, dtype {mask.dtype}, numbers {numbers[:10].tolist()}"
        )
    return mask


def checked_attribution(attribution: Any, x: np.ndarray) -> np.ndarray:
    """The numbers of an attribution (sample, feature) of the samples `x`, as float64."""
    if isinstance(attribution, xr.DataArray) and set(attribution.dims) == {"sample", "feature"}:
        attribution = attribution.transpose("sample", "feature")
    values = np.asarray(attribution)
    if values.shape != x.shape[:2]:
        raise ValueError(
            f"`attribution` must have a number for each sample and feature, {x.shape[:2]} as in `x`; "
            "`numpy.broadcast_to(values, x.shape[:2])` makes it of one number for each feature. Received: "
            f"attribution of shape {values.shape}, x of shape {x.shape}"
        )
    if values.shape[1] < 2:
        raise ValueError("`x` has one feature: there is nothing to rank. Give at least 2.")
    check_rows_finite(values, "`attribution`")
    return values.astype("float64")
