"""From attention scores to one number for each feature."""

import difflib
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import xarray as xr
from keras import ops, tree

from kerasfactory import _backend
from kerasfactory._arguments import generator
from kerasfactory._warnings import warn
from kerasfactory.explain._engine.attention import Call, attention_axes, float_scores, gate_of, output_projection
from kerasfactory.explain._engine.data import batches_of, progress_bar, size_of
from kerasfactory.explain._engine.edit import editor
from kerasfactory.explain._engine.labels import (
    Given,
    check_axes,
    check_same_lengths,
    given_labels,
    labels_of,
    with_rows_of,
)
from kerasfactory.explain._engine.observe import Batch, observe, warn_of_difference
from kerasfactory.explain._engine.outputs import asked_output, check_target, checked_task, describe_target
from kerasfactory.explain._engine.tables import check_table
from kerasfactory.explain._engine.tokens import as_float, integral, missed, token_scaler
from kerasfactory.explain._engine.view import masks_of, reached, special_keys

_METHODS = ("attention", "rollout", "attention_gradient", "value_norm", "integrated_gradients", "uniform", "random")
_WITH_GRADIENT = ("attention_gradient", "integrated_gradients")
_NO_GRADIENT = (
    "The gradient is 0 for every sample at {}. Either the output does not depend on them, or it passes on no gradient, "
    "as with a rounded output or a label (`argmax`). Explain a model that returns probabilities or "
    "logits: `keras.Model(model.inputs, model.outputs)` leaves out a `predict_step` of your own, and "
    "`keras.Model(model.inputs, model.get_layer(NAME).output)` all layers after one."
)
_INCOMPLETE = 0.05  # a completeness error that is warned of
_NO_DISTRIBUTION = 0.02  # by how much a row of scores may miss 1: that much is rounding in half precision


