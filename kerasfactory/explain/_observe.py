"""Running somebody's model over data, as `model.predict` does, and watching its attention layers at work.

Nothing of the model is changed: it runs on values of its variables that are passed in and handed back, and what a
forward pass writes into layers is taken out again.
"""

import contextlib
import difflib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from kerasfactory import _backend
from kerasfactory._arguments import positive_integer
from kerasfactory.layers import InterpretableMultiHeadAttention

# While a forward pass is watched, methods of ours stand in front of the layers' own. One pass at a time.
_LOCK = threading.RLock()


class Call(NamedTuple):
    """One call of an attention layer, seen from inside. The tensors belong to the forward pass."""

    layer: Any  # the Keras attention layer
    scores: Any  # (batch, head, query, key), before dropout; with several attention axes, several queries and keys
    value: Any  # projected: (batch, key, head, size of a head)
    masks: str  # the masks in force, by the names of Keras' arguments
    query: Any  # of the layer, as it came
    output: Any  # of the layer, as it went


class Batch(NamedTuple):
    """What was seen of one batch."""

    size: int
    inputs: int  # arrays in a batch
    expected: int | None  # how many batches there will be, where that is known
    measured: dict[str, Any]  # by name: the layer's, or `layer#1`, `layer#2`, and so on, if it is called more than once
    found: dict[str, "Found"]  # by the same names
    difference: float  # of the first batch's outputs, watched and unwatched, relative to the largest


class Found(NamedTuple):
    """What is known of a call without running it."""

    name: str  # of the layer
    number: int  # of the call
    layer: Any
    masks: str


