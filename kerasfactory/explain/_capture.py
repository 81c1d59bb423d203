"""Attention scores of any model, labeled, and the proof that they are the model's."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import xarray as xr
from keras import ops

from kerasfactory import _backend
from kerasfactory._arguments import checked_names
from kerasfactory.explain._engine.attention import Call, attention_axes, float_scores
from kerasfactory.explain._engine.labels import check_axes, labels_of
from kerasfactory.explain._engine.observe import Batch, observe, rounding_of
from kerasfactory.explain._engine.store import Store


def capture(
    model: keras.Model,
    x: Any,
    *,
    layers: str | Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    store: str | os.PathLike[str] | None = None,
) -> dict[str, xr.DataArray]:
    r"""The attention scores of a model, for every sample in `x`, as labeled arrays.

    It takes any model, at any moment, and does not change it: neither its weights, seeds and compiled functions,
    nor what its layers remember of their latest call. The model runs as `model.predict` would run it, with
    dropout off, and next to each attention layer's own computation its scores are read,

    $$
    A_h = \operatorname{softmax}\!\left(\frac{Q_h K_h^\top}{\sqrt{d}} + M\right) ,
    $$

    with the projected queries \(Q_h\) and keys \(K_h\) of head \(h\), of width \(d\), and the mask \(M\), 0 or
    \(-\infty\) (Vaswani et al. 2017, [*Attention Is All You Need*](https://arxiv.org/abs/1706.03762), section
    3.2.1). They are taken before dropout.

    Captured are `InterpretableMultiHeadAttention`, `keras.layers.MultiHeadAttention`,
    `keras.layers.GroupQueryAttention` and their subclasses that compute scores in `_compute_attention`, wherever
    they are in the model. Of a subclass the scores are what its own `_compute_attention` returns. A layer
    that cannot be captured is named in a warning.

    Args:
        model: A `keras.Model`: `Sequential`, functional or subclassed, trained or not. One that has no weights yet
            gets them, as from `predict`.
        x: What `model.predict` takes: an array, a dictionary or list of arrays, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a torch `DataLoader`, or a generator of batches that ends. Labels in it are
            left out.
        layers: Names of the attention layers to capture; all of them if not given. A name that several layers
            of nested models share stands for all of them; their paths (`block_1/attention`) tell them apart.
        feature_names: Names for the entries of an axis, one for each. They go onto the key axis, and onto the query
            axis if it is as long. If not given, the names in the model's `FeatureTokenizer` are used where they
            fit, provided that the model has one tokenizer and one input.
        batch_size: Samples in a batch, 32 if not given. Only for arrays; everything else comes in batches.
        verbose: 0 for silence, 1 for a progress bar, 2 for one line; `"auto"` is 1, or 2 if Keras' interactive
            logging is off.
        store: A directory, `"scores.zarr"`, for results that do not fit into memory. They are written there batch by
            batch. After a crash or a kill the same call continues where it was: batches that are stored are read
            from `x` again, to make sure that they are the same, and the model does not run on them. It starts over
            if what the model does with a batch depends on those before, as with random numbers. Called once more,
            it returns what is stored. Needs `pip install 'kerasfactory[store]'`.

    Returns:
        dict[str, xr.DataArray]: From the layer's name to its scores, `float32` (or `float64`), with these dimensions,
        in the order in which the model calls the layers.

        - `sample`, `head`: with their numbers as coordinates. If the model folds another axis into the batch (as
          windowed attention does), the first dimension holds all its sequences and is called `sequence`.
        - `query`, `key`: with the feature names as coordinates, where they are known. With several attention axes,
          `query_0`, `query_1`, …, `key_0`, `key_1`, …; axes that are not attended over are `axis_1`, `axis_2`, …
          by their number.

        Rows (over the keys) sum to 1. A masked key has weight 0, and so has every key of a query that may look at none.
        A layer that is called more than once in a forward pass has one entry for each call: `name#1`, `name#2`, ….
        The attributes say the `layer`, its `class`, the `call`, the `masks` in force, by their names in Keras, the
        `backend`, the `keras_version`, and `prediction_difference`: how far the outputs for the first batch lie apart
        with and without observation, relative to the largest.

    Raises:
        ValueError: If the model has no attention layer, or none that can be captured; if a layer's name or the
            number of feature names is wrong; if `x` is empty or without end, or its batches differ in length.
            Also if `store` is no `*.zarr`, or belongs to other weights, another `x` or other arguments.
        RuntimeError: If a later batch calls other layers than the first, or if another process writes to the `store`.
        ImportError: If `store` is given, and Zarr is not installed.

    Warns:
        UserWarning: If a layer cannot be captured, if scores are NaN (as they are where `x` is), or if the model
            gives different outputs with and without observation, as a model does whose outputs are random.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        inputs = keras.Input((4, 8))
        attended = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")(inputs, inputs)
        model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(attended))

        x = np.random.default_rng(0).normal(size=(100, 4, 8))
        scores = explain.capture(model, x, feature_names=["age", "pulse", "weight", "height"], verbose=0)

        print(scores["attention"].sizes)
        #> Frozen({'sample': 100, 'head': 2, 'query': 4, 'key': 4})
        print(scores["attention"].mean(["sample", "head"]).sel(query="age").sum().round(3).item())
        #> 1.0
        ```
    """
    names = None if feature_names is None else checked_names(feature_names)
    shapes: dict[str, tuple[int, ...]] = {}
    if store is not None:
        arguments = {"layers": [layers] if isinstance(layers, str) else layers and list(layers), "feature_names": names}
        with Store(store, "capture", model, x, batch_size, arguments, rounding_of) as stored:
            for batch in observe(model, stored, layers, None, verbose, float_scores, only_scores=True):
                datasets = {}
                for name, rows in _checked_scores(batch, shapes, names).items():
                    labels = labels_of(model, batch, name, rows.shape, names, len(rows) != batch.size)
                    datasets[name] = xr.Dataset({"scores": xr.DataArray(rows, **labels)})
                stored.append(datasets, batch.changes_state)
            stored.finish()
        _warn(model, batch.difference, stored.nan, stored.rows)
        return {name: dataset["scores"].rename(name) for name, dataset in stored.open().items()}

    arrays: dict[str, np.ndarray] = {}
    filled: dict[str, int] = {}
    folded: set[str] = set()
    nan: dict[str, list[int]] = {}
    for batch in observe(model, x, layers, batch_size, verbose, float_scores, only_scores=True):
        for name, rows in _checked_scores(batch, shapes, names).items():
            if name not in arrays:
                arrays[name] = np.empty((len(rows) * (batch.expected or 1), *rows.shape[1:]), rows.dtype)
                filled[name] = 0
            array, start = arrays[name], filled[name]
            filled[name] = stop = start + len(rows)
            if stop > len(array):  # in place, so that the result never lies in memory twice
                array.resize((stop, *array.shape[1:]), refcheck=False)
            array[start:stop] = rows
            if len(rows) != batch.size:
                folded.add(name)
            # A NaN in a query or a key makes its whole row NaN: one column tells.
            found = np.flatnonzero(np.isnan(rows[..., 0]).reshape(len(rows), -1).any(axis=1))
            if len(found):
                count, first = nan.get(name, [0, start + int(found[0])])
                nan[name] = [count + len(found), first]

    _warn(model, batch.difference, nan, filled)
    result = {}
    for name, array in arrays.items():
        array.resize((filled[name], *array.shape[1:]), refcheck=False)
        labels = labels_of(model, batch, name, array.shape, names, name in folded)
        labels["coords"] = {labels["dims"][0]: np.arange(len(array))} | labels["coords"]
        result[name] = xr.DataArray(array, name=name, **labels)
    return result


def recomposition_error(
    model: keras.Model,
    x: Any,
    *,
    layers: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    verbose: int | str = "auto",
) -> dict[str, float]:
    r"""How far the output of each attention layer lies from what its captured scores make of its values.

    If the scores \(A_h\) that `capture` returns are the ones that the model used, then they and the projected
    values \(V_h\) give the layer's output again:

    $$
    \operatorname{error} = \frac{\max \left| \operatorname{concat}_h(A_h V_h)\, W^O + b^O - \text{output} \right|}
    {\max \left| \text{output} \right|} .
    $$

    The output is the layer's real one, read while the model runs, whichever way the layer computed it (Keras may
    use a fused kernel that never forms the scores). With a gate (`use_gate=True`), the gate is applied as the layer
    does.

    Queries that may look at no key are left out: their scores are 0, and Keras' output for them is, depending on the
    way it took, 0 or the mean of all values.

    Args:
        model: A `keras.Model`, as for `capture`.
        x: Inputs, as for `capture`.
        layers: Names of the layers, as for `capture`.
        batch_size: Samples in a batch, as for `capture`.
        verbose: As for `capture`.

    Returns:
        dict[str, float]: From the names that `capture` gives to errors, at least 0, without unit. Expect 1e-7
        to 1e-5 in single precision, 1e-3 with `float16`, 1e-2 with `bfloat16`. A large number means that the output
        is not made of these scores, as when a subclass does something else with them, or drops some at inference.

    Raises:
        ValueError: As `capture`, and if a layer calls `_compute_attention` more than once in a call.
        RuntimeError: As `capture`.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        inputs = keras.Input((4, 8))
        attended = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")(inputs, inputs)
        model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(attended))

        x = np.random.default_rng(0).normal(size=(100, 4, 8))
        print(explain.recomposition_error(model, x, verbose=0)["attention"] < 1e-5)
        #> True
        ```
    """
    errors: dict[str, float] = {}
    largest: dict[str, float] = {}
    for batch in observe(model, x, layers, batch_size, verbose, _recomposed):
        for name, (error, size) in batch.measured.items():
            errors[name] = float(np.fmax(errors.get(name, 0.0), _backend.as_numpy(error)))
            largest[name] = float(np.fmax(largest.get(name, 0.0), _backend.as_numpy(size)))
    return {name: error / largest[name] if error else 0.0 for name, error in errors.items()}


def _checked_scores(batch: Batch, shapes: dict[str, tuple[int, ...]], names: list[str] | None) -> dict[str, np.ndarray]:
    """The scores of a batch, which have the axes that they can be labeled with, and are as long as all others."""
    scores = {name: _backend.as_numpy(measured) for name, measured in batch.measured.items()}
    for name, rows in scores.items():
        if name not in shapes:
            check_axes(name, batch.found[name].layer, rows.shape, names)
            shapes[name] = rows.shape[1:]
        if rows.shape[1:] != shapes[name]:
            raise ValueError(
                f"The scores of layer {name!r} have shape {rows.shape} in one batch, and {shapes[name]} a "
                "sample in those before: the batches in `x` differ in length. Pad them all to one length, or "
                "capture each by itself."
            )
    return scores


def _recomposed(call: Call) -> Any:
    """The largest difference between the output and what scores and values make, and the largest output."""
    layer = call.layer
    if call.output is None:
        raise ValueError(
            f"Layer {layer.name!r} calls its `_compute_attention` more than once: no single scores make its output."
        )
    heads = ops.einsum(layer._combine_equation, call.scores, call.value)
    if getattr(layer, "_use_gate", False) or getattr(layer, "use_gate", False):
        heads = ops.multiply(heads, layer._gate_dense(call.query))
    recomposed = ops.cast(layer._output_dense(heads), "float32")
    output = ops.cast(call.output, "float32")

    axes = attention_axes(layer)
    other = [axis for axis in range(len(output.shape) - 1) if axis not in axes]
    keys = tuple(range(-len(axes), 0))
    looks = ops.all(ops.any(call.scores != 0, axis=keys), axis=len(other))  # (other axes, query axes)
    looks = ops.expand_dims(ops.transpose(looks, np.argsort([*other, *axes]).tolist()), -1)
    return (
        ops.max(ops.where(looks, ops.abs(recomposed - output), 0.0)),
        ops.max(ops.where(looks, ops.abs(output), 0.0)),
    )


def _warn(model: Any, difference: float, nan: dict[str, list[int]], filled: dict[str, int]) -> None:
    if not difference <= rounding_of(model):
        warnings.warn(
            "The model's outputs for the first batch differ when it is observed, by "
            f"{difference:.1e} of the largest. The scores belong to the run that was observed, not to what `predict` "
            "returns. Outputs that are random, or depend on how often the model was called, do this.",
            stacklevel=3,
        )
    _warn_of_nan(nan, filled)


def _warn_of_nan(nan: dict[str, list[int]], filled: dict[str, int]) -> None:
    for name, (count, first) in nan.items():
        warnings.warn(
            f"The scores of layer {name!r} are NaN in {count} of {filled[name]} samples, the first of them number "
            f"{first}. Look for NaN or infinite numbers in these samples, and in the model's weights.",
            stacklevel=4,
        )
