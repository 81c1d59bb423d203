"""What people read off the attention matrix, without the matrix: memory grows with the length, not its square."""

import itertools
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import xarray as xr
from keras import ops
from numpy.lib.stride_tricks import sliding_window_view

from kerasfactory import _backend
from kerasfactory._arguments import positive_integer
from kerasfactory._warnings import warn
from kerasfactory.explain._engine.attention import Call, Heads, attention_axes
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
from kerasfactory.explain._engine.observe import observe, relative_difference, rounding_of
from kerasfactory.explain._engine.store import results_of, warn_of_nan
from kerasfactory.explain._engine.tables import check_table
from kerasfactory.layers._attention import Mask

# Scores in a block, 4 MiB of them. Twice as many, 8 MiB, where that is needed for 32 queries: products of matrices are
# slow with less, and buffers that do not stay in the processor's cache make everything slow.
_BLOCK = 2**20
_QUERIES = 32

_CHECKED = 64, 1024  # queries and keys
_GROUP = 8  # keys
_HIDDEN = np.float32(-1e38)  # the logit of a masked key: finite, for the entropy multiplies it by its weight, 0
_SAFE = 20  # logits up to here need not be shifted before the exponential


class _Wanted(NamedTuple):
    top_k: int
    map_size: int
    rows: list[int]