def attribute(
    model: keras.Model,
    x: Any,
    *,
    method: str = "attention",
    task: str | None = None,
    target: int | str | tuple[int | str, ...] | None = None,
    query: int | str | None = None,
    layers: str | Sequence[str] | None = None,
    feature_names: Sequence[str] | Sequence[Sequence[str]] | np.ndarray | Callable[[int], str] | None = None,
    special_tokens: Sequence[int] | Sequence[str] | None = None,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    seed: int = 0,
) -> xr.DataArray:
    r"""Attributes a model's output to the features of each sample, by one of several readings of its attention.

    The readings disagree, and none of them is right by construction. Compare them, and test what they say ([*Reading
    attention honestly*][reading-attention-honestly]). A feature is a position of the key axis: a column of a table
    after a `FeatureTokenizer`, or else a position of the sequence that is attended to. With \(A_{hij}\), the weight of
    key \(j\) for query \(i\) in head \(h\) of \(H\), and \(\bar A\), its mean over the heads, the methods are

    - `"attention"`: \(\bar A_{ij}\), the mean over the layers. **Rows of the result sum to 1**, or to less where an
      attention sink takes a part of the weight.

    - `"rollout"`: the attention of all layers multiplied, as `rollout` does it. **Rows sum to 1.** (Abnar & Zuidema
      2020, [*Quantifying Attention Flow in Transformers*](https://arxiv.org/abs/2005.00928))

    - `"attention_gradient"`: with the gradient of the output \(y\) of the `target` by the weights, and from the first
      layer to the last,

        $$
        R \leftarrow R + \frac{1}{H} \sum_h \left(\frac{\partial y}{\partial A_h} \odot A_h\right)^{\!+} R,
        \qquad R_0 = I ,
        $$

        and \(R - I\) is returned. Rows do not sum to 1. Entries are 0 or more, and in the unit of the output if there
        is one layer. (Chefer et al. 2021, [*Generic Attention-model Explainability*](https://arxiv.org/abs/2103.15679),
        equations 5 and 6: the form without relevance propagation.)

    - `"value_norm"`: the length of what the key adds to the layer's output,

        $$
        \left\lVert \sum_h A_{hij}\, \left(x_j W^V_h + b^V_h\right) W^O_h \right\rVert_2 ,
        $$

        as the mean over the layers. Rows do not sum to 1. Entries are 0 or more, in the unit of the layer's output. The
        vectors themselves, summed over the keys, plus the bias of the output, are that output. (Kobayashi et al. 2020,
        [*Attention is Not Only a Weight*](https://arxiv.org/abs/2004.10102).) For attention in other layers than Keras'
        layers with heads, no projection \(W^O\) is known. Then it is the length of what the key adds to the result of
        the attention itself, with the values \(v_{hj}\) of the heads side by side,

        $$
        \sqrt{\sum_h \bigl(A_{hij} \lVert v_{hj} \rVert_2\bigr)^2} .
        $$

        `keras.layers.Attention` and `AdditiveAttention` have no projection: it is exact for them.

    - `"integrated_gradients"`: a reading of the whole model, not of its attention, to compare with the others. It
      distributes the change of the output \(y\) of the `target`, along the straight path from \(x = 0\), over the
      tokens \(x_j\) that become the keys,

        $$
        \sum_c x_{jc} \int_0^1 \frac{\partial y(\alpha x)}{\partial x_{jc}} \, d\alpha .
        $$

        Entries are signed, in the unit of the output, and rows sum to \(y(x) - y(0)\) up to the error of the integral,
        which is the attribute `completeness_error`. (Sundararajan et al. 2017, [*Axiomatic Attribution for Deep
        Networks*](https://arxiv.org/abs/1703.01365).)

    - `"uniform"`: a control that knows nothing, 1 divided by the number of features in view. **Rows sum to 1.**

    - `"random"`: another control, drawn uniformly from all distributions over the features in view. **Rows sum to 1.**

    The result is the mean over the queries, which suits a model that pools them, or the row of one `query`, which suits
    a model that decides by one position. Queries without a key in view, such as padding, are left out of the mean.

    A key is in view of a sample if any query, or the one `query`, attends to it in any of the layers. Without masks,
    all keys are in view. Masked keys get 0, and are not in view. There is one exception: in `"rollout"` and, with
    several layers, in `"attention_gradient"`, a masked position that attends to others itself passes on what it holds.
    A sample without any key in view gets zeros. `special_tokens` are out of view as well: they keep their attribution,
    but the controls give them 0, and `faithfulness`, `seed_agreement` and `parameter_randomization` leave them out.

    The gradient is that of the model's output, without any change. After a softmax or a sigmoid it is small where the
    model is sure. A model that ends in logits does not have this problem. With one output that tells no classes apart,
    only what raises it counts.

    Integrated gradients start from the tokens: what a `FeatureTokenizer` or a `keras.layers.Embedding` returns, or else
    an input of floats, (sample, position, channel). The whole model sees the scaled tokens, and so do residual
    connections. All embeddings (sample, position, channel) that become keys count together. Embeddings without an axis
    of samples, such as those of positions, stay as they are. So do a class token and tokens that are not in view, which
    get 0. The class is the one predicted for the sample, all along the path. `query` and `layers` change nothing,
    except that the keys of the first of the `layers` are the features. The integral is taken by Gauss–Legendre
    quadrature with 32 nodes, and with 256 for a sample whose row misses \(y(x) - y(0)\) by more than 1% of the sum of
    its absolute values. `seed_agreement` and `feature_claims` take absolute values. `faithfulness` ranks the values as
    they are, largest first, if the output that is asked about is that of a class, and by absolute values otherwise.

    It runs batch by batch, and keeps only the result.

    Args:
        model: A `keras.Model`, as for `capture`. Its attention layers must attend to the same features. For
            `"rollout"`, and for `"attention_gradient"` with several layers, they must also follow each other, each with
            its queries at the positions of its keys.
        x: Inputs, as for `capture`.
        method: One of the above.
        task: What the outputs mean: `"classification"` (one of several classes), `"multilabel"` or `"regression"`. The
            compiled loss says so if it is one of Keras and this is not given.
        target: Which of the model's outputs to take the gradient of, from 0. For a dictionary or list of several
            outputs a key, or a tuple that starts with it; for outputs of more axes a tuple of numbers, such as (step,
            quantile). If not given, the only output, or in a classification the largest of each sample (the predicted
            class). The methods without a gradient say the same for every output. If one output stands for two classes
            and this is not given, the predicted class counts here, too. Where that is the first class, its output is
            \(1 - p\) for a probability \(p\), or \(-z\) for a logit \(z\).
        query: The position of one query, from 0, or from -1 backwards, or its feature's name; the mean over all if not
            given.
        layers: Names of the layers, as for `capture`.
        feature_names: Names of the features, or words, as for `capture`. A class token that stands before the features
            needs a name as well.
        special_tokens: Keys that stand for no feature, such as class, separator and padding tokens: token ids, if `x`
            is one array of integers, (sample, key), or a dictionary with such `token_ids`; or names of features, or
            words.
        batch_size: Samples in a batch, as for `capture`.
        verbose: As for `capture`.
        seed: The seed of `"random"`.

    Returns:
        xr.DataArray: `float32` (or `float64`), with the dimensions `sample` and `feature`. Numbers of samples are
        coordinates (or the index of a DataFrame, as for `capture`), and so are feature names where they are known, and
        `in_view` (sample, feature), whether a key is in view. Words of each sample are the coordinate `feature_token`
        (sample, feature), which `plot.text`, `merge` and `by_token` read.

        The attributes hold the `method`, the `target` (a number, `"predicted"`, or `"any"` if there is no gradient),
        the `query` (or `"mean"`, or `"any"`), the `layers` in the order in which they are called, the `masks` in force
        in them (or `"none"`), the `special_tokens`, if there are any, the `backend` and the `keras_version`. Integrated
        gradients have a `completeness_error`: the largest difference, over the samples, between the sum of a row and
        \(y(x) - y(0)\), divided by the largest sum of absolute values of a row; NaN if all are 0.

    Raises:
        ValueError: As `capture`; if the `method`, `task`, `target` or `query` does not exist, or a name among the
            `special_tokens`; if ids among them cannot be looked up in `x`; if layers attend over several axes, or over
            sequences of different lengths, or fold another axis into the batch. For the two methods with gradients: if
            the model has several outputs, no `target` is given and it is not known that they are classes. For
            `"attention_gradient"`: if the outputs are not made of the scores. For `"rollout"`: if rows of the scores do
            not sum to 1. For `"value_norm"`: if an output kernel is quantized. For `"integrated_gradients"`: if the
            model has no tokens of which each becomes a key.
        RuntimeError: As `capture`.

    Warns:
        UserWarning: As `capture`; if padding, `""`, is in view; if the gradients are 0 in all samples; and if the
            completeness error is above 0.05.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain
        from kerasfactory.layers import FeatureTokenizer

        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        tokens = FeatureTokenizer(8, feature_names=["age", "pulse", "weight"])(inputs)
        attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")
        attended = attention(tokens, tokens)
        pooled = keras.layers.GlobalAveragePooling1D()(attended)
        model = keras.Model(inputs, keras.layers.Dense(2)(pooled))

        x = np.random.default_rng(0).normal(size=(100, 3))
        weights = explain.attribute(model, x, verbose=0)
        print(weights.sizes, weights.sum("feature").values.round(3).max())
        #> Frozen({'sample': 100, 'feature': 3}) 1.0

        relevance = explain.attribute(
            model, x, method="attention_gradient", target=1, verbose=0
        )
        print(relevance.coords["feature"].values, bool((relevance >= 0).all()))
        #> ['age' 'pulse' 'weight'] True

        shares = explain.attribute(model, x, method="integrated_gradients", target=1, verbose=0)
        print(bool((shares < 0).any()), shares.attrs["completeness_error"] < 1e-3)
        #> True True
        ```
    """
    if method not in _METHODS:
        near = difflib.get_close_matches(str(method), _METHODS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"There is no method {method!r}. {hint}There are: {', '.join(_METHODS)}.")
    given = given_labels(x, feature_names)
    check_table(model, x)
    checked_task(task)
    completeness: list[tuple[float, float]] = []  # of integrated gradients
    seen = _measured(model, given.x, method, task, target, layers, batch_size, verbose, completeness)
    rng = generator(seed, "attribute")
    rows: list[np.ndarray] = []
    views: list[np.ndarray] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for batch in seen:
        parts = {name: _mean_of_heads(batch, name) for name in batch.measured}
        if not shapes:
            shapes = {name: values.shape[1:] for name, (values, _) in parts.items()}
            coordinates = _checked_axes(model, batch, shapes, method, given)
            position = None if query is None else _position(query, coordinates, shapes)
        for name, (values, _) in parts.items():
            check_same_lengths(name, values.shape[1:], shapes[name])
        rows.append(_attributed(method, parts, position))
        views.append(_in_view(batch, position))

    warn_of_difference(model, batch.difference)
    attributes = {"completeness_error": _completeness_error(completeness)} if method == "integrated_gradients" else {}
    result, in_view = np.concatenate(rows), np.concatenate(views)
    names = coordinates.get("key") if given.words is None else given.words.of_samples()
    in_view &= ~special_keys(special_tokens, x, in_view.shape[1], names)
    if given.words is not None:
        given.words.warn_of_padding(in_view)
    if method in ("uniform", "random"):
        result = _control(method, result, in_view, rng)
    bad = np.flatnonzero(np.isnan(result).any(axis=1))
    if len(bad):
        warn(
            f"The attribution is NaN in {len(bad)} of {len(result)} samples, the first of them number {bad[0]}. "
            "Look for NaN or infinite numbers in these samples, and in the model's weights."
        )
    coordinates = {"feature": coordinates["key"]} if "key" in coordinates else {}
    described = "predicted" if target is None else describe_target(target)
    attribution = xr.DataArray(
        result,
        dims=("sample", "feature"),
        coords={"sample": np.arange(len(result)), "in_view": (("sample", "feature"), in_view)} | coordinates,
        name=method,
        attrs={
            "method": method,
            "target": described if method in _WITH_GRADIENT else "any",
            "query": "any" if method == "integrated_gradients" else "mean" if query is None else query,
            "layers": ", ".join(shapes),
            **attributes,
            "masks": masks_of(batch.found),
            **({} if special_tokens is None else {"special_tokens": list(special_tokens)}),
            "backend": keras.config.backend(),
            "keras_version": keras.__version__,
        },
    )
    return with_rows_of(x, given.on(attribution))


