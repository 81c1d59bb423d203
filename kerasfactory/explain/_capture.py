"""Attention scores of any model, labeled, and a check that they are the model's."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import xarray as xr
from keras import ops

from kerasfactory import _backend
from kerasfactory._warnings import warn
from kerasfactory.explain._engine.attention import (
    ROW_SUM,
    Call,
    attention_axes,
    combined,
    float_scores,
    gate_of,
    output_projection,
)
from kerasfactory.explain._engine.labels import (
    Given,
    check_axes,
    check_same_lengths,
    given_labels,
    labels_of,
    sink_of,
    warn_of_padding,
    with_rows_of,
)
from kerasfactory.explain._engine.observe import Batch, observe, warn_of_difference
from kerasfactory.explain._engine.store import results_of, warn_of_nan
from kerasfactory.explain._engine.tables import check_table


def capture(
    model: keras.Model,
    x: Any,
    *,
    layers: str | Sequence[str] | None = None,
    feature_names: Sequence[str] | Sequence[Sequence[str]] | np.ndarray | Callable[[int], str] | None = None,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    store: str | os.PathLike[str] | None = None,
) -> dict[str, xr.DataArray]:
    r"""Reads the attention scores of a model for every sample in `x`, as labeled arrays.

    The model may be in any state, and is not changed: its weights, seeds and compiled functions stay the same, and so
    does what its layers remember of their latest call. It runs as in `model.predict`, with dropout off, and the scores
    are read beside each attention layer's own computation,

    $$
    A_h = \operatorname{softmax}\!\left(\frac{Q_h K_h^\top}{\sqrt{d}} + M\right) ,
    $$

    with the projected queries \(Q_h\) and keys \(K_h\) of head \(h\), of width \(d\), and the mask \(M\), 0 or
    \(-\infty\) (Vaswani et al. 2017, [*Attention Is All You Need*](https://arxiv.org/abs/1706.03762), section
    3.2.1). The scores of Keras' own layers are taken before dropout.

    Attention is captured anywhere in the model, in whatever layer:

    - `InterpretableMultiHeadAttention`, `keras.layers.MultiHeadAttention`, `keras.layers.GroupQueryAttention` and their
      subclasses. The scores are what the layer's `_compute_attention` returns.
    - In any other layer, such as those of KerasHub, `keras.layers.Attention` or one of your own: a softmax whose result
      is contracted, along the axis that it was taken over, with something that is not the same for all samples
      (`keras.ops.matmul`, `keras.ops.einsum` or `@`, or multiplied with it and summed). The scores are what the values
      are multiplied by, including whatever was done to the softmax before. If they are no longer weights (rows sum to
      more than 1), a warning says so. The first axis of the softmax is assumed to be that of the samples.
    - A call of `keras.ops.dot_product_attention`: its scores are computed again from its arguments.

    Without heads, the axis `head` has length 1. If there are several axes and it is not known which are heads, they are
    called `axis_2` and so on.

    Some models have an attention sink: a column of the softmax that stands for no key, and is dropped before the
    product with the values. It is left out here as well. Rows then sum to less than 1, and the rest is the coordinate
    `sink`. A sink that stays among the keys, with zeros as its value, is a key like the others.

    A layer may call functions of the backend directly, such as `torch.nn.functional.scaled_dot_product_attention`. They
    are read like those of Keras. The softmax may be written out, and its result multiplied by the values and summed. A
    softmax over the units of a dense layer that weights as many parts of the same position, as in a mixture of experts,
    does not count as attention.

    A warning names each layer that cannot be captured, with the reason: attention inside a `vmap` or a compiled loop,
    and layers whose class is called attention but in which no scores were seen. Linear attention forms no scores, and
    deformable attention has no keys. For layers that fold axes into the batch or hide their kernel, use
    `register_attention`. A function that a layer compiles by itself, by `jax.jit` or `tf.function`, is noticed only
    while it is traced: if it has run before, attention in it may be missing without a warning.

    Args:
        model: A `keras.Model`: `Sequential`, functional or subclassed, trained or not. A model without weights is
            built, as by `predict`.
        x: What `model.predict` takes: an array, a pandas DataFrame of numbers, a dictionary or list of arrays, a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, a torch `DataLoader`, or a generator of batches that ends.
            Labels in it are left out.
        layers: Names of the attention layers to capture; all of them if not given. A name that several layers
            of nested models share stands for all of them. A path (`block_1/attention`), or the end of one, tells them
            apart.
        feature_names: Names for the entries of an axis, one for each. They are put on the key axis, and on the query
            axis if it is as long. If not given, the columns of a DataFrame are used if there are as many, or else the
            names in the model's `FeatureTokenizer`, if the model has one tokenizer and one input. Or the words of each
            sample, which may repeat: an array of strings (sample, key), lists of strings, of which short ones are
            filled with `""` at the end, or a function from the ids in `x` to strings, such as
            `vectorize.get_vocabulary().__getitem__`. `""` is padding. The function is called once for each id; `x` is
            one array of integers, (sample, key), a dictionary with such `token_ids`, or batches of these.
        batch_size: Samples in a batch. Only for arrays; everything else comes in batches. If not given, as many as
            make 16,384 positions (columns of a table, or steps of a sequence) and 4,194,304 pairs of positions, at
            least 1 and at most 1,024; and 32 of pictures and strings.
        verbose: 0 for silence, 1 for a progress bar, 2 for one line; `"auto"` is 1, or 2 if Keras' interactive
            logging is off.
        store: A directory, `"scores.zarr"`, for results that do not fit into memory. They are written there batch by
            batch. After a crash, a kill or a full disk, the same call continues where it stopped, even with another
            `batch_size`. Stored samples are read from `x` again, to make sure that they are the same, and only the
            first batch of them runs through the model again. The call starts over if the result for a batch depends on
            earlier batches, as with random numbers. A call after the end returns what is stored. A lost or changed file
            is an error, either then or when the scores are read. Needs Zarr: `pip install ".[store]"` in a clone of
            this package's repository.

    Returns:
        dict[str, xr.DataArray]: From the layer's name to its scores, `float32` (or `float64`), with these dimensions,
        in the order in which the model calls the layers.

        - `sample`, `head`: with their numbers as coordinates. If `x` is a DataFrame, its index is the coordinate
          `sample`, in UTC if it has a time zone: `isel` finds samples by position, and `sel` by that index. If the
          model folds another axis into the batch (as windowed attention does), the first dimension holds all its
          sequences and is called `sequence`.
        - `query`, `key`: with the feature names as coordinates, where they are known. Words of each sample are the
          coordinates `query_token` (sample, query) and `key_token` (sample, key). With several attention axes,
          `query_0`, `query_1`, …, `key_0`, `key_1`, …; axes that are not attended over are `axis_1`, `axis_2`, …
          by their number.

        Each row, over the keys, sums to 1. A masked key has weight 0. A row whose keys are all masked is 0. With an
        attention sink, a coordinate `sink` (sample, head, query) is the weight that went to no key, from 0 to 1: 1
        minus the sum of the row. It is a variable of that name in a `store`.

        A layer that is called more than once in a forward pass has one entry for each call: `name#1`, `name#2`, …. The
        attributes hold the `layer`, its `class`, the `call`, the `masks` in force, by their names in Keras, the
        `backend`, the `keras_version`, and `prediction_difference`: how far the outputs for the first batch differ with
        and without observation, relative to the largest. `read_from` names the function that the scores were read
        from: `_compute_attention`, the layer's own, returned them; `softmax` made them, and the values were multiplied
        by them; `dot_product_attention` was called, and they are computed again from its arguments; an `adapter` that
        was registered returned them.

    Raises:
        ValueError: If the model has no attention layer, or none that can be captured; if a layer's name or the number
            of feature names is wrong, or a function returns no string for an id; if `x` is empty or without end, or its
            batches differ in length; if columns of a DataFrame hold anything but numbers, share a name, or are the
            features of the model's tokenizer in another order. Also if `store` is not a `*.zarr`, or belongs to other
            weights, another `x` or other arguments; if files in it are lost, changed or symbolic links; or if it was
            made before stores had checksums.
        RuntimeError: If a later batch calls other layers than the first, or if another process writes to the `store`.
        OSError: If the `store` cannot be written, as to a full disk. What was stored before stays valid.
        ImportError: If `store` is given, and Zarr is not installed.

    Warns:
        UserWarning: If a layer cannot be captured, if scores are NaN (as they are where `x` is), if words are `""` and
            a layer has no mask, or if the model gives different outputs with and without observation, as a model does
            whose outputs are random.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        inputs = keras.Input((4, 8))
        attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")
        attended = attention(inputs, inputs)
        model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(attended))

        x = np.random.default_rng(0).normal(size=(100, 4, 8))
        names = ["age", "pulse", "weight", "height"]
        scores = explain.capture(model, x, feature_names=names, verbose=0)

        print(scores["attention"].sizes)
        #> Frozen({'sample': 100, 'head': 2, 'query': 4, 'key': 4})
        mean = scores["attention"].mean(["sample", "head"])
        print(mean.sel(query="age").sum().round(3).item())
        #> 1.0
        ```
    """
    given = given_labels(x, feature_names)
    check_table(model, x)
    shapes: dict[str, tuple[int, ...]] = {}
    arguments = {"layers": [layers] if isinstance(layers, str) else layers and list(layers)}
    arguments |= {"feature_names": given.names or given.columns}
    with results_of(store, "capture", model, given.x, batch_size, arguments) as results:
        for batch in observe(model, results.x, layers, results.batch_size, verbose, float_scores, only_scores=True):
            is_first = not shapes
            scores = _checked_scores(batch, shapes, given)
            if is_first:
                _warn_of_no_weights(batch, scores)
            # A NaN in a query or a key makes its whole row NaN: one column tells.
            nan = {name: np.isnan(rows[..., 0]).reshape(len(rows), -1).any(axis=1) for name, rows in scores.items()}
            arrays = {name: _arrays(rows, batch.found[name].has_sink) for name, rows in scores.items()}
            labeled = functools.partial(_labeled, model, batch, given)
            results.append(batch, arrays, nan, labeled)
        results.finish()
    warn_of_difference(model, batch.difference)
    warn_of_nan(results.nan, results.rows)
    warn_of_padding(given, batch)
    scores_of = {name: given.on(_scores(dataset).rename(name)) for name, dataset in results.open().items()}
    return {name: with_rows_of(x, scores) for name, scores in scores_of.items()}


def recomposition_error(
    model: keras.Model,
    x: Any,
    *,
    layers: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    verbose: int | str = "auto",
) -> dict[str, float]:
    r"""Measures how far each attention layer's output differs from the output that its captured scores give.

    If the scores \(A_h\) that `capture` returns are the ones that the model used, then they and the projected
    values \(V_h\) give the layer's output again:

    $$
    \operatorname{error} = \frac{\max \left| \operatorname{concat}_h(A_h V_h)\, W^O + b^O - \text{output} \right|}
    {\max \left| \text{output} \right|} .
    $$

    The output is the real output of the layer, read while the model runs, however the layer computed it (Keras may use
    a fused kernel that never forms the scores). With `use_gate=True`, the gate is applied as in the layer.

    If the scores were read from a softmax (the attribute `read_from` of `capture`), the layer itself computes the
    product with the values, so the error is 0 or nearly 0. It then says that these numbers weight something in the
    layer, and not that the output of the layer is nothing else.

    Queries whose keys are all masked are left out: their scores are 0, and Keras' output for them is 0 or the mean of
    all values, depending on how it computes attention.

    Args:
        model: A `keras.Model`, as for `capture`.
        x: Inputs, as for `capture`.
        layers: Names of the layers, as for `capture`.
        batch_size: Samples in a batch, as for `capture`.
        verbose: As for `capture`.

    Returns:
        dict[str, float]: From the names that `capture` gives to errors, at least 0, without unit. Expect 1e-7
        to 1e-5 in single precision, 1e-3 with `float16`, 1e-2 with `bfloat16`. A large number means that the output is
        not made from these scores. A subclass may do something else with them, or drop some at inference.

    Raises:
        ValueError: As `capture`, and if a layer calls `_compute_attention` more than once in a call.
        RuntimeError: As `capture`.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        inputs = keras.Input((4, 8))
        attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")
        attended = attention(inputs, inputs)
        model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(attended))

        x = np.random.default_rng(0).normal(size=(100, 4, 8))
        print(explain.recomposition_error(model, x, verbose=0)["attention"] < 1e-5)
        #> True
        ```
    """
    check_table(model, x)
    errors: dict[str, float] = {}
    largest: dict[str, float] = {}
    for batch in observe(model, x, layers, batch_size, verbose, _recomposed):
        for name, (error, size) in batch.measured.items():
            errors[name] = float(np.fmax(errors.get(name, 0.0), _backend.as_numpy(error)))
            largest[name] = float(np.fmax(largest.get(name, 0.0), _backend.as_numpy(size)))
    return {name: error / largest[name] if error else 0.0 for name, error in errors.items()}


def _checked_scores(batch: Batch, shapes: dict[str, tuple[int, ...]], given: Given) -> dict[str, np.ndarray]:
    """The scores of a batch, which have the axes that they can be labeled with, and are as long as all others."""
    scores = {name: _backend.as_numpy(measured) for name, measured in batch.measured.items()}
    for name, rows in scores.items():
        if name not in shapes:
            check_axes(name, batch.found[name].layer, rows.shape, given)
            shapes[name] = rows.shape[1:]
        check_same_lengths(name, rows.shape[1:], shapes[name])
    return scores


def _arrays(scores: np.ndarray, has_sink: bool) -> dict[str, np.ndarray]:
    return {"scores": scores} | ({"sink": sink_of(scores)} if has_sink else {})


def _warn_of_no_weights(batch: Batch, scores: dict[str, np.ndarray]) -> None:
    """Warns of scores that no softmax has given: what was taken for them may be something else."""
    for name, rows in scores.items():
        sums = rows.sum(axis=-1) if batch.found[name].path else np.zeros(1)
        if sums.max() > 1 + ROW_SUM or rows.min(initial=0) < 0:
            warn(
                f"The scores of layer {name!r} are not weights: rows over the keys sum to up to {sums.max():.3g}, and "
                f"the smallest entry is {rows.min():.3g}. Either the layer changes its softmax, as dropout does, or "
                "its values are weighted with something else. Use `explain.register_attention` to say how such a layer "
                "is read."
            )


def _labeled(model: Any, batch: Batch, given: Given, layer: str, arrays: dict[str, np.ndarray]) -> xr.Dataset:
    scores = arrays["scores"]
    labels = labels_of(model, batch, layer, scores.shape, given, len(scores) != batch.size)
    dataset = xr.Dataset({"scores": xr.DataArray(scores, **labels)})
    return dataset.assign(sink=(labels["dims"][:-1], arrays["sink"])) if "sink" in arrays else dataset


def _scores(dataset: xr.Dataset) -> xr.DataArray:
    """What `_labeled` made, with the sink as a coordinate: only variables grow."""
    return dataset.set_coords([name for name in dataset.data_vars if name == "sink"])["scores"]


def _recomposed(call: Call) -> Any:
    """The largest difference between the output and what scores and values make, and the largest output."""
    layer = call.layer
    if call.products is not None:
        made, real = (ops.cast(tensor, "float32") for tensor in call.products(call.scores))
        return ops.max(ops.abs(made - real)), ops.max(ops.abs(real))
    if call.output is None:
        raise ValueError(
            f"Layer {layer.name!r} calls its `_compute_attention` more than once: there is no one set of scores that "
            "makes its output."
        )
    heads, gate = combined(layer, call.scores, call.value), gate_of(layer, call.query)
    heads = heads if gate is None else ops.multiply(heads, gate)
    recomposed = ops.cast(output_projection(layer)(heads), "float32")
    output = ops.cast(call.output, "float32")

    axes = attention_axes(layer)
    other = [axis for axis in range(len(output.shape) - 1) if axis not in axes]
    keys = tuple(range(-len(axes), 0))
    sees_a_key = ops.all(ops.any(call.scores != 0, axis=keys), axis=len(other))  # (other axes, query axes)
    sees_a_key = ops.expand_dims(ops.transpose(sees_a_key, np.argsort([*other, *axes]).tolist()), -1)
    return (
        ops.max(ops.where(sees_a_key, ops.abs(recomposed - output), 0.0)),
        ops.max(ops.where(sees_a_key, ops.abs(output), 0.0)),
    )