def summarize(
    model: keras.Model,
    x: Any,
    *,
    layers: str | Sequence[str] | None = None,
    feature_names: Sequence[str] | Sequence[Sequence[str]] | np.ndarray | Callable[[int], str] | None = None,
    top_k: int = 16,
    map_size: int = 256,
    rows: Sequence[int] | None = None,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    store: str | os.PathLike[str] | None = None,
) -> dict[str, xr.Dataset]:
    r"""Summarizes a model's attention scores, for sequences that are too long for the scores themselves.

    The scores of one layer with 8 heads take 8.6 GB a sample at 16,384 positions and 137 GB at 65,536. Here they are
    formed for some queries of one head at a time, over all keys. They are summarized, used for their part of the
    layer's output, and overwritten. So memory grows with the length, not with its square. The numbers are those of
    `capture`, up to rounding in single precision.

    For a sample and a head, with the weight \(A_{ij}\) of key \(j\) for query \(i\) (rows \(A_i\) sum to 1),

    $$
    \operatorname{entropy}_i = -\sum_j A_{ij} \ln A_{ij}, \qquad
    \operatorname{distance}_i = \sum_j A_{ij}\, |i - j|, \qquad
    \operatorname{received}_j = \frac{1}{|I|} \sum_{i \in I} A_{ij} ,
    $$

    where \(I\) are the queries with any key in view. That attention can be computed block by block, exactly,
    is due to Dao et al. 2022, [*FlashAttention*](https://arxiv.org/abs/2205.14135), section 3.1. Since the rows of a
    block are whole here, their softmax needs no second pass, nor the online form that the paper uses.

    The model runs eagerly, each batch once, as in `model.predict`, with dropout off, and is not changed. NumPy computes
    all its `MultiHeadAttention` and `GroupQueryAttention` layers in blocks, and all calls of
    `keras.ops.dot_product_attention` in other layers, including those that are not in `layers`. It does so in single
    precision, from the model's own queries, keys and values. For a model in half precision that is more exact than its
    own arithmetic.

    In other cases the scores are formed, and memory is as for `capture`. These are

    - a layer that forms them itself, with a softmax and a product, such as `keras.layers.Attention`;
    - a call of `keras.ops.dot_product_attention` with a `bias` or a soft cap;
    - a subclass of Keras' two layers with its own `_compute_attention` or `_masked_softmax` (the summary is of what
      that returns; a weight of 0 counts as masked), or with a fused call of its own;
    - a layer of Keras that is called with `return_attention_scores=True`.

    A subclass with its own `call`, or its own way to make masks, forms the mask.

    Args:
        model: A `keras.Model`, as for `capture`.
        x: Inputs, as for `capture`.
        layers: Names of the layers, as for `capture`.
        feature_names: Names for the entries of an axis, or words, as for `capture`.
        top_k: How many keys to name for each query; as many as there are, at most.
        map_size: Bins along each side of the map; as many as there are queries or keys, at most.
        rows: Positions of queries, from 0, whose weights are wanted for all keys.
        batch_size: Samples in a batch, as for `capture`.
        verbose: As for `capture`.
        store: A directory, `"summary.zarr"`, for the summaries of more samples than memory holds. As for `capture`.

    Returns:
        dict[str, xr.Dataset]: From the layer's name, as in `capture`, to these variables.

        - `entropy` (sample, head, query): in nats, from 0, for one key, to the logarithm of the number of keys.
        - `distance` (sample, head, query): mean distance of a query from the keys that it attends to, in positions,
          from 0.
        - `received` (sample, head, key): mean weight of a key, over the queries with any key in view; sums to 1.
        - `top_key`, `top_weight` (sample, head, query, rank): the positions of the keys with the largest weights, and
          the weights, from 0 to 1, heaviest first. They are chosen before the softmax, so that keys whose weights
          underflow to 0 are still in order. Where a query has fewer keys in view, position -1 and weight 0.
        - `map` (sample, head, query_bin, key_bin): the weights of the keys in a bin, summed, averaged over the
          queries in a bin that have any key in view. Rows sum to 1. With as many bins as queries and keys,
          these are the scores. `query_bin` and `key_bin` hold the first position of each bin, `query_bin_end` and
          `key_bin_end` the first one after it.
        - `row` (sample, head, row, key), with `rows`: the scores of these queries, whose positions are the coordinate
          `position` (row).
        - `sink` (sample, head, query), of a layer with an attention sink: the weight that went to no key, as in
          `capture`. The other variables are of the keys alone, whose weights sum to less than 1 there.

        A query whose keys are all masked has entropy and distance 0, and neither top keys nor weights. Names of
        features are coordinates of `query` and `key`, where they fit, and words of each sample are `query_token` and
        `key_token`, as in `capture`; they are not kept in a `store`. A model that folds another axis into the batch
        gives `sequence` instead of `sample`. Axes `axis_2`, …, of which it is not known what they are, come before
        `head`, as in `capture`.

        The attributes are those of `capture`. Only `prediction_difference` differs, because a run without observation
        might form all scores. Here it is the largest difference between the output computed here and that of the
        layer's own `_compute_attention` or of `keras.ops.dot_product_attention`, relative to the largest output. Up to
        64 queries and 1,024 keys of the first sample are compared. It is 0 where that method or function itself was
        used.

    Raises:
        ValueError: As `capture`; if `top_k`, `map_size` or `rows` are out of range; and if a layer of Keras attends
            over several axes, or has axes beside the one it attends over.
        RuntimeError: As `capture`.
        ImportError: As `capture`.

    Warns:
        UserWarning: If a layer cannot be captured, if scores are NaN, if words are `""` and a layer has no mask, or if
            `prediction_difference` is more than
            rounding: then the layer does something else than softmax attention.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        inputs = keras.Input((None, 8))
        attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")
        attended = attention(inputs, inputs, use_causal_mask=True)
        model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(attended))

        x = np.random.default_rng(0).normal(size=(1, 3000, 8))
        summary = explain.summarize(model, x, rows=[2999], verbose=0)["attention"]

        print(summary["map"].sizes)
        #> Frozen({'sample': 1, 'head': 2, 'query_bin': 256, 'key_bin': 256})
        print(summary["top_key"].sel(sample=0, head=0).isel(query=0, rank=slice(3)).values)
        #> [ 0 -1 -1]
        print(summary["row"].sum("key").round(3).values.tolist())
        #> [[[1.0], [1.0]]]
        ```
    """
    given = given_labels(x, feature_names)
    check_table(model, x)
    wanted = _Wanted(positive_integer("top_k", top_k), positive_integer("map_size", map_size), _checked_rows(rows))
    buffers: dict[str, np.ndarray] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    differences: dict[str, float] = {}

    def attend(heads, is_chosen):
        with np.errstate(all="ignore"):  # rows without a key in view, NaN in the inputs
            return _attend(heads, is_chosen, wanted, buffers, checks=not shapes)

    def measure(call):
        with np.errstate(all="ignore"):
            return _summary_of(call, wanted, buffers)

    def labeled(name, arrays):
        labels = labels_of(model, batch, name, _shape(arrays), given, len(arrays["entropy"]) != batch.size)
        return _dataset(arrays, labels, differences[name], wanted)

    layer_names = [layers] if isinstance(layers, str) else layers and list(layers)
    arguments = {"layers": layer_names, "feature_names": given.names or given.columns, **wanted._asdict()}
    with results_of(store, "summarize", model, given.x, batch_size, arguments) as results:
        for batch in observe(model, results.x, layers, results.batch_size, verbose, measure, attend):
            for name, (summary, difference) in batch.measured.items():
                if name not in shapes:
                    _check(name, batch.found[name].layer, _shape(summary), given, wanted)
                    shapes[name], differences[name] = _shape(summary)[1:], difference
                check_same_lengths(name, _shape(summary)[1:], shapes[name])
            arrays = {name: summary for name, (summary, _) in batch.measured.items()}
            nan = {name: _has_nan(summary["entropy"]) for name, summary in arrays.items()}
            results.append(batch, arrays, nan, labeled)
        results.finish()

    for name, difference in differences.items():
        if not difference <= rounding_of(model):
            warn(
                f"The output of layer {name!r} differs from softmax attention, by {difference:.1e} of the largest. The "
                "summary belongs to a run with softmax attention, not to what `predict` returns. If the layer computes "
                "something else, it should do so in its own `_compute_attention`."
            )
    warn_of_nan(results.nan, results.rows)
    warn_of_padding(given, batch)
    datasets = results.open().items()
    return {name: with_rows_of(x, given.on(_with_rows_as_variable(dataset, wanted))) for name, dataset in datasets}


