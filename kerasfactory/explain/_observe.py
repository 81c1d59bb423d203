"""Running somebody's model over data, as `model.predict` does, and watching its attention layers at work.

Nothing of the model is changed: it runs on values of its variables that are passed in and handed back, and what a
forward pass writes into layers is taken out again.
"""

import contextlib
import difflib
import inspect
import itertools
import math
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
from kerasfactory.layers._attention import Attention

# While a forward pass is watched, methods of ours stand in front of the layers' own. One pass at a time.
_LOCK = threading.RLock()
_POSITIONS = 2**14  # in a batch, if nobody says how many samples it has
_ORDER = itertools.count()


class Call(NamedTuple):
    """One call of an attention layer, seen from inside. The tensors belong to the forward pass."""

    layer: Any  # the Keras attention layer
    scores: Any  # (batch, head, query, key), before dropout; with several attention axes, several queries and keys
    value: Any  # projected: (batch, key, head, size of a head)
    masks: str  # the masks in force, by the names of Keras' arguments
    query: Any  # of the layer, as it came
    output: Any  # of the layer, as it went
    attended: Any = None  # what `attend` says of the call, where that computed it; then there are no scores
    order: int = 0  # grows from call to call, of whichever layer


class Mask(NamedTuple):
    """A mask in parts. The whole is as large as the scores of a head."""

    whole: Callable[[], Any]  # makes what the layer's own attention takes
    queries: Any = None  # (batch, query): which of them look
    keys: tuple = ()  # each (batch, key): which of them are looked at
    explicit: Any = None  # as the model gives it, with 2 to 4 axes
    causal: bool = False
    window: int | None = None


class Heads(NamedTuple):
    """What an attention layer is about to attend with. The tensors are (batch, position, head, size of a head)."""

    layer: Any
    query: Any
    key: Any
    value: Any
    mask: Any  # `None`, a `Mask`, or a tensor
    own: Callable[[Any, Any, Any, Any], Any]  # the layer's own output, for a query, key and value, and a mask of 4 axes


class Batch(NamedTuple):
    """What was seen of one batch."""

    size: int
    inputs: int  # arrays in a batch
    expected: int | None  # how many batches there will be, where that is known
    # By name, in the order of the calls: the layer's, or `layer#1`, `layer#2`, …, if it is called more than once.
    measured: dict[str, Any]
    found: dict[str, "Found"]  # by the same names
    difference: float  # of the first batch's outputs, watched and unwatched, relative to the largest
    changes_state: bool  # whether what the model does with a batch depends on those before: random numbers, a state


class Found(NamedTuple):
    """What is known of a call without running it."""

    name: str  # of the layer
    number: int  # of the call
    layer: Any
    masks: str


def observe(
    model: Any,
    x: Any,
    layers: Any,
    batch_size: int | None,
    verbose: Any,
    measure: Callable[[Call], Any],
    attend: Callable[[Heads, bool], tuple[Any, Any]] | None = None,
    only_scores: bool = False,
) -> Iterator[Batch]:
    """Yields, batch by batch, what `measure` makes of each call of an attention layer.

    With `only_scores`, `measure` looks at nothing else, and a model that is not compiled need not run to its end.

    With `attend` no scores are formed, nor masks as large as they: in place of each layer that attends as Keras' do,
    it gets what the layer would attend with, and whether that is one of `layers`, and returns the layer's output
    (`None`: the layer is to do it itself) and something for `measure`. The model then runs eagerly, and only so:
    nothing is compared with a run that forms them.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "`model` must be a keras.Model; `keras.Sequential([layer])` makes one of a layer. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    batches, expected = _batches(x, batch_size)
    progress = progress_bar(expected, verbose)
    first = next(batches, None)
    if first is None or _size(first) == 0:
        raise ValueError("`x` is empty: it must hold at least one sample.")
    _build(model, first)
    attentions = find_attention(model)
    chosen = _choose(attentions, layers)
    steps = _steps_in_place(model, chosen, measure, attend) if attend else _steps(model, chosen, measure)
    state = _state(model)
    measured, after, outputs = steps.compared(state, first)
    measured = _in_order(measured, steps.calls)
    changes_state = any(
        one is not other and not np.array_equal(_backend.as_numpy(one), _backend.as_numpy(other))
        for one, other in zip(state[1], after[1], strict=True)
    )
    state = after
    found = {}
    for full_name in measured:
        name, number = steps.calls[full_name]
        found[full_name] = Found(name, number, chosen[name], steps.masks[full_name])
    _name_what_is_missing(model, attentions, chosen, layers, {call.name for call in found.values()}, steps.lost)
    inputs = len(tree.flatten(first))
    batch = Batch(_size(first), inputs, expected, measured, found, _difference(*outputs), changes_state)
    yield batch
    progress.update(1)

    can_stop = only_scores and not changes_state and not steps.lost and _always_calls_the_same(model)
    watched = steps.watched_until(len(found)) if can_stop else steps.watched
    done = 1
    for data in batches:
        measured, state = watched(state, data)
        done += 1
        if set(measured) != set(found):
            raise RuntimeError(
                f"In batch {done} the model called other attention layers than in the first: {sorted(measured)} "
                f"instead of {sorted(found)}. Capture such batches one by one."
            )
        yield batch._replace(size=_size(data), measured=_in_order(measured, steps.calls))
        progress.update(done)
    if expected is None:
        progress.update(done, finalize=True)


def progress_bar(expected: int | None, verbose: Any, unit: str = "batch") -> Any:
    """Keras', for so many batches, or something else."""
    if verbose not in ("auto", 0, 1, 2):
        raise ValueError(f'`verbose` must be "auto", 0, 1 or 2. Received: verbose={verbose!r}')
    if verbose == "auto":
        verbose = 1 if keras.config.is_interactive_logging_enabled() else 2
    return keras.utils.Progbar(expected, verbose=verbose, unit_name=unit)


