"""What each head of an attention layer does, and how much the model needs it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import keras
import numpy as np
import xarray as xr
from keras import ops, tree
from scipy.special import entr, rel_entr

from kerasfactory import _backend
from kerasfactory._arguments import hint_at_codes
from kerasfactory._warnings import warn
from kerasfactory.explain._engine.attention import ROW_SUM
from kerasfactory.explain._engine.data import batch_size_of, batches_of, progress_bar, size_of
from kerasfactory.explain._engine.edit import editor
from kerasfactory.explain._engine.labels import attributes_of, axis_names
from kerasfactory.explain._engine.outputs import loss_name, loss_values, resolve_loss, sample_losses
from kerasfactory.explain._engine.tables import check_aligned, check_table

_BLOCK = 2**20  # scores to work on at once, in double precision


@overload
def head_statistics(weights: xr.DataArray) -> xr.Dataset: ...


@overload
def head_statistics(weights: Mapping[str, xr.DataArray]) -> dict[str, xr.Dataset]: ...


def head_statistics(weights: xr.DataArray | Mapping[str, xr.DataArray]) -> xr.Dataset | dict[str, xr.Dataset]:
    r"""Describes the attention scores of each head by four numbers.

    For one sample and one head, with the weight \(A_{ij}\) of key \(j\) for query \(i\) and \(n_i\) keys in view
    of that query,

    $$
    \operatorname{entropy}_i = -\frac{1}{\ln n_i} \sum_j A_{ij} \ln A_{ij}, \quad
    \operatorname{confidence}_i = \max_j A_{ij}, \quad
    \operatorname{distance}_i = \sum_j A_{ij}\, |i - j| ,
    $$

    and, for two heads with rows \(P = A_i\) and \(Q = B_i\) and their mean \(M = (P + Q) / 2\), the Jensen–Shannon
    distance with logarithms to the base 2,

    $$
    \operatorname{redundancy}_i = \sqrt{\tfrac{1}{2} \sum_j P_j \log_2 \frac{P_j}{M_j}
    + \tfrac{1}{2} \sum_j Q_j \log_2 \frac{Q_j}{M_j}} ,
    $$

    as in `scipy.spatial.distance.jensenshannon`. Each is averaged over all queries of all samples. Queries whose keys
    are all masked are left out.

    The confidence of a head is from Voita et al. 2019, [*Analyzing Multi-Head
    Self-Attention*](https://arxiv.org/abs/1905.09418), section 4; its mean distance from Vig and Belinkov 2019,
    [*Analyzing the Structure of Attention in a Transformer Language Model*](https://arxiv.org/abs/1906.04284); entropy
    and the comparison of heads by Jensen–Shannon from Clark et al. 2019, [*What Does BERT Look
    At?*](https://arxiv.org/abs/1906.04341), sections 3 and 6.

    Masked keys have weight 0 and are not counted. A key is in view of a query if any head of the layer gives it a
    weight, so that a head whose other weights underflow to 0 counts as sharp. If your masks differ from head to head,
    pass one head at a time: `scores.sel(head=[0])`.

    If an attention sink takes a part of the weight (scores with a coordinate `sink`), \(A_{ij}\) is the weight of the
    real keys, divided by its sum. It says where a query looks among the keys, whatever part the sink takes.

    Args:
        weights: The scores of a layer as `capture` returns them, a DataArray with the dimensions `sample` (or
            `sequence`), `head`, `query`, `key`; or the dictionary itself. The first dimension may be missing, as in
            `scores.isel(sample=0)`. Scores in a store are read some samples at a time.

    Returns:
        xr.Dataset | dict[str, xr.Dataset]: For a dictionary, one for each name in it. With these variables:

        - `entropy` (head): from 0, all weight on one key, to 1, the same weight on all keys in view. A query with one
          key in view has no choice: its entropy is 0, and it is left out of the mean. If all queries are like this, it
          is 0.
        - `confidence` (head): from 1 over the number of keys in view, to 1. Without unit.
        - `distance` (head): in positions, from 0, each query on itself, to the number of keys minus 1. NaN if there are
          not as many queries as keys, because the two then do not count the same positions.
        - `redundancy` (head, head_other): a distance, so small values mean redundant heads. From 0, the same rows, to
          1, no key in common. It is 0 on the diagonal, symmetric, and without unit.

        A head whose scores hold a NaN has NaN, and so has a head none of whose queries may attend to a key. The
        attributes are those of the scores.

    Raises:
        ValueError: If `weights` has other dimensions, as with several attention axes; if it is empty; and if rows do
            not sum to 1 (to 1 or less, with a sink), or hold negative numbers.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import explain

        # One head attends to all keys alike, the other one to the diagonal.
        uniform = np.full((4, 4), 1 / 4)
        scores = xr.DataArray([[uniform, np.eye(4)]], dims=("sample", "head", "query", "key"))
        statistics = explain.head_statistics(scores)

        print(statistics["entropy"].values)
        #> [1. 0.]
        print(statistics["confidence"].values, statistics["distance"].values)
        #> [0.25 1.  ] [1.25 0.  ]
        print(statistics["redundancy"].values.round(2).tolist())
        #> [[0.0, 0.74], [0.74, 0.0]]
        ```
    """
    if isinstance(weights, Mapping) and not isinstance(weights, xr.Dataset):
        return {name: head_statistics(scores) for name, scores in weights.items()}
    if not isinstance(weights, xr.DataArray):
        raise ValueError(
            "`weights` must be a DataArray of attention scores, or a dictionary of them, as `explain.capture` returns. "
            "Summaries do not contain how many keys each query has in view. Received: weights of type "
            f"{type(weights).__name__}"
        )
    name = weights.name if weights.name is not None else "weights"
    check_dims(name, [str(dim) for dim in weights.dims])
    if not weights.size:
        raise ValueError(
            f"`weights` must hold at least one sample, head, query and key. Received: {dict(weights.sizes)}"
        )
    first = next((dim for dim in weights.dims if dim in ("sample", "sequence")), "sample")
    if first not in weights.dims:
        weights = weights.expand_dims(first)
    weights = weights.transpose(first, "head", "query", "key")
    step = max(1, _BLOCK * len(weights) // weights.size)
    sums: dict[str, Any] = {}
    for start in range(0, len(weights), step):
        add_sums(sums, weights[start : start + step].to_numpy(), name, "sink" in weights.coords)
    dataset = statistics_of(sums).assign_attrs(weights.attrs)
    heads = weights.get_index("head")
    return dataset.assign_coords(head=heads, head_other=("head_other", heads))


def check_dims(name: Any, dims: Sequence[str]) -> None:
    if sorted(set(dims) - {"sample", "sequence"}) != ["head", "key", "query"] or {"sample", "sequence"} <= set(dims):
        raise ValueError(
            "Statistics of heads are of scores with the dimensions (sample, head, query, key). If layer "
            f"{name!r} attends over several axes, choose some of the others, or stack the axes into one query and "
            f"one key first. Received: {name!r} with dimensions ({', '.join(dims)})"
        )


def add_sums(sums: dict[str, Any], scores: np.ndarray, name: Any, has_sink: bool) -> None:
    """Adds to `sums` those of `scores` (sample, head, query, key) over samples and queries, for `statistics_of`."""
    total = scores.sum(-1, dtype="float64")
    attends = total != 0  # (sample, head, query); NaN counts
    missed = total - 1 if has_sink else np.abs(total - 1)
    if (missed > ROW_SUM)[attends].any() or (scores < 0).any():
        raise ValueError(
            f"The scores of layer {name!r} are not weights: each row over the keys must be at least 0 and sum to 1, or "
            f"be 0 if the query may look at nothing. Received rows that sum to {total.min():.3g} up to "
            f"{total.max():.3g}, and a smallest entry of {scores.min():.3g}"
        )
    weights = scores / np.where(attends, total, 1)[..., None]
    visible_keys = (weights != 0).any(1).sum(-1)  # (sample, query)
    has_choice = attends & (visible_keys > 1)[:, None]
    heads, queries, keys = weights.shape[1:]
    distances = np.abs(np.arange(queries)[:, None] - np.arange(keys)) if queries == keys else np.nan
    parts = {
        "queries": attends.sum((0, 2)),
        "queries_with_choice": has_choice.sum((0, 2)),
        "queries_of_both": np.einsum("shq,sgq->hg", attends, attends, dtype="int64"),
        "entropy": (entr(weights).sum(-1) / np.log(np.maximum(visible_keys, 2))[:, None]).sum((0, 2), where=has_choice),
        "confidence": weights.max(-1).sum((0, 2), where=attends),
        "distance": np.einsum("shqk,qk->h", weights, np.broadcast_to(distances, (queries, keys))),
        "redundancy": np.zeros((heads, heads)),
    }
    for one in range(heads):
        for other in range(one):
            both = attends[:, one] & attends[:, other]
            p, q = weights[:, one][both], weights[:, other][both]
            mean = (p + q) / 2
            # Not `scipy.spatial.distance.jensenshannon`: rounding takes twins below 0, where it returns NaN.
            divergence = np.maximum((rel_entr(p, mean) + rel_entr(q, mean)).sum(-1) / (2 * np.log(2)), 0)
            parts["redundancy"][one, other] = parts["redundancy"][other, one] = np.sqrt(divergence).sum()
    for part, values in parts.items():
        sums[part] = sums.get(part, 0) + values


def statistics_of(sums: dict[str, Any]) -> xr.Dataset:
    """The means over all queries that attend to any key, from what `add_sums` added up."""
    with np.errstate(invalid="ignore"):  # 0 / 0, where no query attends to any key
        entropy = sums["entropy"] / np.where(sums["queries"], np.maximum(sums["queries_with_choice"], 1), 0)
        confidence, distance = (sums[name] / sums["queries"] for name in ("confidence", "distance"))
        redundancy = sums["redundancy"] / sums["queries_of_both"]
    heads = np.arange(len(entropy))
    return xr.Dataset(
        {
            "entropy": ("head", entropy),
            "confidence": ("head", confidence),
            "distance": ("head", distance, {"units": "positions"}),
            "redundancy": (("head", "head_other"), redundancy),
        },
        {"head": heads, "head_other": heads},
    )


def head_importance(
    model: keras.Model,
    x: Any,
    y: Any,
    *,
    layers: str | Sequence[str] | None = None,
    loss: str | keras.losses.Loss | Callable[[Any, Any], Any] | None = None,
    batch_size: int | None = None,
    verbose: int | str = "auto",
) -> dict[str, xr.Dataset]:
    r"""Measures how much the loss depends on each head, by ablation, and estimates it with a gradient.

    A mask \(\xi_h\) is put on each head, so that a layer's output is \(\sum_h \xi_h A_h V_h W^O_h + b^O\). With the
    loss \(L(x, y; \xi)\) of one sample, and all masks 1 except the one in the formula,

    $$
    \operatorname{gradient}_h = \frac{1}{N} \sum_{n=1}^N
    \left| \left. \frac{\partial L(x_n, y_n; \xi_h)}{\partial \xi_h} \right|_{\xi_h = 1} \right| , \qquad
    \operatorname{ablation}_h = \frac{1}{N} \sum_{n=1}^N \bigl( L(x_n, y_n; \xi_h = 0) - L(x_n, y_n; 1) \bigr) .
    $$

    The gradient is the proxy of Michel et al. 2019, [*Are Sixteen Heads Really Better than
    One?*](https://arxiv.org/abs/1905.10650), section 4.1, before they normalize it within each layer. It takes one
    backward pass for all heads. It estimates the ablation, which takes a forward pass for each head. The two may
    disagree: a gradient describes small changes, and does not show that another head would take over, or that the loss
    flattens out.

    Both are for one head at a time. Heads that can be left out one by one may be needed as a pair, if they do the same.
    Use data that the model was not trained on: on its training data every head seems to matter.

    Args:
        model: A `keras.Model`, as for `capture`, with one or several attention layers.
        x: Arrays, as `model.predict` takes them: one, or a dictionary or list of them.
        y: The targets, numbers, as many samples as in `x`: an array, or a dictionary of arrays.
        layers: Names of the attention layers, as for `capture`.
        loss: What to measure, as `model.compile` takes it for one output: a name that Keras knows, a
            `keras.losses.Loss`, a function of `(y, outputs)`, or a list or dictionary of one of these. The function
            gets tensors and returns one value for each sample, or several, which are averaged. A `y` of shape (sample,)
            comes as (sample, 1), also in a dictionary. Write it with `keras.ops`, because it is differentiated: a
            result that is no longer a tensor has no gradient. It is compiled like the model. If it cannot be compiled,
            it runs without, more slowly. If `loss` is not given, it is the loss that the model was compiled with. Its
            reduction over the samples is not used, because the values of single samples count. Weights of classes, and
            losses that layers add, are not used either. A model with several outputs needs a function here.
        batch_size: Samples in a batch, as for `capture`.
        verbose: As for `capture`.

    Returns:
        dict[str, xr.Dataset]: From the layer's name, as in `capture`, to these variables, in the unit of the loss.

        - `gradient` (head): at least 0.
        - `ablation` (head): the rise of the loss without this head. Negative if the model is better without it.

        A layer that is called more than once has one entry for each call, `name#1`, `name#2`, …, for a mask on
        that call alone. The attributes are the `layer`, its `class`, the `call`, the name of the `loss` and its mean
        with all heads, `loss_value`, the number of `samples`, the `backend` and the `keras_version`.

    Raises:
        ValueError: As `capture`; if `x` is not an array, or `y` has missing values, is not of numbers, or not as long;
            if there is no loss, or it does not return values for each sample, or they are not finite; if the model's
            outputs are not made of its scores; and if a layer folds another axis into the batch, so that no head
            belongs to one sample.

    Warns:
        UserWarning: If the loss depends on the heads and has no gradient: `gradient` is 0 for all heads then.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        keras.utils.set_random_seed(0)
        inputs = keras.Input((4, 8))
        attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")
        attended = attention(inputs, inputs)
        model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))
        model.compile(loss="mse")

        x, y = np.random.default_rng(0).normal(size=(100, 4, 8)), np.zeros(100)
        importance = explain.head_importance(model, x, y, verbose=0)["attention"]

        print(importance.sizes, importance.attrs["loss"])
        #> Frozen({'head': 2}) mse
        print((importance["gradient"] > 0).values)
        #> [ True  True]
        ```
    """
    check_table(model, x)
    check_aligned(x=x, y=y)
    y = _checked_targets(x, y)
    loss = resolve_loss(model, loss)
    batch_size = batch_size_of(x) if batch_size is None else batch_size  # of `y` too
    batches, expected = batches_of(x, batch_size)
    progress = progress_bar(expected, verbose)
    edit = editor(model, next(batches_of(x, batch_size)[0]), layers)
    ones = {}  # for each layer a mask that is the same for all samples, (1, …, head, 1, 1)
    for name, shape in edit.shapes.items():
        axes = zip(axis_names(edit.found[name].layer, len(shape) + 1), shape, strict=True)
        ones[name] = np.ones([1, *(size if axis == "head" else 1 for axis, size in axes)], "float32")

    total_loss = (_total_loss, loss)
    gradient, ablation = ({name: np.zeros(mask.size) for name, mask in ones.items()} for _ in range(2))
    sum_of_losses, samples = 0.0, len(tree.flatten(x)[0])
    for inputs, (targets,) in zip(batches, batches_of(y, batch_size)[0], strict=True):
        of_samples = {name: np.repeat(mask, size_of(inputs), axis=0) for name, mask in ones.items()}
        gradients, _, _ = edit.gradient(inputs, _masked, of_samples, total_loss, targets, once=expected == 1)
        intact = loss_values(loss, targets, edit.predict(inputs, _masked, ones))
        sum_of_losses += intact.sum()
        for name, mask in ones.items():
            slopes = _backend.as_numpy(gradients[name]).reshape(-1, mask.size).astype("float64")
            gradient[name] += np.abs(slopes).sum(axis=0)
            for head in range(mask.size):
                without = (np.arange(mask.size) != head).astype("float32").reshape(mask.shape)
                ablated = loss_values(loss, targets, edit.predict(inputs, _masked, ones | {name: without}))
                ablation[name][head] += (ablated - intact).sum()
        progress.add(1)

    if not any(map(np.any, gradient.values())) and any(map(np.any, ablation.values())):
        warn(
            "The loss depends on the heads, but its gradient is 0 for every head and sample: the loss passes on no "
            "gradient, as when it rounds its values or computes with NumPy. Only `ablation` is informative."
        )
    of_loss = {"loss": loss_name(loss), "loss_value": sum_of_losses / samples, "samples": samples}
    return {
        name: xr.Dataset(
            {"gradient": ("head", gradient[name] / samples), "ablation": ("head", ablation[name] / samples)},
            {"head": np.arange(ones[name].size)},
            attributes_of(found) | of_loss,
        )
        for name, found in edit.found.items()
    }


def _masked(name: str, scores: Any, masks: Any) -> Any:
    mask = masks[name]
    if mask.shape[0] not in (None, 1, scores.shape[0]):
        raise ValueError(
            f"Layer {name!r} folds another axis into the batch: it attends over {scores.shape[0]} sequences for "
            f"{mask.shape[0]} samples. Leave it out with `layers=[...]`."
        )
    return scores * ops.cast(mask, scores.dtype)


def _total_loss(model: Any, outputs: Any, targets: Any, loss: Any) -> Any:
    return ops.sum(sample_losses(loss, targets, outputs))


def _checked_targets(x: Any, y: Any) -> Any:
    """The targets as arrays, of numbers, one for each sample of `x`."""
    if not (isinstance(x, dict | list | tuple) or hasattr(x, "__array__")):
        raise ValueError(
            "`x` must be an array, or a dictionary or list of arrays, so that it can be matched with `y`. Received: x "
            f"of type {type(x).__name__}"
        )
    y = tree.map_structure(np.asarray, y) if isinstance(y, dict) else np.asarray(y)
    samples, arrays = len(tree.flatten(x)[0]), tree.flatten(y)
    if samples == 0:
        raise ValueError("`x` is empty: it must hold at least one sample.")
    if any(array.dtype.kind not in "biuf" or len(np.atleast_1d(array)) != samples for array in arrays):
        raise ValueError(
            f"`y` must hold numbers, one target for each of the {samples} samples of `x`.{hint_at_codes(arrays[0])} "
            f"Received: {', '.join(f'y of shape {array.shape} and type {array.dtype}' for array in arrays)}"
        )
    if any(np.isnan(array).any() for array in arrays):
        raise ValueError("`y` has missing values (NaN): leave these samples out of `x` and `y`.")
    return tree.map_structure(lambda array: array[:, None] if array.ndim == 1 else array, y)  # as `fit` does