def _checked_rows(rows: Any) -> list[int]:
    if rows is None:
        return []
    try:
        positions = [-1 if isinstance(row, bool) else operator.index(row) for row in rows]
    except TypeError:
        positions = []
    if not positions or min(positions) < 0:
        raise ValueError(f"`rows` must be a list of positions of queries, counted from 0. Received: rows={rows!r}")
    return positions


def _has_nan(entropy: np.ndarray) -> np.ndarray:
    return np.isnan(entropy).reshape(len(entropy), -1).any(axis=1)


def _shape(summary: dict[str, np.ndarray]) -> tuple[int, ...]:
    """Of the scores that are summarized."""
    return (*summary["entropy"].shape, summary["received"].shape[-1])


def _check(name: str, layer: Any, shape: tuple[int, ...], given: Given, wanted: _Wanted) -> None:
    check_axes(name, layer, shape, given)
    queries = shape[-2]
    if wanted.rows and max(wanted.rows) >= queries:
        raise ValueError(
            f"`rows` must be positions of queries. Layer {name!r} has {queries} queries: 0 to {queries - 1}. Choose "
            f"others, or other layers with `layers=[...]`. Received: rows={wanted.rows}"
        )


def _dataset(arrays: dict[str, np.ndarray], labels: dict[str, Any], difference: float, wanted: _Wanted) -> xr.Dataset:
    *heads, query, key = labels["dims"]
    dims: dict[str, tuple[str, ...]] = {
        "entropy": (*heads, query),
        "distance": (*heads, query),
        "received": (*heads, key),
        "top_key": (*heads, query, "rank"),
        "top_weight": (*heads, query, "rank"),
        "map": (*heads, "query_bin", "key_bin"),
        "row": (*heads, "row", key),
        "sink": (*heads, query),
    }
    units = {"entropy": {"units": "nats"}, "distance": {"units": "positions"}}
    coordinates = dict(labels["coords"])
    for name, size in zip(("query_bin", "key_bin"), _shape(arrays)[-2:], strict=True):
        edges = _edges(size, wanted.map_size)
        coordinates |= {name: edges[:-1], f"{name}_end": (name, edges[1:])}
    if wanted.rows:
        coordinates["position"] = ("row", wanted.rows)  # xarray has no room for a coordinate beside `row` itself
    variables = {name: (dims[name], array, units.get(name, {})) for name, array in arrays.items()}
    dataset = xr.Dataset(variables, coordinates, labels["attrs"] | {"prediction_difference": difference})
    return _with_rows_as_variable(dataset, wanted)