def _state(model: Any) -> tuple[list, list]:
    """The values of its variables."""
    # TensorFlow's value is the variable itself.
    trainable, non_trainable = (
        [ops.cast(variable.value, variable.dtype) for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    return trainable, non_trainable


class _Steps(NamedTuple):
    """Functions from `(state, data)` that run a batch, and what they come to know of the model as they are traced."""

    compared: Callable  # to what is measured, the state afterward, and the outputs, unwatched and watched
    watched: Callable  # to what is measured and the state afterward: a compiled function leaves out the rest
    watched_until: Callable  # from a number of calls to the same function, which, if not compiled, stops after them
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
            measured = _measured(seen, measure, calls, masks, lost)
        return measured, state, outputs

    def compared(state, data):
        model = its_model()
        with _unchanged(model):
            outputs, _ = _backend.predict_step(model, state, data)
        measured, state, watched_outputs = watched(state, data)
        return measured, state, (outputs, watched_outputs)

    def stopping(number):
        def until(state, data):
            model = its_model()
            layers = {name: layer() for name, layer in its_layers.items()}
            with _unchanged(model), _watching(layers, stop_after=number) as seen:
                with contextlib.suppress(_Enough):
                    _backend.predict_step(model, state, data)
                return _measured(seen, measure, calls, masks, lost), state

        return _backend.compiled(until, run_eagerly=True, jit_compile=False)

    with _unchanged(model):  # Keras works this out when it is asked, and writes the answer into the model
        how = {"run_eagerly": model.run_eagerly, "jit_compile": model.jit_compile}
    compiled = _backend.compiled(lambda state, data: watched(state, data)[:2], **how)
    is_eager = how["run_eagerly"] or keras.config.backend() == "torch"
    steps = _Steps(
        _backend.compiled(compared, **how, runs_once=True),
        compiled,
        stopping if is_eager else lambda number: compiled,
        calls,
        masks,
        lost,
    )
    kept[measure] = (traced_of, steps)
    return steps


def _steps_in_place(model: Any, chosen: dict[str, Any], measure: Callable, attend: Callable) -> _Steps:
    """Not kept, for nothing is compiled: `attend` needs values."""
    calls: dict[str, tuple[str, int]] = {}
    masks: dict[str, str] = {}
    lost: set[str] = set()

    def watched(state, data):
        with _unchanged(model), _watching(chosen, attend) as seen:
            for layer in find_attention(model).values():
                if not any(layer is other for other in chosen.values()):
                    _watch(layer, None, attend)  # it would form what the chosen ones do not
            _, state = _backend.predict_step(model, state, data)
            measured = _measured(seen, measure, calls, masks, lost)
        return measured, state

    step = _backend.compiled(watched, run_eagerly=True, jit_compile=False)
    return _Steps(lambda state, data: (*step(state, data), ((), ())), step, lambda number: step, calls, masks, lost)


def _measured(seen: dict[str, list[Call]], measure: Callable, calls: dict, masks: dict, lost: set) -> dict[str, Any]:
    measured = {}
    numbered = [
        (call, name, number, name if len(calls_of_layer) == 1 else f"{name}#{number}")
        for name, calls_of_layer in seen.items()
        for number, call in enumerate(calls_of_layer, start=1)
    ]
    for call, name, number, full_name in sorted(numbered, key=lambda entry: entry[0].order):
        if call.attended is None and (call.scores is None or not _backend.is_usable(call.scores)):
            lost.add(name)
            continue
        calls[full_name], masks[full_name] = (name, number), call.masks
        measured[full_name] = measure(call)
    return measured


def _in_order(measured: dict[str, Any], calls: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """What JAX returns from a compiled function is in the order of the alphabet."""
    return {name: measured[name] for name in calls if name in measured}


_PLAIN = (bool, int, float, str, type(None))
# Keras' own notes, which no output depends on; the last two change while a model trains on JAX.
_CHANGED_BY_USE = ("_called", "_parent_path", "_jax_state", "_jax_state_synced")


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


class _Enough(BaseException):
    """Everything is known that is wanted. Keras takes hold of an `Exception` on its way."""


def _always_calls_the_same(model: Any) -> bool:
    """Whether the model is a graph that calls its attention layers, the same ones for all data."""
    of_keras = type(model).call.__module__ in ("keras.src.models.functional", "keras.src.models.sequential")
    return of_keras and all(
        _is_usual(layer.call)
        or not find_attention(layer)
        or (isinstance(layer, keras.Model) and _always_calls_the_same(layer))
        for layer in model.layers
    )


@contextlib.contextmanager
def _watching(
    attentions: dict[str, Any], attend: Callable | None = None, stop_after: int | None = None
) -> Iterator[dict[str, list[Call]]]:
    """Fills a dictionary with the calls of the layers. To be used within `_unchanged`, which takes it all away."""
    calls: dict[str, list[Call]] = {name: [] for name in attentions}

    def stop():
        if sum(map(len, calls.values())) == stop_after:
            raise _Enough

    for name, layer in attentions.items():
        _watch(layer, calls[name], attend, stop if stop_after else None)
    yield calls


def _watch(layer: Any, calls: list[Call] | None, attend: Callable | None, stop: Callable | None = None) -> None:
    """Has the layer's calls noted in `calls`, if that is given, and its attention computed by `attend`, likewise.

    With `stop`, which is called after each, only the scores are noted.
    """
    call, compute_attention, compute_mask = layer.call, layer._compute_attention, layer._compute_attention_mask
    thread = threading.get_ident()  # the model may be running in another one too, which is to notice nothing
    masks: list[str] = []
    # What a subclass computes in its own way is left to it.
    in_place = _is_usual(compute_attention, layer._masked_softmax)
    windows = [layer._compute_sliding_window_mask] if _window(layer) else []
    in_parts = attend and in_place and _is_usual(call, compute_mask, layer._compute_causal_mask, *windows)

    def watched_mask(*args, **kwargs):
        if threading.get_ident() != thread:
            return compute_mask(*args, **kwargs)
        given = [name for name, value in kwargs.items() if value is not None and value is not False]
        masks.extend(name for name in given if name.endswith("mask"))
        parts = _mask_in_parts(layer, compute_mask, args, kwargs) if in_parts else None
        return compute_mask(*args, **kwargs) if parts is None else parts

    def watched_attention(*args, **kwargs):
        if threading.get_ident() != thread:
            return compute_attention(*args, **kwargs)
        if kwargs.get("use_causal_mask"):
            masks.append("use_causal_mask")
        if _window(layer):
            masks.append("sliding_window")
        in_force = ", ".join(masks) or "none"
        if attend and in_place:
            heads = _heads(layer, compute_attention, compute_mask, args, kwargs)
            output, attended = (None, None) if heads is None else attend(heads, calls is not None)
            if attended is not None and calls is not None:
                calls.append(Call(layer, None, None, in_force, None, None, attended, next(_ORDER)))
            if output is not None:
                return output, None
            args, kwargs = _with_whole_mask(args, kwargs)
            if attended is not None:
                return compute_attention(*args, **kwargs)
        if stop is not None and calls is not None and type(layer) is Attention and len(args[0].shape) == 4:
            scores = _explicit_scores(layer, compute_attention, args, kwargs)
            calls.append(Call(layer, scores, None, in_force, None, None, order=next(_ORDER)))
            stop()
            return compute_attention(*args, **kwargs)
        output, scores = compute_attention(*args, **kwargs)
        if calls is None:
            return output, scores
        explicit = scores
        if scores is None:  # as from a fused kernel; the model goes on with what that put out
            explicit = _explicit_scores(layer, compute_attention, args, kwargs)
        value = args[2] if len(args) > 2 else kwargs["value"]
        calls.append(Call(layer, explicit, value, in_force, None, None, order=next(_ORDER)))
        if stop is not None:
            stop()
        return output, scores

    def watched_call(*args, **kwargs):
        if threading.get_ident() != thread:
            return call(*args, **kwargs)
        masks.clear()
        before = len(calls or ())
        result = call(*args, **kwargs)
        if calls is not None and len(calls) == before + 1 and calls[before].attended is None:
            calls[before] = calls[before]._replace(
                query=args[0] if args else kwargs["query"], output=result[0] if isinstance(result, tuple) else result
            )
        return result

    # Straight into the dictionary: Keras and PyTorch would take note of an attribute that is set.
    layer.__dict__.update(call=watched_call, _compute_attention=watched_attention, _compute_attention_mask=watched_mask)


def _is_usual(*methods: Callable) -> bool:
    """Whether these methods of an attention layer are Keras', or ours, which do the same."""
    return all(
        method.__module__.startswith(("keras.src.layers.attention.", "kerasfactory.layers.")) for method in methods
    )


def _window(layer: Any) -> int | None:
    return getattr(layer, "_sliding_window", None) or getattr(layer, "sliding_window", None)


def _has_values(*tensors: Any) -> bool:
    return all(_backend.concrete(tensor) is not None and _backend.is_usable(tensor) for tensor in tensors)


def _mask_in_parts(layer: Any, compute_mask: Callable, args: tuple, kwargs: dict[str, Any]) -> Mask | None:
    """`None` if there is no mask, or it is not to be taken apart."""
    given = inspect.signature(compute_mask).bind(*args, **kwargs).arguments
    padding = [given.get(name) for name in ("query_mask", "value_mask", "key_mask")]
    explicit, causal = given.get("attention_mask"), bool(given.get("use_causal_mask"))
    tensors = [part for part in [given["query"], given["value"], explicit, *padding] if part is not None]
    if not _has_values(*filter(ops.is_tensor, tensors)):
        return None
    if len(tensors) == 2 and not causal and not _window(layer):
        return None
    of_keras = compute_mask.__module__.startswith("keras.")
    if of_keras and explicit is not None and len(explicit.shape) == 4 and len(tensors) > 3:
        return None  # Keras sets samples against heads then
    keys = tuple(mask for mask in padding[1:] if mask is not None)
    return Mask(lambda: compute_mask(*args, **kwargs), padding[0], keys, explicit, causal, _window(layer))


def _heads(layer: Any, compute_attention: Callable, compute_mask: Callable, args: tuple, kwargs: dict) -> Heads | None:
    """`None` if the layer has to compute its attention by itself, as when it is asked for scores."""
    given = inspect.signature(compute_attention).bind(*args, **kwargs).arguments
    query, key, value = (given[name] for name in ("query", "key", "value"))
    mask, training = given.get("attention_mask"), given.get("training")
    asked = given.get("return_attention_scores") or layer.__dict__.get("_return_attention_scores")
    dropout = training and layer.dropout > 0
    if asked or dropout or not _has_values(query, key, value):
        return None
    if mask is None and given.get("use_causal_mask"):
        mask = Mask(lambda: None, causal=True)

    def own(query, key, value, allowed):
        # The mask is whole: the layer has nothing to add to it. And not every flash attention takes one.
        with _attributes(layer, _flash_attention=False, _sliding_window=None, sliding_window=None):
            if allowed is not None and _is_usual(compute_mask):
                # Brings it into its own form. It looks for lengths in the second axis, and finds them there here, too.
                allowed = compute_mask(query[..., 0], value[..., 0], attention_mask=allowed)
            return compute_attention(query, key, value, attention_mask=allowed, training=training)[0]

    return Heads(layer, query, key, value, mask, own)


def _with_whole_mask(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    def whole(argument):
        return argument.whole() if isinstance(argument, Mask) else argument

    return tuple(map(whole, args)), {name: whole(argument) for name, argument in kwargs.items()}


@contextlib.contextmanager
def _attributes(layer: Any, **values: Any) -> Iterator[None]:
    """Gives the layer other values of attributes that it has."""
    before = {name: layer.__dict__[name] for name in values if name in layer.__dict__}
    layer.__dict__.update({name: values[name] for name in before})
    try:
        yield
    finally:
        layer.__dict__.update(before)


def _explicit_scores(layer: Any, compute_attention: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if type(layer) is Attention and len(args[0].shape) == 4:
        return layer.scores(args[0], args[1], args[3])
    # Keras' layers are asked for scores by argument or, the grouped one, by attribute.
    with _attributes(layer, _return_attention_scores=True, _flash_attention=False):
        return compute_attention(*args[:5], *[True] * len(args[5:6]), **kwargs)[1]


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


def batch_size_of(x: Any, most: int) -> int | None:
    """So that what a model holds of a batch does not grow with the length of its samples. `None` for no arrays."""
    if not (isinstance(x, dict | list | tuple) or hasattr(x, "__array__")):
        return None
    shapes = [np.shape(array) for array in tree.flatten(x)]
    positions = max((math.prod(shape[1:-1]) if len(shape) > 2 else shape[-1] for shape in shapes if shape), default=1)
    return min(most, max(1, _POSITIONS // max(1, positions)))


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