def observe(
    model: Any, x: Any, layers: Any, batch_size: int | None, verbose: Any, measure: Callable[[Call], Any]
) -> Iterator[Batch]:
    """Yields, batch by batch, what `measure` makes of each call of an attention layer."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            "`model` must be a keras.Model; `keras.Sequential([layer])` makes one of a layer. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    if verbose not in ("auto", 0, 1, 2):
        raise ValueError(f'`verbose` must be "auto", 0, 1 or 2. Received: verbose={verbose!r}')
    batches, expected = _batches(x, batch_size)
    first = next(batches, None)
    if first is None or _size(first) == 0:
        raise ValueError("`x` is empty: it must hold at least one sample.")
    _build(model, first)
    attentions = find_attention(model)
    chosen = _choose(attentions, layers)
    steps = _steps(model, chosen, measure)
    state: Any = tuple(
        [ops.cast(variable.value, variable.dtype) for variable in variables]  # TensorFlow's value is the variable
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    if verbose == "auto":
        verbose = 1 if keras.config.is_interactive_logging_enabled() else 2
    progress = keras.utils.Progbar(expected, verbose=verbose, unit_name="batch")

    measured, state, outputs = steps.compared(state, first)
    found = {}
    for full_name in measured:
        name, number = steps.calls[full_name]
        found[full_name] = Found(name, number, chosen[name], steps.masks[full_name])
    _name_what_is_missing(model, attentions, chosen, layers, {call.name for call in found.values()}, steps.lost)
    common = (len(tree.flatten(first)), expected)
    difference = _difference(*outputs)
    yield Batch(_size(first), *common, measured, found, difference)
    progress.update(1)

    done = 1
    for data in batches:
        measured, state = steps.watched(state, data)
        done += 1
        if set(measured) != set(found):
            raise RuntimeError(
                f"In batch {done} the model called other attention layers than in the first: {sorted(measured)} "
                f"instead of {sorted(found)}. Capture such batches one by one."
            )
        yield Batch(_size(data), *common, measured, found, difference)
        progress.update(done)
    if expected is None:
        progress.update(done, finalize=True)


class _Steps(NamedTuple):
    """Functions from `(state, data)` that run a batch, and what they come to know of the model as they are traced."""

    compared: Callable  # to what is measured, the state afterwards, and the outputs, unwatched and watched
    watched: Callable  # to what is measured and the state afterwards: a compiled function leaves out the rest
    calls: dict[str, tuple[str, int]]
    masks: dict[str, str]
    lost: set[str]


# Compiling takes longer than running many a batch: functions are kept, by what they measure, while their model lives.
_KEPT: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()


def _steps(model: Any, chosen: dict[str, Any], measure: Callable[[Call], Any]) -> _Steps:
    kept = _KEPT.setdefault(model, {})
    traced_of = _fingerprint(chosen, model)
    if measure in kept and _same(kept[measure][0], traced_of):
        return kept[measure][1]

    calls: dict[str, tuple[str, int]] = {}
    masks: dict[str, str] = {}
    lost: set[str] = set()
    # What is kept must not keep the model, or both would stay for ever.
    its_model = weakref.ref(model)
    its_layers = {name: weakref.ref(layer) for name, layer in chosen.items()}

    def watched(state, data):
        model = its_model()
        with _unchanged(model), _watching({name: layer() for name, layer in its_layers.items()}) as seen:
            outputs, state = _backend.predict_step(model, state, data)
            measured = {}
            for name, calls_of_layer in seen.items():
                for number, call in enumerate(calls_of_layer, start=1):
                    if call.scores is None or not _backend.is_usable(call.scores):
                        lost.add(name)
                        continue
                    full_name = name if len(calls_of_layer) == 1 else f"{name}#{number}"
                    calls[full_name], masks[full_name] = (name, number), call.masks
                    measured[full_name] = measure(call)
        return measured, state, outputs

    def compared(state, data):
        model = its_model()
        with _unchanged(model):
            outputs, _ = _backend.predict_step(model, state, data)
        measured, state, watched_outputs = watched(state, data)
        return measured, state, (outputs, watched_outputs)

    with _unchanged(model):  # Keras works this out when it is asked, and writes the answer into the model
        how = {"run_eagerly": model.run_eagerly, "jit_compile": model.jit_compile}
    steps = _Steps(
        _backend.compiled(compared, **how, once=True),
        _backend.compiled(lambda state, data: watched(state, data)[:2], **how),
        calls,
        masks,
        lost,
    )
    kept[measure] = (traced_of, steps)
    return steps


_PLAIN = (bool, int, float, str, type(None))
_CHANGED_BY_USE = ("_called", "_parent_path")  # Keras' own notes, which no output depends on


def _fingerprint(chosen: dict[str, Any], model: Any) -> list:
    """All that a traced function may have made a constant of: it changes if any attribute of any layer is set."""
    entries: list[Any] = list(chosen)
    for layer in model._flatten_layers():
        for name, value in vars(layer).items():
            if name in _CHANGED_BY_USE:
                continue
            entries.append(name)
            if isinstance(value, _PLAIN):
                entries.append(value)
            else:
                try:
                    entries.append(weakref.ref(value))  # not its id, which another object may have later
                except TypeError:
                    entries.append(id(value))
    return entries


def _same(one: list, other: list) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(a is b or (isinstance(a, _PLAIN) and a == b) for a, b in pairs)


def find_attention(model: Any) -> dict[str, Any]:
    """The Keras attention layers in `model`, by name; by path (`block_1/attention`) where a name is not unique."""
    paths: list[tuple[Any, list[str]]] = []
    visited = set()

    def walk(layer, path):
        for sublayer in layer._layers:
            if id(sublayer) in visited:  # a shared layer, or one that knows its parent
                continue
            visited.add(id(sublayer))
            # What wraps Keras' layer is what its user knows.
            of_ours = isinstance(layer, InterpretableMultiHeadAttention) and sublayer is layer.mha
            sub_path = path if of_ours else [*path, sublayer.name]
            if isinstance(sublayer, keras.layers.MultiHeadAttention | keras.layers.GroupQueryAttention):
                paths.append((sublayer, sub_path))
            else:
                walk(sublayer, sub_path)

    walk(model, [])
    last_names = [path[-1] for _, path in paths]
    full_names = ["/".join(path) for _, path in paths]
    found = {}
    for number, (layer, path) in enumerate(paths):
        name = path[-1] if last_names.count(path[-1]) == 1 else full_names[number]
        if full_names.count(name) > 1:
            name = f"{name}/{full_names[:number].count(name)}"
        found[name] = layer
    return found


def _choose(attentions: dict[str, Any], layers: Any) -> dict[str, Any]:
    if layers is None:
        return attentions
    wanted = [layers] if isinstance(layers, str) else list(layers)
    if not wanted:
        raise ValueError("`layers` is empty: name at least one layer, or leave it out for all of them.")
    chosen: dict[str, Any] = {}
    for name in wanted:
        matches = {full: layer for full, layer in attentions.items() if name in (full, full.rsplit("/", 1)[-1])}
        if not matches:
            near = difflib.get_close_matches(str(name), attentions, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"The model has no attention layer {name!r}. {hint}It has: {', '.join(attentions) or 'none'}. "
                f"Received: layers={layers!r}"
            )
        chosen |= matches
    return {name: layer for name, layer in attentions.items() if name in chosen}


def _name_what_is_missing(model, attentions, chosen, layers, seen, lost):
    """No layer is left out in silence."""
    missing = {}
    for name in chosen:
        if name in lost:
            missing[name] = (
                "its scores stay inside a loop, a `vmap` or a function compiled by itself, or its own "
                "`_compute_attention` does not return them"
            )
        elif name not in seen:
            missing[name] = "the model did not call it, or its `call` does not go through `_compute_attention`"
    if layers is None:
        for layer in model._flatten_layers(include_self=False):
            if isinstance(layer, keras.layers.Attention):
                missing[layer.name] = f"it is a `keras.layers.{type(layer).__name__}`, without heads"
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in missing.items())
    if seen and layers is None:
        if missing:
            warnings.warn(f"These layers are not captured:{reasons}", stacklevel=4)
    elif missing:
        raise ValueError(f"These layers cannot be captured:{reasons}")
    elif not attentions:
        names = ", ".join(layer.name for layer in model.layers)
        raise ValueError(
            "The model has no `MultiHeadAttention` or `GroupQueryAttention`, neither Keras' own nor a subclass or a "
            f"wrapper of it. Its layers are: {names}"
        )


@contextlib.contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Takes back what a forward pass writes into layers; the values of variables are not touched by one of ours."""
    with _LOCK:
        before = [
            (layer, dict(layer.__dict__), list(layer._losses), set(layer._loss_ids))
            for layer in model._flatten_layers()
        ]
        try:
            yield
        finally:
            for layer, attributes, losses, loss_ids in before:
                # Not cleared and filled again: another thread may be using the layer.
                for name in set(layer.__dict__) - set(attributes):
                    del layer.__dict__[name]
                for name, value in attributes.items():
                    if name not in layer.__dict__ or layer.__dict__[name] is not value:
                        layer.__dict__[name] = value
                layer._losses[:] = losses
                layer._loss_ids.clear()
                layer._loss_ids.update(loss_ids)


