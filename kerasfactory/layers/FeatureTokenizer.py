"""One token per column of a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasfactory._arguments import checked_names, positive_integer

# Half precision counts no further without leaving numbers out.
_LARGEST_COUNT = {"float16": 2049, "bfloat16": 257}


@keras.saving.register_keras_serializable(package="kerasfactory.layers")
class FeatureTokenizer(keras.layers.Layer):
    r"""Turns each feature of a table into a token, so that attention over tokens is attention over features.

    A numerical feature \(x_f\) becomes \(x_f\, w_f + b_f\), with a vector \(w_f\) and a vector \(b_f\) learned for that
    feature. A categorical feature becomes the embedding of its category, learned for that feature. This is the
    tokenizer of the FT-Transformer (Gorishniy et al. 2021, [*Revisiting Deep Learning Models for Tabular
    Data*](https://arxiv.org/abs/2106.11959), section 3.3), without the bias of a categorical feature, because its
    embedding contains it. Weights start uniform in \(\pm 1/\sqrt{d_\text{token}}\), as there.

    Numbers should be on one scale: standardize them first. Fill missing values first, too: the token of a missing value
    is NaN, and so is the token of a category that does not exist, so that neither is mistaken for data.

    Args:
        d_token: Size of a token. A positive integer.
        feature_names: Names of the columns, in their order. They are kept in the layer's config and survive
            `.keras` files.
        cardinalities: Number of categories of each categorical column, whose values are then the integers
            from 0 up to, but not including, that number. Either a mapping from column name (or, without
            `feature_names`, column index) to number, or a sequence with one entry per column, `None` for
            numerical ones. Columns not mentioned are numerical.
        **kwargs: `name`, `dtype` and `trainable`, as on every Keras layer.

    Call arguments:
        - `inputs`: Tensor of shape `(batch, feature)`, of any numeric dtype.

    Returns:
        tensor: Tokens, of shape `(batch, feature, d_token)`.

    Raises:
        ValueError: If an argument is outside its range, names repeat, a cardinality is given for a column that
            does not exist, or the inputs are not `(batch, feature)` with one column per name.

    Example:
        ```python
        import numpy as np

        from kerasfactory.layers import FeatureTokenizer

        names = ["age", "income", "region"]
        tokenizer = FeatureTokenizer(8, feature_names=names, cardinalities={"region": 4})
        tokens = tokenizer(np.array([[0.3, -1.2, 2], [1.1, 0.4, 0]]))

        print(tokens.shape)
        #> (2, 3, 8)
        ```

        `get_config` returns all arguments, and `from_config` makes a new layer of them, with new weights:

        ```python
        from kerasfactory.layers import FeatureTokenizer

        names = ["age", "income", "region"]
        tokenizer = FeatureTokenizer(8, feature_names=names, cardinalities={"region": 4})
        copy = FeatureTokenizer.from_config(tokenizer.get_config())
        print(copy.get_config() == tokenizer.get_config())
        #> True
        ```
    """

    def __init__(
        self,
        d_token: int,
        feature_names: Sequence[str] | None = None,
        cardinalities: Mapping[str, int] | Mapping[int, int] | Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> None:
        # A half-precision input would round category 2049 to 2048; the layer converts its inputs itself.
        super().__init__(autocast=False, **kwargs)
        self.d_token = positive_integer("d_token", d_token)
        self.feature_names = None if feature_names is None else checked_names(feature_names)
        self.cardinalities = _checked_cardinalities(cardinalities, self.feature_names)
        # How many columns the inputs have, as soon as that is known.
        self._columns = len(self.feature_names) if self.feature_names else None
        if self._columns is None and isinstance(cardinalities, list | tuple):
            self._columns = len(cardinalities)

    def build(self, input_shape):
        self._check_shape(input_shape)
        self._columns = input_shape[-1]
        columns = range(self._columns)
        counts = {self._column(key): count for key, count in self.cardinalities.items()}
        if any(column not in columns for column in counts):
            raise ValueError(
                f"`cardinalities` names a column that inputs of shape {tuple(input_shape)} do not have. Received: "
                f"cardinalities={self.cardinalities}"
            )
        self._numerical = [column for column in columns if column not in counts]
        self._categorical = sorted(counts)
        self._counts = [counts[column] for column in self._categorical]
        # Tokens are computed kind by kind; this puts them back into the order of the columns.
        kinds = self._numerical + self._categorical
        self._order = [kinds.index(column) for column in columns]

        limit = self.d_token**-0.5
        if self._numerical:
            shape = (len(self._numerical), self.d_token)
            self.kernel = self.add_weight(
                shape=shape,
                initializer=keras.initializers.RandomUniform(-limit, limit),
                autocast=False,
                name="kernel",
            )
            self.bias = self.add_weight(
                shape=shape,
                initializer=keras.initializers.RandomUniform(-limit, limit),
                autocast=False,
                name="bias",
            )
        if self._categorical:
            self.embeddings = self.add_weight(
                shape=(sum(self._counts), self.d_token),
                initializer=keras.initializers.RandomUniform(-limit, limit),
                autocast=False,
                name="embeddings",
            )

    def call(self, inputs):
        self._check_shape(inputs.shape)
        tokens = []
        if self._numerical:
            numbers = ops.cast(ops.take(inputs, self._numerical, axis=1), self.variable_dtype)
            tokens.append(numbers[:, :, None] * self.kernel + self.bias)
        if self._categorical:
            values = ops.take(inputs, self._categorical, axis=1)
            largest = _LARGEST_COUNT.get(keras.backend.standardize_dtype(values.dtype))
            if largest is not None and max(self._counts) > largest:
                raise ValueError(
                    f"Inputs of dtype {values.dtype} cannot tell more than {largest} categories apart. Give the inputs "
                    "as integers or float32, and begin a `Sequential` model with `keras.Input`, since it casts its "
                    f"inputs otherwise. Received: cardinalities={self.cardinalities}"
                )
            counts = ops.cast(self._counts, "int32")
            categories = ops.cast(values, "int32")
            exists = (categories >= 0) & (categories < counts) & (ops.cast(categories, values.dtype) == values)
            # All embeddings lie in one table, feature after feature.
            rows = ops.where(exists, categories, 0) + ops.cumsum(counts) - counts
            tokens.append(ops.where(exists[:, :, None], ops.take(self.embeddings, rows, axis=0), float("nan")))
        if len(tokens) == 2:
            tokens = [ops.take(ops.concatenate(tokens, axis=1), self._order, axis=1)]
        return ops.cast(tokens[0], self.compute_dtype)

    def compute_output_shape(self, input_shape):
        self._check_shape(input_shape)
        return (*input_shape, self.d_token)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=self.compute_dtype)

    def get_config(self):
        config = super().get_config()
        return {
            **config,
            "d_token": self.d_token,
            "feature_names": self.feature_names and list(self.feature_names),
            "cardinalities": dict(self.cardinalities) or None,
        }

    def _column(self, key):
        return self.feature_names.index(key) if self.feature_names else key

    def _check_shape(self, shape):
        shape = tuple(shape)
        if len(shape) != 2 or not shape[-1]:
            raise ValueError(f"The inputs must have shape (batch, feature). Received: shape={shape}")
        if self._columns is not None and shape[-1] != self._columns:
            if self.feature_names:
                expected = f"one column per feature name, {self._columns} ({', '.join(self.feature_names)})"
            elif self.built:
                expected = f"{self._columns} columns, as when the layer was built"
            else:
                expected = f"one column per entry of `cardinalities`, {self._columns}"
            raise ValueError(f"The inputs must have {expected}. Received: shape={shape}")


def _checked_cardinalities(cardinalities: Any, names: list[str] | None) -> dict[Any, int]:
    if cardinalities is None:
        return {}
    if isinstance(cardinalities, list | tuple):
        if names and len(cardinalities) != len(names):
            raise ValueError(
                f"`cardinalities` as a sequence must have one entry per column, {len(names)}, with None for numerical "
                f"ones. Received: cardinalities={cardinalities!r}"
            )
        cardinalities = {column: count for column, count in enumerate(cardinalities) if count is not None}
    if not isinstance(cardinalities, Mapping):
        raise ValueError(
            "`cardinalities` must be a mapping from column to number of categories, or a sequence with one entry per "
            f"column. Received: cardinalities={cardinalities!r}"
        )
    checked: dict[Any, int] = {}
    for given, count in cardinalities.items():
        key = given
        # JSON, as in `.keras` files, turns the keys of a mapping into strings.
        if names is None and isinstance(key, str) and key.isdecimal():
            key = int(key)
        if isinstance(key, int | np.integer) and not isinstance(key, bool):
            key = int(key)
            if names is not None and 0 <= key < len(names):
                key = names[key]
        if key not in names if names is not None else type(key) is not int or key < 0:
            expected = f"one of {names}" if names is not None else "a column index, as no `feature_names` are given"
            raise ValueError(f"`cardinalities` has an unknown column: expected {expected}. Received: {given!r}")
        if key in checked:
            raise ValueError(f"`cardinalities` gives column {key!r} twice. Received: {dict(cardinalities)!r}")
        checked[key] = positive_integer(f"cardinalities[{given!r}]", count)
    return checked
