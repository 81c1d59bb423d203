"""What a model takes: arrays and batches, checked, cut and counted."""

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import pandas as pd
from keras import ops, tree

from kerasfactory import _backend
from kerasfactory._arguments import positive_integer
from kerasfactory.explain._engine.tables import in_arrays

# In a batch, if the number of its samples is not given: see `batch_size_of`.
_SAMPLES, _POSITIONS, _PAIRS = 2**10, 2**14, 2**22
_UNKNOWN = 32  # where the data do not say how many positions a sample has in the model


class PartOfBar:
    """A stretch of a progress bar: what is given it in place of `verbose` shows its own progress there."""

    def __init__(self, bar: Any, start: float, stop: float) -> None:
        self._bar, self._start, self._stop = bar, start, stop
        self._expected, self._done, self._reached = 1, 0, start

    def begun(self, expected: int | None) -> "PartOfBar":
        self._expected = expected or 1
        return self

    def add(self, number: int) -> None:
        self.update(self._done + number)

    def update(self, done: int, finalize: bool = False) -> None:
        reached = self._start + min(done / self._expected, 1) * (self._stop - self._start)
        self._done, self._reached = done, max(self._reached, reached)  # it may begin again
        self._bar.update(int(self._reached))


def progress_bar(expected: int | None, verbose: Any, unit: str = "batch") -> Any:
    """Keras', for so many batches, or something else; or a part of one that has begun."""
    if isinstance(verbose, PartOfBar):
        return verbose.begun(expected)
    if verbose not in ("auto", 0, 1, 2):
        raise ValueError(f'`verbose` must be "auto", 0, 1 or 2. Received: verbose={verbose!r}')
    if verbose == "auto":
        verbose = 1 if keras.config.is_interactive_logging_enabled() else 2
    return keras.utils.Progbar(expected, verbose=verbose, unit_name=unit)


def batches_of(x: Any, batch_size: int | None) -> tuple[Iterator[tuple], int | None]:
    """The batches that `model.predict` would make of `x`, each as a tuple `(inputs,)`, and how many, if known."""
    _backend.check_process()
    x = in_arrays(x)
    if are_arrays(x):
        if isinstance(x, list | tuple):
            check_no_texts("x", x)
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
        raise ValueError("`x` never ends. Take as many of its batches as you want, as with `dataset.take(10)`.")
    return map(as_inputs, batches), expected