@contextlib.contextmanager
def _watching(attentions: dict[str, Any]) -> Iterator[dict[str, list[Call]]]:
    """Fills a dictionary with the calls of the layers. To be used within `_unchanged`, which takes it all away."""
    calls: dict[str, list[Call]] = {name: [] for name in attentions}
    for name, layer in attentions.items():
        _watch(layer, calls[name])
    yield calls


def _watch(layer: Any, calls: list[Call]) -> None:
    call, compute_attention, compute_mask = layer.call, layer._compute_attention, layer._compute_attention_mask
    thread = threading.get_ident()  # the model may be running in another one too, which is to notice nothing
    masks: list[str] = []

    def watched_mask(*args, **kwargs):
        if threading.get_ident() == thread:
            given = [name for name, value in kwargs.items() if value is not None and value is not False]
            masks.extend(name for name in given if name.endswith("mask"))
        return compute_mask(*args, **kwargs)

    def watched_attention(*args, **kwargs):
        output, scores = compute_attention(*args, **kwargs)
        if threading.get_ident() == thread:
            if kwargs.get("use_causal_mask"):
                masks.append("use_causal_mask")
            if getattr(layer, "_sliding_window", None) or getattr(layer, "sliding_window", None):
                masks.append("sliding_window")
            if scores is None:  # as from a fused kernel; the model goes on with what that put out
                scores = _explicit_scores(layer, compute_attention, args, kwargs)
            value = args[2] if len(args) > 2 else kwargs["value"]
            calls.append(Call(layer, scores, value, ", ".join(masks) or "none", None, None))
        return output, scores

    def watched_call(*args, **kwargs):
        if threading.get_ident() != thread:
            return call(*args, **kwargs)
        masks.clear()
        before = len(calls)
        result = call(*args, **kwargs)
        if len(calls) == before + 1:
            calls[before] = calls[before]._replace(
                query=args[0] if args else kwargs["query"], output=result[0] if isinstance(result, tuple) else result
            )
        return result

    # Straight into the dictionary: Keras and PyTorch would take note of an attribute that is set.
    layer.__dict__.update(call=watched_call, _compute_attention=watched_attention, _compute_attention_mask=watched_mask)