def rollout(weights: Mapping[str, xr.DataArray] | xr.DataArray) -> xr.DataArray:
    r"""Combines the attention of several layers into one map: how much of each input position reaches each output.

    From the second layer on, a position holds a mixture of those before it, and a weight says little about the input.
    Rollout multiplies the mixtures. It assumes that half of each position comes from the layer, and that half bypasses
    the layer through the residual connection:

    $$
    \tilde A_l = \tfrac{1}{2} \left( \tfrac{1}{H} \sum_h A_{lh} + I \right) \tilde A_{l-1}, \qquad \tilde A_0 = I
    $$

    (Abnar & Zuidema 2020, [*Quantifying Attention Flow in Transformers*](https://arxiv.org/abs/2005.00928), section 3).
    The rollout of one layer is half its attention and half the identity.

    Rollout uses neither the values that are mixed nor how much of a position the layer really replaces: ½ is an
    assumption.

    Args:
        weights: Scores as `capture` returns them: a dictionary of arrays (sample, head, query, key), first layer first,
            or the array of one layer. The layers must follow each other, each attending from all positions to the same
            positions.

    Returns:
        xr.DataArray: `float32` (or `float64`) with the dimensions (sample, query, key) and the coordinates of the
        scores: the share of the input at `key` in the output of the last layer at `query`. Shares are from 0 to 1. Each
        row sums to 1. If a query attends to nothing, such as padding, its layer leaves the position as it is, and its
        row is that of the identity. The attribute `layers` names them in their order.

    Raises:
        ValueError: If `weights` is empty, has other dimensions or rows that do not sum to 0 or 1, as with an attention
            sink; if layers differ in their samples or lengths, or attend to other positions than they attend from
            (cross-attention).

    Warns:
        UserWarning: If scores are NaN. They make the whole sample NaN.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import explain

        dims = ("sample", "head", "query", "key")
        first = xr.DataArray([[[[0.5, 0.5], [0.0, 1.0]]]], dims=dims)
        second = xr.DataArray([[[[0.0, 1.0], [0.0, 1.0]]]], dims=dims)

        print(explain.rollout(first).values[0].tolist())
        #> [[0.75, 0.25], [0.0, 1.0]]
        print(explain.rollout({"first": first, "second": second}).values[0].tolist())
        #> [[0.375, 0.625], [0.0, 1.0]]
        ```
    """
    arrays = {str(weights.name or "scores"): weights} if isinstance(weights, xr.DataArray) else dict(weights)
    if not arrays:
        raise ValueError("`weights` is empty: give at least one layer's scores, as `explain.capture` returns them.")
    dims = ("sample", "head", "query", "key")
    for name, array in arrays.items():
        if set(array.dims) != set(dims):
            raise ValueError(
                f"Rollout needs scores with the dimensions {dims}. Those of layer {name!r} have {array.dims}. Leave it "
                "out: `explain.capture(..., layers=[...])`."
            )
    _check_no_sink([name for name, array in arrays.items() if "sink" in array.coords])
    arrays = {name: array.transpose(*dims) for name, array in arrays.items()}
    _check_square({name: array.shape[2:] for name, array in arrays.items()})
    samples = {name: array.sizes["sample"] for name, array in arrays.items()}
    if len(set(samples.values())) > 1:
        raise ValueError(f"All layers must have scores of the same samples. Received: {samples}")

    result = _rolled_out({name: _heads_merged(array.values) for name, array in arrays.items()})
    bad = np.flatnonzero(np.isnan(result).any(axis=(1, 2)))
    if len(bad):
        warn(f"The rollout is NaN in {len(bad)} of {len(result)} samples, the first of them number {bad[0]}.")
    last = next(reversed(arrays.values()))
    names = ("sample", "query", "key", "query_token", "key_token")
    coordinates = {name: last.coords[name] for name in names if name in last.coords}
    attributes = {"layers": ", ".join(arrays)}
    return xr.DataArray(result, coordinates, ("sample", "query", "key"), name="rollout", attrs=attributes)


