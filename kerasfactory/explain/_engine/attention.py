"""How attention layers work inside: the one place that knows."""

import contextlib
import difflib
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from kerasfactory import _backend
from kerasfactory.layers import InterpretableMultiHeadAttention
from kerasfactory.layers._attention import Attention

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
            scores = explicit_scores(layer, compute_attention, args, kwargs)
            calls.append(Call(layer, scores, None, in_force, None, None, order=next(_ORDER)))
            stop()
            return compute_attention(*args, **kwargs)
        output, scores = compute_attention(*args, **kwargs)
        if calls is None:
            return output, scores
        explicit = scores
        if scores is None:  # as from a fused kernel; the model goes on with what that put out
            explicit = explicit_scores(layer, compute_attention, args, kwargs)
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


def explicit_scores(layer: Any, compute_attention: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if type(layer) is Attention and len(args[0].shape) == 4:
        return layer.scores(args[0], args[1], args[3])
    # Keras' layers are asked for scores by argument or, the grouped one, by attribute.
    with _attributes(layer, _return_attention_scores=True, _flash_attention=False):
        return compute_attention(*args[:5], *[True] * len(args[5:6]), **kwargs)[1]


def float_scores(call: Call) -> Any:
    # NumPy has no bfloat16 and is slow with float16.
    return call.scores if call.layer.compute_dtype == "float64" else ops.cast(call.scores, "float32")


def attention_axes(layer: Any) -> Sequence[int]:
    return getattr(layer, "_attention_axes", None) or (1,)  # Keras' grouped layer knows one only