def _with_rows_as_variable(dataset: xr.Dataset, wanted: _Wanted) -> xr.Dataset:
    """What is called as one of its dimensions is a coordinate to xarray."""
    return dataset.reset_coords("row") if wanted.rows else dataset


def _attend(heads: Heads, is_chosen: bool, wanted: _Wanted, buffers: dict, checks: bool) -> tuple[Any, Any]:
    """A layer's output and, if it is one of the chosen, the summary of its scores and what the check says."""
    if len(heads.query.shape) != 4:
        return None, _several_axes(heads.layer) if is_chosen else None
    query, key, value = (
        _backend.as_numpy(tensor).transpose(0, 2, 1, 3) for tensor in (heads.query, heads.key, heads.value)
    )
    mask = _mask_in_numpy(heads.mask)
    shape = (*query.shape[:3], key.shape[2])
    output = _aligned((shape[0], shape[2], shape[1], value.shape[-1]))  # as the layer has it
    by_head = output.transpose(0, 2, 1, 3)
    attends = np.zeros(shape[:3], bool)
    summary = _empty(shape, wanted) if is_chosen else None
    scale = np.float32(query.shape[-1] ** -0.5)
    samples = number = None
    for block in _blocks(shape):
        if (samples, number) != block[:2]:
            samples, number = block[:2]
            keys = np.ascontiguousarray(key[block[:2]].swapaxes(-1, -2), "float32")
            values = np.ascontiguousarray(value[block[:2]], "float32")
        visible = _visible_keys(mask, block[2], shape[3])
        if visible.start >= visible.stop:
            continue
        logits, weights = (_buffer(buffers, name, attends[block].shape, visible) for name in ("logits", "weights"))
        np.matmul(query[block].astype("float32") * scale, keys[..., visible], out=logits)
        if mask is not None:
            np.copyto(logits, _HIDDEN, where=~_allowed(mask, block, visible))
        top, largest = _top(logits, wanted.top_k if is_chosen else 1)
        attends[block] = largest[..., 0] != _HIDDEN
        shift = np.where(attends[block] & np.isfinite(largest[..., 0]), largest[..., 0], 0)
        if np.abs(shift).max() > _SAFE:
            logits -= shift[..., None]
            largest -= shift[..., None]
        np.exp(logits, out=weights)
        total = np.matmul(weights, np.ones(weights.shape[-1], "float32"))
        np.matmul(weights, values[..., visible, :], out=by_head[block])
        by_head[block] /= total[..., None]
        if summary is not None:
            _fill(summary, block, visible, logits, weights, total, attends[block], top, largest, wanted)

    del keys, values  # as large as the layer's own, which it may copy now
    if not attends.all():
        # Their output is 0 or the mean of all values, depending on the way that the layer goes: it is asked.
        nowhere = np.zeros((shape[0], 1, 1, shape[3]), bool)
        of_layer = _backend.as_numpy(
            heads.own(heads.query[:, :1], heads.key, heads.value, ops.convert_to_tensor(nowhere))
        )
        np.copyto(output, of_layer, where=~attends.transpose(0, 2, 1)[..., None], casting="unsafe")
    difference = _difference_from_layer(heads, mask, wanted, buffers) if is_chosen and checks else 0.0
    tensor = ops.cast(_backend.as_tensor(output), heads.value.dtype)
    return tensor, None if summary is None else (_means(summary, attends, wanted), difference)