def _explicit_scores(layer: Any, compute_attention: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    # Keras' layers are asked for scores by argument or, the grouped one, by attribute.
    asking = {"_return_attention_scores": True, "_flash_attention": False}
    before = {name: layer.__dict__[name] for name in asking if name in layer.__dict__}
    layer.__dict__.update({name: asking[name] for name in before})
    try:
        return compute_attention(*args[:5], *[True] * len(args[5:6]), **kwargs)[1]
    finally:
        layer.__dict__.update(before)


def _build(model: Any, data: Any) -> None:
    """Gives a model its weights that has none yet, as `predict` would."""
    if all(layer.built for layer in model._flatten_layers()):
        return
    with keras.StatelessScope():
        model(data[0])
    for layer in model._flatten_layers():
        if isinstance(layer, InterpretableMultiHeadAttention):
            layer._scores = layer._traced_scores = None  # were computed with weights that are no more


def _batches(x: Any, batch_size: int | None) -> tuple[Iterator[tuple], int | None]:
    """The batches that `model.predict` would make of `x`, each as a tuple `(inputs,)`, and how many, if known."""
    if isinstance(x, dict | list | tuple) or hasattr(x, "__array__"):
        arrays = tree.map_structure(lambda array: array if hasattr(array, "shape") else np.asarray(array), x)
        shapes = [tuple(array.shape) for array in tree.flatten(arrays)]
        if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
            raise ValueError(
                "`x` must be an array, or a dictionary or list of arrays, with the samples along the first axis, as "
                f"many in each. Received arrays of shapes: {shapes}"
            )
        samples, step = shapes[0][0], positive_integer("batch_size", 32 if batch_size is None else batch_size)
        parts = [slice(start, start + step) for start in range(0, samples, step)]

        def batch(part):
            return _inputs((tree.map_structure(lambda array: array[part], arrays),))

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
    return map(_inputs, batches), expected


def _inputs(batch: Any) -> tuple:
    """What the model gets of a batch: labels and weights are left out, and numbers are as Keras makes them."""
    inputs, _, _ = keras.utils.unpack_x_y_sample_weight(batch)

    def converted(array):
        if ops.is_tensor(array):
            return array
        array = np.asarray(array)
        return ops.convert_to_tensor(array, keras.config.floatx() if array.dtype == "float64" else None)

    return (tree.map_structure(converted, inputs),)


def _size(data: tuple) -> int:
    return tree.flatten(data)[0].shape[0]


def _difference(outputs: Any, watched_outputs: Any) -> float:
    """The largest difference between two outputs of a model, relative to the largest entry."""
    worst = 0.0
    for one, other in zip(tree.flatten(outputs), tree.flatten(watched_outputs), strict=True):
        one, other = (_backend.as_numpy(a).astype("float64") for a in (one, other))
        same = (one == other) | (np.isnan(one) & np.isnan(other))
        if not same.all():
            worst = max(worst, np.abs(one - other)[~same].max() / np.abs(one[np.isfinite(one)]).max(initial=1e-30))
    return float(worst)