def batch_size_of(x: Any) -> int | None:
    """How many samples go into a batch if that is not given, so that it is fast and its scores fit into memory.

    The positions of a sample are the columns of a table or the length of a sequence, and the most of several inputs.
    Each pair of them is a score. A model makes fewer positions of a picture, and more of a string.
    """
    if not are_arrays(x):
        return None  # it makes its own batches
    arrays = [array if hasattr(array, "dtype") else np.asarray(array) for array in tree.flatten(x)]
    if any(len(array.shape) > 3 or _holds_strings(array) for array in arrays):
        return _UNKNOWN
    positions = max((array.shape[1] for array in arrays if len(array.shape) > 1), default=1) or 1
    return max(1, min(_SAMPLES, _POSITIONS // positions, _PAIRS // positions**2))


def _holds_strings(array: Any) -> bool:
    return getattr(array.dtype, "kind", "") in tuple("OSTU") or "string" in str(array.dtype)


def are_arrays(x: Any) -> bool:
    """Whether `x` holds all samples at once, and not batches of them."""
    return isinstance(x, dict | list | tuple) or hasattr(x, "__array__")


def token_ids(x: Any, keys: int | None = None) -> tuple[np.ndarray | None, str]:
    """The one array of integers (sample, key) in `x`, if there is one, and what `x` holds, in words.

    Of dictionaries as KerasHub makes them, it is `token_ids`.
    """
    if isinstance(x, dict) and "token_ids" in x:
        x = x["token_ids"]
    given = tree.flatten(x) if are_arrays(x) else []
    arrays = [_backend.as_numpy(array) if ops.is_tensor(array) else np.asarray(array) for array in given]
    shapes = [f"{array.dtype} of shape {array.shape}" for array in arrays]
    ids = [array for array in arrays if array.dtype.kind in "iu" and array.ndim == 2 and keys in (None, array.shape[1])]
    return ids[0] if len(ids) == 1 else None, ", ".join(shapes) or type(x).__name__


def check_no_texts(name: str, given: Any) -> None:
    """Raises an error that names the way out if an array or a list holds strings."""
    kind = str(getattr(given, "dtype", "")).lower()
    entries = np.asarray(given).flat[:1] if kind == "object" else given if isinstance(given, list | tuple) else ()
    if kind[:2] in ("<u", "|s") or "str" in kind or any(isinstance(entry, str | bytes) for entry in entries):
        raise ValueError(
            f"`{name}` holds strings. Where the model takes numbers, give what it was trained on: the ids of the "
            "words, or the codes of the categories. If it has a `keras.layers.TextVectorization`, explain the part "
            "behind it, on the ids: with `vectorize = model.get_layer(NAME)`, this is "
            "`keras.Model(vectorize.output, model.outputs)`, compiled as the model is, and its `x` is "
            "`keras.ops.convert_to_numpy(vectorize(texts))`. The words are "
            "`feature_names=vectorize.get_vocabulary().__getitem__`."
        )


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
    if not are_arrays(x):
        raise ValueError(
            f"`x` must be an array, or a dictionary or list of arrays. Received: x of type {type(x).__name__}"
        )
    chosen = chosen_samples(len(tree.flatten(x)[0]), limit, rng)
    if isinstance(x, pd.DataFrame):
        return chosen, x.iloc[chosen]
    return chosen, rows_of(x, chosen)


def feature_array(name: str, given: Any) -> np.ndarray:
    check_no_texts(name, given)
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


def input_arrays(name: str, given: Any) -> Any:
    """What a model takes, as arrays of numbers: one, (sample, feature, ...), or a dictionary or list of them."""
    if not isinstance(given, dict | list | tuple):
        return feature_array(name, given)
    parts = given if isinstance(given, dict) else dict(enumerate(given))
    arrays = {key: _input_array(name, f"{name}[{key!r}]", part) for key, part in parts.items()}
    if len({len(array) for array in arrays.values()}) != 1:
        shapes = ", ".join(f"{key!r}: {array.shape}" for key, array in arrays.items())
        raise ValueError(
            f"The inputs in `{name}` must hold as many samples each, along their first axis. Received: {shapes}"
        )
    return arrays if isinstance(given, dict) else list(arrays.values())


def _input_array(name: str, part: str, given: Any) -> np.ndarray:
    check_no_texts(part, given)
    if not hasattr(given, "__array__") and not ops.is_tensor(given):
        raise ValueError(
            f"`{name}` must be an array, or a dictionary or list of arrays, one for each input of the model. Received: "
            f"{part} of type {type(given).__name__}"
        )
    array = _backend.as_numpy(given) if ops.is_tensor(given) else np.asarray(in_arrays(given))
    if array.ndim == 0 or 0 in array.shape or array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{part}` must be an array of numbers, (sample, ...). Received: shape {array.shape}, dtype {array.dtype}"
        )
    return array


def samples_in(x: Any) -> int:
    """Of arrays: one, or a dictionary or list of them."""
    return len(tree.flatten(x)[0])


def rows_of(x: Any, rows: Any) -> Any:
    """Some samples of arrays: one, or a dictionary or list of them."""
    return tree.map_structure(lambda array: np.asarray(array)[rows], x)


def named_inputs(x: Any) -> dict[str, np.ndarray]:
    """The arrays by their names, in one order; that of a single array is empty."""
    if isinstance(x, dict):
        return {str(key): x[key] for key in sorted(x, key=str)}
    return {str(key): array for key, array in enumerate(x)} if isinstance(x, list | tuple) else {"": x}


def shape_of(x: Any) -> Any:
    """The shape of an array, or those of several by their names."""
    shapes = {name: tuple(array.shape) for name, array in named_inputs(x).items()}
    return shapes.get("", shapes)


def like_samples_of(x: Any, name: str, given: Any) -> Any:
    """Other samples for the same model, as arrays."""
    rows = input_arrays(name, given)
    shapes, own = ({key: array.shape[1:] for key, array in named_inputs(arrays).items()} for arrays in (rows, x))
    if shapes != own:
        raise ValueError(
            f"`{name}` must hold samples like those of `x`. Received: {name} of shape {shape_of(rows)}, x of shape "
            f"{shape_of(x)}"
        )
    return rows


def check_rows_finite(values: np.ndarray, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} is NaN or infinite in {len(bad)} of {len(values)} samples, the first of them number {bad[0]}. "
            "Leave them out, or find out why."
        )