def _summary_of(call: Call, wanted: _Wanted, buffers: dict) -> tuple[dict[str, np.ndarray], float]:
    """What `_attend` made of the call, or the same of the scores that the layer formed."""
    if isinstance(call.attended, Exception):
        raise call.attended
    if call.attended is not None:
        return call.attended
    scores = _backend.as_numpy(call.scores)
    if len(attention_axes(call.layer)) > 1 or (scores.ndim != 4 and not call.path):
        raise _several_axes(call.layer)
    own_shape = scores.shape
    scores = scores.reshape(len(scores), -1, *own_shape[-2:])  # further axes are like heads
    summary, attends = _empty(scores.shape, wanted), np.zeros(scores.shape[:3], bool)
    visible = slice(0, scores.shape[3])
    for block in _blocks(scores.shape):
        logits, weights = (_buffer(buffers, name, attends[block].shape, visible) for name in ("logits", "weights"))
        weights[:] = scores[block]
        np.log(weights, out=logits)
        logits[weights == 0] = _HIDDEN
        top, largest = _top(logits, wanted.top_k)
        attends[block] = largest[..., 0] != _HIDDEN
        ones = np.ones(attends[block].shape, "float32")
        _fill(summary, block, visible, logits, weights, ones, attends[block], top, largest, wanted)
    summary = _means(summary, attends, wanted) | ({"sink": sink_of(scores)} if call.has_sink else {})
    return {name: array.reshape(*own_shape[:-2], *array.shape[2:]) for name, array in summary.items()}, 0.0


def _several_axes(layer: Any) -> ValueError:
    return ValueError(
        f"Layer {layer.name!r} attends over several axes, or has axes beside the one it attends over. `summarize` "
        "cannot read such layers, but `capture` can. Leave it out here with `layers=[...]`. Received: "
        f"attention_axes={tuple(attention_axes(layer))}"
    )


def _empty(shape: tuple[int, ...], wanted: _Wanted) -> dict[str, np.ndarray]:
    """The summary of queries without a key in view."""
    *start, queries, keys = shape
    ranks = min(wanted.top_k, keys)
    bins = min(wanted.map_size, queries), min(wanted.map_size, keys)
    summary = {
        "entropy": np.zeros((*start, queries), "float32"),
        "distance": np.zeros((*start, queries), "float32"),
        "received": np.zeros((*start, keys), "float32"),
        "top_key": np.full((*start, queries, ranks), -1, "int32"),
        "top_weight": np.zeros((*start, queries, ranks), "float32"),
        "map": np.zeros((*start, *bins), "float32"),
    }
    return summary | ({"row": np.zeros((*start, len(wanted.rows), keys), "float32")} if wanted.rows else {})


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Samples, heads and queries of which to form the scores at once: several samples only with all their heads."""
    batch, heads, queries, keys = shape
    scores = max(_BLOCK, min(_QUERIES * keys, 2 * _BLOCK))
    per_block = [1, 1, min(queries, max(1, scores // keys))]
    if per_block[2] == queries:
        per_block[1] = min(heads, max(1, scores // (queries * keys)))
        if per_block[1] == heads:
            per_block[0] = min(batch, max(1, scores // (heads * queries * keys)))
    for starts in itertools.product(*map(range, (0, 0, 0), shape[:3], per_block)):
        yield tuple(slice(a, min(a + n, size)) for a, n, size in zip(starts, per_block, shape[:3], strict=True))


def _buffer(buffers: dict[str, np.ndarray], name: str, queries: tuple[int, ...], visible: slice) -> np.ndarray:
    """The same memory again and again: the system takes long to give new pages."""
    shape = (*queries, visible.stop - visible.start)
    if buffers.get(name, np.empty(0)).size < math.prod(shape):
        buffers[name] = np.empty(math.prod(shape), "float32")
    return buffers[name][: math.prod(shape)].reshape(shape)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Memory of which a backend can make a tensor without a copy."""
    memory = np.empty(math.prod(shape) + 16, "float32")
    start = -memory.ctypes.data // 4 % 16
    return memory[start : start + math.prod(shape)].reshape(shape)


