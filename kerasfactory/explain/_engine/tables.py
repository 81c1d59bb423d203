"""Tables as numbers: what a DataFrame must hold, and which categories a model knows."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pandas as pd
import xarray as xr
from keras import tree

from kerasfactory.explain._engine.attention import all_layers
from kerasfactory.layers import FeatureTokenizer

_NAMED = 5  # columns, in an error


def in_arrays(x: Any) -> Any:
    """The same with an array of numbers in place of each DataFrame. NumPy makes objects of several kinds of numbers.

    Raises:
        ValueError: If a column holds anything but numbers, or a value is missing. A table of one column may hold texts.
    """
    if isinstance(x, dict | list | tuple) and any(isinstance(leaf, pd.DataFrame) for leaf in tree.flatten(x)):
        return tree.map_structure(in_arrays, x)
    if not isinstance(x, pd.DataFrame):
        _refuse_objects(x)
        return x
    others = [place for place, dtype in enumerate(x.dtypes) if not _is_real(dtype)]
    if others and x.shape[1] == 1 and pd.api.types.infer_dtype(x.iloc[:, 0], skipna=False) == "string":
        return x.to_numpy(object)
    if others:
        _refuse_columns(x, others)
    array = x.to_numpy()
    if array.dtype == object:  # several kinds of numbers, or nullable ones
        array = x.to_numpy("float64", na_value=np.nan)
    missing = np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)
    if missing.any():
        _refuse_missing(x, missing)
    return array


def check_table(model: Any, x: Any, background: Any = None) -> None:
    """Raises an error if a table has columns or categories other than the `FeatureTokenizer` that it goes into.

    Those of `background` must also be the ones of `x`, in the same order.
    """
    if isinstance(x, pd.DataFrame) and isinstance(background, pd.DataFrame) and list(x.columns) != list(background):
        raise ValueError(
            f"`background` must have the columns of `x`, in the same order: `background[x.columns]`. Received: "
            f"{list(background.columns)}, and in `x`: {list(x.columns)}"
        )
    if background is not None:
        check_table(model, background)
    if not isinstance(model, keras.Model) or not hasattr(x, "__array__"):
        return
    for layer in all_layers(model):
        if isinstance(layer, keras.layers.Embedding) and _is_first(model, layer):
            _check_ids(layer, x)
        if isinstance(layer, FeatureTokenizer) and _is_first(model, layer):
            _check_order(x, layer.feature_names)
            if layer.cardinalities:
                _check_categories(layer, x)


def _check_ids(layer: Any, x: Any) -> None:
    array = np.asarray(in_arrays(x)) if not keras.ops.is_tensor(x) else keras.ops.convert_to_numpy(x)
    if array.dtype.kind not in "biuf":
        return  # the layer itself says what is wrong
    unknown = np.argwhere((array < 0) | (array >= layer.input_dim))
    if len(unknown):
        place = tuple(unknown[0].tolist())
        raise ValueError(
            f"The model knows the token ids from 0 to {layer.input_dim - 1}. Received {array[place]:g} at {place}, and "
            f"such ids in {len(np.unique(unknown[:, 0]))} of {len(array)} samples. Check that the vocabulary is the "
            "one of the training. `keras.layers.TextVectorization` gives words that it does not know the id 1."
        )


def _check_categories(layer: FeatureTokenizer, x: Any) -> None:
    array = np.asarray(in_arrays(x))
    names: list[Any] = list(layer.feature_names or range(array.shape[-1]))
    if array.ndim != 2 or array.shape[1] != len(names) or array.dtype.kind not in "biuf":
        return  # the layer itself says what is wrong
    for column, count in layer.cardinalities.items():
        _check_column(x, array[:, names.index(column)], column, count)


def _check_order(x: Any, names: Sequence[str] | None) -> None:
    columns = [str(column) for column in x.columns] if isinstance(x, pd.DataFrame) else []
    if names is not None and columns != list(names) and sorted(columns) == sorted(names):
        raise ValueError(
            "The columns of `x` have the names of the model's features, in another order, so the model would mistake "
            f"one for another. Put them into this order: {list(names)}. Received the columns: {columns}"
        )


def check_aligned(**given: Any) -> None:
    """Raises an error if what has labels, of samples or features, has them in another order than what comes before it.

    Everything is matched by place.
    """
    known: dict[str, tuple[str, pd.Index]] = {}
    for name, value in given.items():
        for axis, labels in _labels(value).items():
            first, expected = known.setdefault(axis, (name, labels))
            same = len(labels) == len(expected) and not labels.equals(expected)
            if same and sorted(map(str, labels)) == sorted(map(str, expected)):
                place = int(np.flatnonzero(labels != expected)[0])
                raise ValueError(
                    f"`{name}` has the {axis} labels of `{first}` in another order, and both are matched by place: at "
                    f"place {place} stands {labels[place]!r}, and there {expected[place]!r}. Put them into the same "
                    f"order. If they already are, give `{name}` as an array without labels, such as "
                    f"`{name}.to_numpy()`."
                )


def _labels(value: Any) -> dict[str, pd.Index]:
    """Of the samples and the features, as far as they have labels."""
    if isinstance(value, pd.DataFrame):
        return {"sample": value.index, "feature": value.columns.astype(str)}
    if isinstance(value, pd.Series):
        return {"sample": value.index}
    if not isinstance(value, xr.DataArray):
        return {}
    indexes = {axis: value.indexes[axis] for axis in ("sample", "feature") if axis in value.indexes}
    return {axis: index.astype(str) if axis == "feature" else index for axis, index in indexes.items()}


def _check_column(x: Any, values: np.ndarray, column: Any, count: int) -> None:
    known = np.isnan(values) | np.isin(values, np.arange(count))
    if known.all():
        return
    unknown = np.flatnonzero(~known)
    row = x.index[unknown[0]] if isinstance(x, pd.DataFrame) else int(unknown[0])
    raise ValueError(
        f"Column {column!r} has {count} categories in the model's `FeatureTokenizer`, the integers from 0 to "
        f"{count - 1}. Received {values[unknown[0]]:g} in row {row!r}, and such values in {len(unknown)} of "
        f"{len(values)} rows. Leave these rows out. To have a level for unseen categories, encode with "
        "`OrdinalEncoder(handle_unknown='use_encoded_value', unknown_value=...)`, and count that level in "
        "`cardinalities`, before the model is trained."
    )


def _is_first(model: Any, layer: Any) -> bool:
    """Whether the layer gets the inputs of the model as they are."""
    try:
        return len(model.inputs) == 1 and layer.input is model.inputs[0]
    except AttributeError:  # it is not known: one of them is called in a `call` of its own
        return False


def _is_real(dtype: Any) -> bool:
    return pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_complex_dtype(dtype)


def _refuse_objects(x: Any) -> None:
    for leaf in tree.flatten(x):
        if getattr(getattr(leaf, "dtype", None), "kind", "") != "O":
            continue
        others = [value for value in np.asarray(leaf).flat if not isinstance(value, str | bytes)]
        if others:
            raise ValueError(
                f"`x` is an array of Python's objects, such as {others[0]!r} of type {type(others[0]).__name__}. If "
                "all are numbers, `x.astype('float64')` makes an array of numbers. If `x` was a table, give the "
                "DataFrame: then the column that holds something else is named."
            )


def _refuse_columns(x: pd.DataFrame, others: list[int]) -> None:
    column = x.iloc[:, others[0]]
    given = np.flatnonzero(column.notna())
    bad = [place for place in given if not pd.api.types.is_number(column.iloc[place])]
    more = f", and these columns hold none either: {_named(x, others[1:])}" if others[1:] else ""
    numbers = pd.to_numeric(column.iloc[given].astype(object), errors="coerce")  # dates are none
    if len(given) and numbers.notna().all() and _is_real(numbers.dtype):
        raise ValueError(
            f"Column {x.columns[others[0]]!r} holds numbers of the type {column.dtype}, such as "
            f"{column.iloc[given[0]]!r}. Make numbers of them, as for the training of the model: "
            f"`x.astype({{{x.columns[others[0]]!r}: float}})`{more}."
        )
    row = [*bad, 0][0]
    raise ValueError(
        f"Column {x.columns[others[0]]!r} ({column.dtype}) holds {column.iloc[row]!r} in row {x.index[row]!r}, which "
        f"is not a number{more}. Encode categories as for the training of the model, with the same fitted "
        "`sklearn.preprocessing.OrdinalEncoder`, and convert dates to numbers, such as days since a fixed date. If the "
        "model was trained without such columns, leave them out."
    )


def _refuse_missing(x: pd.DataFrame, missing: np.ndarray) -> None:
    others = np.flatnonzero(missing.any(axis=0)).tolist()
    row = int(np.flatnonzero(missing[:, others[0]])[0])
    raise ValueError(
        f"Values are missing in {int(missing.any(axis=1).sum())} of {len(x)} rows, in {_named(x, others)}: the first "
        f"in column {x.columns[others[0]]!r}, row {x.index[row]!r}. Fill them as for the training of the model, with "
        "the same fitted `sklearn.impute.SimpleImputer(add_indicator=True)`, or leave these rows out: `x.dropna()`. If "
        "the model takes NaN, give `x.to_numpy('float64', na_value=numpy.nan)`, which is not checked."
    )


def _named(x: pd.DataFrame, places: list[int]) -> str:
    names = [repr(x.columns[place]) for place in places[:_NAMED]]
    more = len(places) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