def _measured(
    model: Any,
    x: Any,
    method: str,
    task: str | None,
    target: Any,
    layers: Any,
    batch_size: int | None,
    verbose: Any,
    completeness: list[tuple[float, float]],
) -> Iterator[Batch]:
    """Batches, with what the method measures of each call of an attention layer."""
    if method == "integrated_gradients":
        return _integrated(model, x, layers, batch_size, verbose, task, target, completeness)
    if method == "attention_gradient":
        return _gradients(model, x, layers, batch_size, verbose, task, target)
    if target is not None:
        x = _with_checked_target(model, x, target)
    measure = _value_norms if method == "value_norm" else float_scores
    return observe(model, x, layers, batch_size, verbose, measure, only_scores=measure is float_scores)


def _with_checked_target(model: Any, x: Any, target: Any) -> Any:
    """The data, with all batches, after a look at the first: whether the model has such an output."""
    batches, _ = batches_of(x, None)
    first: tuple = next(batches, ())
    if first and isinstance(model, keras.Model):
        check_target(model, first, target)
    return itertools.chain([first] if first else [], batches) if isinstance(x, Iterator) else x


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"`{name}` must be an integer. Received: {name}={value!r}") from None


def _position(query: int | str, coordinates: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> int:
    if isinstance(query, str):
        names = [str(name) for name in coordinates.get("query", ())]
        if query not in names:
            near = difflib.get_close_matches(query, names, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            known = (
                f"There are: {', '.join(names)}." if names else "They have no names; give a number, or `feature_names`."
            )
            raise ValueError(f"There is no query {query!r}. {hint}{known}")
        return names.index(query)
    position = _integer("query", query)
    for name, (queries, _) in shapes.items():
        if not -queries <= position < queries:
            raise ValueError(
                f"`query` must be a position from 0 to {queries - 1}, or a name: layer {name!r} has {queries} queries. "
                f"Received: query={query!r}"
            )
    return position


def _checked_axes(
    model: Any, batch: Batch, shapes: dict[str, tuple[int, ...]], method: str, given: Given
) -> dict[str, Any]:
    """The names along `query` and `key` of the first layer, as `capture` gives them, if the layers go together."""
    if method == "rollout":
        _check_no_sink([name for name in shapes if batch.found[name].has_sink])
    if method == "rollout" or (method == "attention_gradient" and len(shapes) > 1):
        _check_square(shapes)
    _number_of_keys(shapes)
    for name, shape in shapes.items():
        check_axes(name, batch.found[name].layer, (batch.size, 1, *shape), given)
    first = next(iter(shapes))
    return labels_of(model, batch, first, (batch.size, 1, *shapes[first]), given, False)["coords"]


def _number_of_keys(shapes: Mapping[str, tuple[int, ...]]) -> int:
    keys = {name: keys for name, (_, keys) in shapes.items()}
    if len(set(keys.values())) > 1:
        raise ValueError(
            f"The layers attend over different numbers of keys, {keys}, so they do not see the same features. Choose "
            "layers that do, with `layers=[...]`."
        )
    return next(iter(keys.values()))


def _check_no_sink(names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"Rollout needs rows of scores that sum to 1. Those of {', '.join(map(repr, names))} sum to less, because "
            "an attention sink takes part of the weight. Leave them out with `layers=[...]`, or take another method."
        )


def _check_square(shapes: Mapping[str, tuple[int, ...]]) -> None:
    if len({size for shape in shapes.values() for size in shape}) > 1:
        sizes = ", ".join(f"{name}: {queries} x {keys}" for name, (queries, keys) in shapes.items())
        raise ValueError(
            "Rollout multiplies layers, so all of them must attend from the same positions to the same positions. "
            f"These are (queries x keys): {sizes}. Leave out cross-attention and layers of another length, with "
            "`layers=[...]`."
        )


def _mean_of_heads(batch: Batch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What was measured of a call as one matrix (sample, query, key); and (sample, query), whether a key is in view."""
    measured = batch.measured[name]
    if isinstance(measured, tuple):  # the heads are merged already
        values, scores = map(_backend.as_numpy, measured)
        attends = np.any(scores, axis=(1, 3))
    else:
        scores = _backend.as_numpy(measured)
        _check_one_axis(batch.found[name].layer, scores.shape)
        values, attends = _heads_merged(scores)
    if len(values) != batch.size:
        raise ValueError(
            f"Layer {name!r} attends in {len(values)} sequences for {batch.size} samples: the model folds another axis "
            "into the batch, and a key is not a feature of a sample. Choose other layers with `layers=[...]`, or read "
            "its scores with `explain.capture`."
        )
    return values, attends


def _heads_merged(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over those heads in which a query attends to anything, and whether there is one."""
    attends = np.any(scores, axis=-1)  # (sample, head, query); NaN too
    values = scores.sum(axis=1) / np.maximum(attends.sum(axis=1), 1)[..., None].astype(scores.dtype)
    return values, np.any(attends, axis=1)


def _check_one_axis(layer: Any, shape: tuple[int, ...]) -> None:
    if len(shape) != 4 or len(attention_axes(layer)) != 1:
        raise ValueError(
            f"Layer {layer.name!r} attends over several axes, or has axes beside the one it attends over: its scores "
            f"have shape {tuple(shape)}, and a key is not a feature. Choose other layers with `layers=[...]`, or read "
            "its scores with `explain.capture`."
        )


def _in_view(batch: Batch, position: int | None) -> np.ndarray:
    """The keys that queries attend to in any layer, (sample, key); of one query also what it sees through others."""
    reaches = []
    for name, measured in batch.measured.items():
        scores = _backend.as_numpy(measured[1] if isinstance(measured, tuple) else measured)
        reaches.append(reached(scores, batch.found[name].masks))
    if position is None:
        return np.any([reach.any(axis=1) for reach in reaches], axis=0)
    in_view = np.any([reach[:, position] for reach in reaches], axis=0)
    for reach in reversed(reaches[:-1]):
        if reach.shape[1] == reach.shape[2]:
            in_view |= np.einsum("sq,sqk->sk", in_view, reach)
    return in_view


def _control(method: str, values: np.ndarray, in_view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An attribution that knows nothing, over the keys in view; NaN where the values are."""
    shares = np.where(np.isnan(values), values, in_view).astype(values.dtype)
    if method == "random":
        shares *= rng.standard_exponential(shares.shape)  # divided by their sum: a flat Dirichlet distribution
    total = shares.sum(axis=1, keepdims=True)
    return shares / np.where(total == 0, 1, total)


def _attributed(method: str, measured: dict[str, tuple[np.ndarray, np.ndarray]], position: int | None) -> np.ndarray:
    """(sample, feature), of what was measured of each layer: (sample, query, key), and who attends: (sample, query)."""
    parts = list(measured.values())
    if method == "rollout":
        return _pooled(_rolled_out(measured), parts[-1][1], position)
    if method == "attention_gradient":
        relevance = parts[0][0]  # without the identity
        for values, _ in parts[1:]:
            relevance = relevance + values + values @ relevance
        return _pooled(relevance, parts[-1][1], position)
    if method == "integrated_gradients":
        return parts[0][0][:, 0]  # the same for all queries, and in all layers
    return np.mean([_pooled(values, attends, position) for values, attends in parts], axis=0)


def _pooled(values: np.ndarray, attends: np.ndarray, position: int | None) -> np.ndarray:
    if position is not None:
        return values[:, position]
    weights = attends / np.maximum(attends.sum(axis=1, keepdims=True), 1)
    return np.einsum("sqk,sq->sk", values, weights.astype(values.dtype))


def _rolled_out(parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    result: Any = None
    for name, (values, attends) in parts.items():
        sums = values.sum(axis=-1, keepdims=True)
        if (np.abs(sums[attends] - 1) > _NO_DISTRIBUTION).any():
            raise ValueError(
                f"Rollout needs rows of scores that sum to 1, such as those of a softmax. Layer {name!r} has rows that "
                f"sum to {np.nanmin(sums[attends]):.2f} and to {np.nanmax(sums[attends]):.2f}. Choose other layers."
            )
        identity = np.eye(values.shape[-1], dtype=values.dtype)
        mixed = np.where(attends[..., None], (values / np.where(sums == 0, 1, sums) + identity) / 2, identity)
        result = mixed if result is None else mixed @ result
    return result


def _projected(call: Call, value: Any) -> Any:
    """What each head makes of its values in the layer's output, without its bias: (batch, key, head, output)."""
    dense = output_projection(call.layer)
    if getattr(dense, "quantization_mode", None):
        raise ValueError(
            f"The output kernel of layer {call.layer.name!r} is quantized, {dense.quantization_mode!r}: take the value "
            "norms before quantizing, or another method."
        )
    heads, size = value.shape[2:]
    kernel = ops.reshape(ops.cast(dense.kernel, value.dtype), (heads, size, -1))
    return ops.einsum("bkhd,hdo->bkho", value, kernel)


def _value_norms(call: Call) -> tuple[Any, Any]:
    """How long the vectors are that keys add to queries, (batch, query, key), and the scores."""
    layer, scores = call.layer, float_scores(call)
    _check_one_axis(layer, scores.shape)
    if call.values is not None:
        sizes = ops.norm(ops.cast(call.values(), scores.dtype), axis=-1)  # (batch, key, head)
        weighted = scores * ops.transpose(sizes, (0, 2, 1))[:, :, None]
        return ops.sqrt(ops.sum(ops.square(weighted), axis=1)), scores
    if call.value is None:
        raise ValueError(
            f"The values of layer {layer.name!r} are not known: a registered adapter makes its scores. Choose another "
            "method, or other layers with `layers=[...]`."
        )
    value = ops.cast(call.value, scores.dtype)
    of_queries = {"scores": ops.transpose(scores, (2, 0, 1, 3))}
    projected: Any = None
    gate = gate_of(layer, call.query)  # (batch, query, head, size of a head)
    if gate is None:
        projected = _projected(call, value)
    else:
        of_queries["gate"] = ops.transpose(ops.cast(gate, scores.dtype), (1, 0, 2, 3))

    def norms(query):  # one at a time, for all vectors together are many times the scores
        contributions = _projected(call, value * query["gate"][:, None]) if projected is None else projected
        vectors = ops.einsum("bhk,bkho->bko", query["scores"], contributions)
        return ops.sqrt(ops.sum(ops.square(vectors), axis=-1))

    return ops.transpose(ops.map(norms, of_queries), (1, 0, 2)), scores


def _gradients(
    model: Any, x: Any, layers: Any, batch_size: int | None, verbose: Any, task: str | None, target: Any
) -> Iterator[Batch]:
    """Batches in which the measured is, for each call, the positive part of gradient times score, mean over heads."""
    batches, expected = batches_of(x, batch_size)
    progress = progress_bar(expected, verbose)
    first: tuple = next(batches, ())
    seen = next(observe(model, iter([first] if first else []), layers, None, 0, float_scores))
    for name in seen.measured:
        _mean_of_heads(seen, name)  # raises where a key is not a feature
    edit, chosen = editor(model, first, layers), (_asked_sum, task, target)
    done, has_gradient, has_scores = 0, False, False
    for data in itertools.chain([first], batches):
        deltas = {name: np.zeros((size_of(data), *shape), "float32") for name, shape in edit.shapes.items()}
        gradients, _, scores = edit.gradient(data, _added, deltas, chosen, once=expected == 1)
        measured = {}
        for name in edit.shapes:
            weights = ops.cast(scores[name], "float32")
            # A masked key gets 0, also where the gradient is NaN, as that of a softmax over nothing is in Keras 3.14.
            products = ops.where(weights == 0, 0.0, gradients[name] * weights)
            measured[name] = ops.mean(ops.maximum(products, 0), axis=1), weights
            has_gradient = has_gradient or bool(ops.any(products != 0))
            has_scores = has_scores or bool(ops.any(weights != 0))
        yield seen._replace(size=size_of(data), measured=measured)
        done += 1
        progress.update(done)
    if expected is None:
        progress.update(done, finalize=True)
    if has_scores and not has_gradient:
        warn(_NO_GRADIENT.format("the scores"))


def _integrated(
    model: Any,
    x: Any,
    layers: Any,
    batch_size: int | None,
    verbose: Any,
    task: str | None,
    target: Any,
    completeness: list[tuple[float, float]],
) -> Iterator[Batch]:
    """Batches in which the measured is, for each call, integrated gradients, (sample, query, key), and the scores.

    To `completeness` is added, for each batch, the largest difference between the sum of a sample's values and the
    change of its output, and the largest sum of absolute values.
    """
    batches, expected = batches_of(x, batch_size)
    progress = progress_bar(expected, verbose)
    watched, batches = itertools.tee(batches)
    scaler: Any = None
    first, done = {}, 0

    def chosen(outputs):
        return ops.sum(asked_output(model, outputs, task, target))

    seen = observe(model, watched, layers, None, 0, float_scores, only_scores=True)
    for batch, data in zip(seen, batches, strict=False):
        parts = {name: _mean_of_heads(batch, name)[0] for name in batch.measured}  # raises where a key is no feature
        shapes = {name: values.shape[1:] for name, values in parts.items()}
        if scaler is None:
            scaler, first = token_scaler(model, data, layers, _number_of_keys(shapes)), shapes
        for name, shape in shapes.items():
            check_same_lengths(name, shape, first[name])
        in_view = _in_view(batch, None)
        integrated = integral(scaler, data, in_view, chosen)
        if in_view.any():
            sizes = np.abs(integrated.values).sum(axis=1)
            completeness.append((np.fmax.reduce(missed(integrated)), np.fmax.reduce(sizes)))  # but for NaN
        measured = {}
        for name, values in parts.items():
            of_queries = np.broadcast_to(integrated.values[:, None].astype(values.dtype), values.shape)
            measured[name] = ops.convert_to_tensor(of_queries), batch.measured[name]
        yield batch._replace(expected=expected, measured=measured)
        done += 1
        progress.update(done)
    if expected is None:
        progress.update(done, finalize=True)
    if completeness and not any(size for _, size in completeness):
        warn(_NO_GRADIENT.format("the tokens"))


def _completeness_error(completeness: list[tuple[float, float]]) -> float:
    difference, size = np.fmax.reduce(np.reshape(completeness, (-1, 2)), axis=0, initial=0)
    error = float(difference / size) if size else float("nan")
    if error > _INCOMPLETE:
        warn(
            f"The integrated gradients should sum to the change of the output, but miss it by up to {error:.0%} of the "
            "largest attribution of a sample: the gradient changes too fast along the path, or part of the output "
            "passes on no gradient. Compare with another method before you use the ranking."
        )
    return error


def _asked_sum(model: Any, outputs: Any, more: Any, task: str | None, target: Any) -> Any:
    return ops.sum(asked_output(model, tree.map_structure(as_float, outputs), task, target))


def _added(name: str, scores: Any, given: Any) -> Any:
    check_same_lengths(name, tuple(scores.shape[2:]), tuple(given[name].shape[2:]))
    return ops.add(scores, given[name])