def _mask_in_numpy(mask: Mask | None) -> Mask | None:
    """The mask with boolean arrays for parts."""
    return mask and mask._replace(parts=tuple(_backend.as_numpy(part).astype(bool, copy=False) for part in mask.parts))


def _visible_keys(mask: Mask | None, queries: slice, keys: int) -> slice:
    """The keys from the first to the last that any of the queries has in view, as far as their order tells."""
    first, last = 0, keys
    if mask is not None and mask.window:
        first, last = max(0, queries.start - mask.window + 1), min(keys, queries.stop + mask.window - 1)
    if mask is not None and mask.causal:
        last = min(last, queries.stop)
    return slice(first, last)


def _allowed(mask: Mask, block: Any, visible: slice) -> np.ndarray:
    """Which keys are in view of which queries; it broadcasts to (sample, head, query, key)."""
    samples, heads, queries = block
    allowed = np.ones((1, 1, 1, 1), bool)
    for part in mask.parts:
        positions = zip((samples, heads, queries, visible), part.shape, strict=True)
        allowed = allowed & part[tuple(slice(None) if size == 1 else position for position, size in positions)]
    rows, columns = np.r_[queries][:, None], np.r_[visible]
    if mask.causal:
        allowed = allowed & (rows >= columns)
    if mask.window:
        allowed = allowed & (np.abs(rows - columns) < mask.window)
    return allowed


def _top(logits: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the largest logits of each query are, and what they are, the largest first."""
    size = logits.shape[-1]
    rows = logits.reshape(-1, size)
    found = _largest(rows, min(number, size))
    values = np.take_along_axis(rows, found, -1)
    order = np.argsort(-values, axis=-1, kind="stable")
    shape = (*logits.shape[:-1], -1)
    return np.take_along_axis(found, order, -1).reshape(shape), np.take_along_axis(values, order, -1).reshape(shape)


def _largest(rows: np.ndarray, number: int) -> np.ndarray:
    """Where the largest entries of each row are. Looking for them in the whole row would take longer than attention.

    Each of the k largest is in one of the k groups with the largest maxima.
    """
    count, size = rows.shape
    groups = size // _GROUP
    if number == 1:
        return rows.argmax(-1)[:, None]
    if groups < 4 * number:
        return np.argpartition(rows, size - number, axis=-1)[:, size - number :]
    # A group is what lies `groups` apart, so that maxima are taken of whole rows: element by element, quickly.
    maxima = rows[:, : groups * _GROUP].reshape(count, _GROUP, groups).max(1)
    best = _largest(maxima, number)
    members = (best[:, None, :] + groups * np.arange(_GROUP)[:, None]).reshape(count, -1)
    rest = np.broadcast_to(np.arange(groups * _GROUP, size), (count, size - groups * _GROUP))
    members = np.concatenate([members, rest], axis=-1)
    values = np.take(rows, members + size * np.arange(count)[:, None])
    found = np.argpartition(values, values.shape[1] - number, axis=-1)[:, values.shape[1] - number :]
    return np.take_along_axis(members, found, -1)


def _fill(
    summary: dict[str, np.ndarray],
    block: Any,
    visible: slice,
    logits: np.ndarray,
    weights: np.ndarray,
    total: np.ndarray,
    attends: np.ndarray,
    top: np.ndarray,
    largest: np.ndarray,
    wanted: _Wanted,
) -> None:
    """Enters a block: `weights`, to be divided by their `total`, are the exponentials of the `logits`."""
    samples, heads, queries = block
    inverse = np.where(attends, 1 / total, 0).astype("float32")
    mean_logit = np.einsum("...k,...k->...", logits, weights) * inverse
    summary["entropy"][block] = np.where(attends, np.maximum(np.log(total) - mean_logit, 0), 0)

    # A row of distances is the one above it, moved by one.
    distances = np.abs(np.arange(visible.start - queries.stop + 1, visible.stop - queries.start)).astype("float32")
    distances = sliding_window_view(distances, weights.shape[-1])[::-1]
    summary["distance"][block] = np.einsum("...qk,qk->...q", weights, distances) * inverse

    is_key = largest > _HIDDEN
    ranks = slice(top.shape[-1])
    summary["top_key"][block][..., ranks] = np.where(is_key, top + visible.start, -1)
    summary["top_weight"][block][..., ranks] = np.exp(largest) * inverse[..., None]

    query_edges, key_edges = (_edges(size, wanted.map_size) for size in _shape(summary)[2:])
    bins = np.searchsorted(query_edges, np.arange(queries.start, queries.stop), "right") - 1
    binned = slice(bins[0], bins[-1] + 1)
    if len(bins) == binned.stop - binned.start:  # a query a bin
        sums = weights * inverse[..., None]
    else:
        sums = np.matmul((bins == np.arange(binned.start, binned.stop)[:, None]) * inverse[..., None, :], weights)
    summary["received"][samples, heads, visible] += sums.sum(-2)
    first, last = np.searchsorted(key_edges, [visible.start, visible.stop - 1], "right") - 1
    if len(key_edges) <= summary["received"].shape[-1]:
        sums = np.add.reduceat(sums, np.maximum(key_edges[first : last + 1] - visible.start, 0), axis=-1)
    summary["map"][samples, heads, binned, first : last + 1] += sums

    for number, row in enumerate(wanted.rows):
        if queries.start <= row < queries.stop:
            of_row = np.s_[:, :, row - queries.start]
            summary["row"][samples, heads, number, visible] = weights[of_row] * inverse[of_row][..., None]


def _edges(size: int, bins: int) -> np.ndarray:
    """Where bins begin, as many as that or as there are positions, and where the last one ends."""
    bins = min(bins, size)
    return np.arange(bins + 1) * size // bins


def _means(summary: dict[str, np.ndarray], attends: np.ndarray, wanted: _Wanted) -> dict[str, np.ndarray]:
    """Makes means of sums over queries."""
    summary["received"] /= np.maximum(attends.sum(-1), 1)[..., None]
    edges = _edges(attends.shape[-1], wanted.map_size)
    summary["map"] /= np.maximum(np.add.reduceat(attends, edges[:-1], axis=-1, dtype="int64"), 1)[..., None]
    return summary


def _difference_from_layer(heads: Heads, mask: Mask | None, wanted: _Wanted, buffers: dict) -> float:
    """How far the layer's own output for some queries and keys of the first sample lies from ours."""
    queries, keys = (
        np.linspace(0, length - 1, min(length, most)).astype("int32")
        for length, most in ((heads.query.shape[1], _CHECKED[0]), (heads.key.shape[1], _CHECKED[1]))
    )
    query, key, value = (
        ops.take(tensor, positions, axis=1)[:1]
        for tensor, positions in ((heads.query, queries), (heads.key, keys), (heads.value, keys))
    )
    allowed = None
    if mask is not None:
        allowed = _allowed(mask, (slice(0, 1), slice(0, heads.query.shape[2]), queries), slice(0, heads.key.shape[1]))
        shape = (1, allowed.shape[1], len(queries), heads.key.shape[1])
        allowed = ops.convert_to_tensor(np.broadcast_to(allowed, shape)[..., keys])
        mask = Mask((allowed,), causal=False, window=None)
    ours, _ = _attend(Heads(heads.layer, query, key, value, mask, heads.own), False, wanted, buffers, False)
    return relative_difference(heads.own(query, key, value, allowed), ours)
