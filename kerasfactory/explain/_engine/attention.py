"""How attention layers work inside.

This is the one place that knows, and the one place in `explain` that touches private names of Keras.
"""

import contextlib
import difflib
import inspect
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from kerasfactory import _backend
from kerasfactory.explain._engine.adapters import adapter_of
from kerasfactory.explain._engine.undo import stand_in, twin, undone
from kerasfactory.layers import InterpretableMultiHeadAttention
from kerasfactory.layers._attention import Attention, Mask, keeping_aside, mask_in_parts

# The layers that are read: these and their subclasses. Each has the methods and attributes that `PRIVATE_NAMES` lists.
READ_LAYERS = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)

# The private names of Keras that `explain` relies on, by their owner. What every Keras must have is read through
# `private`; what only some have (gates, windows), with a default. A test looks for each of them in the newest Keras.
_HAS_WINDOWS = "sliding_window" in inspect.signature(keras.layers.MultiHeadAttention).parameters  # not in Keras 3.14
PRIVATE_NAMES = {
    "keras.layers.Layer": ("_flatten_layers", "_layers", "_clear_losses", "_setattr_hook"),
    "keras.layers.MultiHeadAttention": (
        "_compute_attention",
        "_compute_attention_mask",
        "_compute_causal_mask",
        "_masked_softmax",
        "_combine_equation",
        "_output_dense",
        "_gate_dense",
        "_use_gate",
        "_attention_axes",
        "_flash_attention",
        *(["_compute_sliding_window_mask", "_sliding_window"] if _HAS_WINDOWS else []),
    ),
    "keras.layers.GroupQueryAttention": (
        "_compute_attention",
        "_compute_attention_mask",
        "_compute_causal_mask",
        "_masked_softmax",
        "_combine_equation",
        "_output_dense",
        "_gate_dense",
        "_return_attention_scores",
        "_flash_attention",
        *(["_compute_sliding_window_mask"] if _HAS_WINDOWS else []),
    ),
}


def private(owner: Any, name: str) -> Any:
    """A private attribute of a Keras object, or an error that says which one this Keras does not have."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise _backend.missing(f"keras.{type(owner).__name__}.{name}", "Reading attention") from None


def all_layers(model: Any) -> list[Any]:
    """The model, and all layers in it, at any depth."""
    return private(model, "_flatten_layers")()


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Takes back what a forward pass of this thread writes into layers; ours do not touch the values of variables.

    What other threads write meanwhile, as a training does, stays.
    """
    layers = all_layers(model)
    with undone(layers, "_setattr_hook"), keeping_aside():
        for layer in layers:
            # A call begins by clearing the losses of the last one. In a pass of ours none are kept.
            stand_in(layer, _clear_losses=lambda: None)
        for module, methods in _backend.evaluation(model, layers):
            stand_in(module, **methods)
        yield


class Call(NamedTuple):
    """One call of an attention layer, seen from inside. The tensors belong to the forward pass."""

    layer: Any  # the Keras attention layer
    scores: Any  # (batch, head, query, key), before dropout; with several attention axes, several queries and keys
    value: Any  # projected: (batch, key, head, size of a head)
    masks: str  # the masks in force, by the names of Keras' arguments
    query: Any  # of the layer, before its projection: (batch, query, features)
    output: Any  # of the layer: (batch, query, features)
    attended: Any = None  # what `attend` returned for the call, if it computed it; then there are no scores
    order: int = 0  # grows from call to call, of whichever layer
    path: str = ""  # of an attention in other layers than `READ_LAYERS`: the names that lead to it
    # Of such a one: from the scores to what they make of the values, and what the layer made of them.
    products: Callable[[Any], tuple[Any, Any]] | None = None
    has_sink: bool = False  # weights went to what is no key, and are left out
    read_from: str = "_compute_attention"  # the function that gave the scores, or whose arguments give them again
    values: Callable[[], Any] | None = None  # in place of `value`: (batch, key, head, size of a head)
    candidate: int = 0  # its number among all that was taken for attention in its layer, from 1


class Heads(NamedTuple):
    """What an attention layer is about to attend with. The tensors are (batch, position, head, size of a head)."""

    layer: Any
    query: Any
    key: Any
    value: Any
    mask: Mask | None
    own: Callable[[Any, Any, Any, Any], Any]  # the layer's own output, for a query, key and value, and a mask of 4 axes


def _paths(model: Any) -> list[tuple[Any, list[str]]]:
    """The layers in `model`, down to Keras' attention layers, each with the names that lead to it."""
    paths: list[tuple[Any, list[str]]] = []
    visited = set()

    def walk(layer, path):
        for sublayer in private(layer, "_layers"):
            if id(sublayer) in visited:  # a shared layer, or one that knows its parent
                continue
            visited.add(id(sublayer))
            # Users know the layer that wraps Keras' one, and its name.
            is_wrapped = isinstance(layer, InterpretableMultiHeadAttention) and sublayer is layer.mha
            sub_path = path if is_wrapped else [*path, sublayer.name]
            paths.append((sublayer, sub_path))
            if not isinstance(sublayer, READ_LAYERS):
                walk(sublayer, sub_path)

    walk(model, [])
    return paths


def _named_attention(model: Any) -> dict[str, tuple[Any, str]]:
    """From the name of each attention layer to the layer and its path."""
    adapted = adapted_layers(all_layers(model))
    layers_and_paths = [
        (layer, path) for layer, path in _paths(model) if isinstance(layer, READ_LAYERS) and id(layer) not in adapted
    ]
    last_names = [path[-1] for _, path in layers_and_paths]
    full_names = ["/".join(path) for _, path in layers_and_paths]
    named = {}
    for number, (layer, path) in enumerate(layers_and_paths):
        name = path[-1] if last_names.count(path[-1]) == 1 else full_names[number]
        if full_names.count(name) > 1:
            name = f"{name}/{full_names[:number].count(name)}"
        named[name] = (layer, full_names[number])
    return named


def adapted_layers(layers: Iterable[Any]) -> set[int]:
    """The ids of those layers that an adapter is registered for, and of all layers in them."""
    return {id(inner) for layer in layers if adapter_of(layer) is not None for inner in all_layers(layer)}


def find_attention(model: Any) -> dict[str, Any]:
    """The Keras attention layers in `model`, by name; by path (`block_1/attention`) where a name is not unique."""
    return {name: layer for name, (layer, _) in _named_attention(model).items()}


def reads_tokens(model: Any, x: np.ndarray) -> bool:
    """Whether the columns of `x`, (sample, column), are token ids: integers that one embedding reads everywhere."""
    if x.ndim != 2:
        return False
    embeddings = [layer for layer in all_layers(model) if isinstance(layer, keras.layers.Embedding)]
    is_whole = x.dtype.kind in "iu" or bool((x == np.floor(x)).all())
    return is_whole and 0 < len(embeddings) < x.shape[1] and x.max() < max(one.input_dim for one in embeddings)


STAYS_INSIDE = "its scores stay inside a loop, a `vmap` or a function compiled by itself"

# Parts of the names of classes, and what such layers do in place of a softmax over keys.
_OTHER_ATTENTION = {
    "deformable": "it samples points, and has no keys",
    "deltanet": "linear attention forms no scores",
    "timemix": "linear attention forms no scores",
    "retention": "linear attention forms no scores",
    "mamba": "a state space forms no scores",
    "attention": "no softmax over keys was seen in it: it may attend in a linear way, or by a kernel of its own, for "
    "which there is `explain.register_attention`",
}


def unseen_attention(called: Mapping[Any, str | None], seen: Sequence[Any]) -> dict[str, str]:
    """The names of layers that were called, attend by their class's name, and in which none was seen; and why.

    Others come with a reason why attention in them cannot be read.
    """
    reasons = {}
    of_keras = (layer for layer in seen if isinstance(layer, READ_LAYERS))
    read = adapted_layers(seen) | {id(inner) for layer in of_keras for inner in all_layers(layer)}
    for layer, unread in list(called.items()):
        kind = type(layer).__name__
        if id(layer) in read:
            continue
        if unread is not None:
            reasons[layer.name] = unread
            continue
        reason = next((reason for part, reason in _OTHER_ATTENTION.items() if part in kind.lower()), None)
        inside = {id(inner) for inner in all_layers(layer)}
        if reason and not any(id(one) in inside for one in seen):
            reasons[layer.name] = f"it is a `{kind}`: {reason}"
    return dict(sorted(reasons.items()))


def choose_attention(model: Any, layers: Any) -> dict[str, Any]:
    """The attention layers of Keras that `layers` names, or all; other layers may be named, too."""
    named = _named_attention(model)
    if layers is None:
        return {name: layer for name, (layer, _) in named.items()}
    wanted = [layers] if isinstance(layers, str) else list(layers)
    if not wanted:
        raise ValueError("`layers` is empty: name at least one layer, or leave it out for all of them.")
    others = ["/".join(path) for _, path in _paths(model)]
    for entry in wanted:
        if not any(is_called(entry, name, path) for name, (_, path) in named.items()) and not any(
            is_called(entry, path, path) for path in others
        ):
            names = [*named, *others, *(path.rpartition("/")[2] for path in others)]
            near = difflib.get_close_matches(str(entry), names, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"The model has no layer {entry!r}. {hint}Its attention layers of Keras are: "
                f"{', '.join(named) or 'none'}. Received: layers={layers!r}"
            )
    return {
        name: layer for name, (layer, path) in named.items() if any(is_called(entry, name, path) for entry in wanted)
    }


def is_called(entry: Any, name: str, path: str) -> bool:
    """Whether an entry of `layers` means a layer: by name, by path, or by the end of a path."""
    return name == entry or f"/{path}".endswith(f"/{entry}")


def attention_axes(layer: Any) -> Sequence[int]:
    """The axes of the query over which the layer attends."""
    # Keras' grouped layer knows one only, and so does what is seen of other layers.
    return (isinstance(layer, READ_LAYERS) and getattr(layer, "_attention_axes", None)) or (1,)


ROW_SUM = 0.05  # how far the sum of a row of scores may lie from 1: rounding in half precision


def float_scores(call: Call) -> Any:
    """The scores of a call in a dtype that NumPy knows and is not slow with."""
    return call.scores if call.layer.compute_dtype == "float64" else ops.cast(call.scores, "float32")


def combined(layer: Any, scores: Any, value: Any) -> Any:
    """What the heads make of their values: (batch, query, head, size of a head)."""
    return ops.einsum(private(layer, "_combine_equation"), ops.cast(scores, value.dtype), value)


def gate_of(layer: Any, query: Any) -> Any:
    """By what the layer multiplies what its heads make, (batch, query, head, size of a head); `None` without a gate."""
    uses_gate = getattr(layer, "_use_gate", False) or getattr(layer, "use_gate", False)
    return private(layer, "_gate_dense")(query) if uses_gate else None


def output_projection(layer: Any) -> Any:
    """The layer's own `EinsumDense` from heads to output."""
    return private(layer, "_output_dense")


def is_keras_method(*methods: Callable) -> bool:
    """Whether these methods of an attention layer are Keras' own, or this package's, which do the same."""
    own = ("keras.src.layers.attention.", "kerasfactory.layers.")
    return all((method.__module__ or "").startswith(own) for method in methods)  # code run by `exec` may have no module


def explicit_scores(layer: Any, compute_attention: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The scores of a call of `compute_attention`, also where the layer would not form them."""
    if type(layer) is Attention and len(args[0].shape) == 4:
        return layer.scores(args[0], args[1], args[3])
    # Keras' layers are asked for scores by argument or, the grouped one, by attribute.
    compute_attention = _with_attributes(
        layer, compute_attention, _return_attention_scores=True, _flash_attention=False
    )
    given = inspect.signature(compute_attention).bind(*args, **kwargs)
    if "return_attention_scores" in inspect.signature(compute_attention).parameters:
        given.arguments["return_attention_scores"] = True
    return compute_attention(*given.args, **given.kwargs)[1]


def edit_scores(layer: Any, edit: Callable[[Any, Any], Any]) -> None:
    """Has the layer attend with the scores that `edit` makes of its own. To be used where it is put back: `unchanged`.

    `edit(scores, weights)` gets the scores as `capture` reports them, and the weights that the layer really uses. The
    two differ where a query may attend to no key: scores are 0 there, but Keras' fused attention gives such a query
    the mean of all values, as uniform weights do.
    """
    compute_attention = private(layer, "_compute_attention")

    def edited(*args, **kwargs):
        scores, value = explicit_scores(layer, compute_attention, args, kwargs), _argument(args, kwargs, 2, "value")
        weights = scores
        if _is_masked_and_fused(layer, compute_attention, args, kwargs):
            uniform = ops.ones_like(scores) / ops.cast(ops.shape(scores)[-1], scores.dtype)
            weights = ops.where(ops.any(scores != 0, axis=-1, keepdims=True), scores, uniform)
        return combined(layer, edit(scores, weights), value), scores

    stand_in(layer, _compute_attention=edited)


def differentiate_rightly(layer: Any) -> None:
    """Has the layer form its scores where the gradient of a fused kernel may be wrong. To be used as `edit_scores`.

    For queries that may attend to no key, that of PyTorch 2.13 on CPUs is too large by a factor, the number of keys.
    """
    compute_attention = private(layer, "_compute_attention")
    if not is_keras_method(compute_attention):
        return
    edit_scores(layer, lambda scores, weights: weights)
    edited = private(layer, "_compute_attention")

    def masked_only(*args, **kwargs):
        masked = _argument(args, kwargs, 3, "attention_mask") is not None
        return (edited if masked else compute_attention)(*args, **kwargs)

    stand_in(layer, _compute_attention=masked_only)


def _is_masked_and_fused(layer: Any, compute_attention: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether Keras' layer has a mask and forms no scores. This package's own gives 0 where there is no key."""
    if _argument(args, kwargs, 3, "attention_mask") is None or isinstance(layer, Attention):
        return False
    return compute_attention(*args, **kwargs)[1] is None


def _argument(args: tuple, kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _with_attributes(layer: Any, method: Callable, **values: Any) -> Callable:
    """A method of the layer that sees other values of attributes that the layer has. Other threads see the layer's."""
    if isinstance(method, types.MethodType) and method.__self__ is layer:
        return types.MethodType(method.__func__, twin(layer, **values))

    def of_the_layer(*args, **kwargs):  # somebody has put a function in the place of the method
        before = {name: layer.__dict__[name] for name in values if name in layer.__dict__}
        layer.__dict__.update({name: values[name] for name in before})
        try:
            return method(*args, **kwargs)
        finally:
            layer.__dict__.update(before)

    return of_the_layer


ORDER = itertools.count()  # of calls


class Watch:
    """Stands in front of the methods of an attention layer and notes its calls, as a `Call` each.

    It has to be made where the layer is put back afterward: see `unchanged`. Only calls in this thread are watched; the
    model may be running in another one, which is to notice nothing.

    Args:
        layer: The Keras attention layer.
        calls: The list for the calls; `None` if they are not wanted.
        attend: From `Heads`, and whether calls are wanted, to the layer's output (`None`: the layer is to compute it
            itself) and to what `Call.attended` is to be. It stands in for attention that is Keras' own only.
        stop: Called after each call that was noted. With it, nothing but the scores is noted.
    """

    def __init__(
        self, layer: Any, calls: list[Call] | None, attend: Callable | None = None, stop: Callable | None = None
    ):
        self.layer, self.calls, self.attend, self.stop = layer, calls, attend, stop
        self.call = layer.call
        self.compute_attention = private(layer, "_compute_attention")
        self.compute_mask = private(layer, "_compute_attention_mask")
        self.masks: list[str] = []  # in force in the present call, by the names of Keras' arguments
        # What a subclass computes in its own way is left to it.
        self.attends_as_keras = is_keras_method(self.compute_attention, private(layer, "_masked_softmax"))
        windows = [private(layer, "_compute_sliding_window_mask")] if window_of(layer) else []
        mask_methods = [self.call, self.compute_mask, private(layer, "_compute_causal_mask"), *windows]
        self.masks_in_parts = attend is not None and self.attends_as_keras and is_keras_method(*mask_methods)
        stand_in(
            layer,
            call=self._watched_call,
            _compute_attention=self._watched_attention,
            _compute_attention_mask=self._watched_mask,
        )

    def _watched_call(self, *args, **kwargs):
        self.masks.clear()
        before = len(self.calls or ())
        result = self.call(*args, **kwargs)
        if self.calls is not None and len(self.calls) == before + 1 and self.calls[before].attended is None:
            query = args[0] if args else kwargs["query"]
            output = result[0] if isinstance(result, tuple) else result
            self.calls[before] = self.calls[before]._replace(query=query, output=output)
        return result

    def _watched_mask(self, *args, **kwargs):
        given = [name for name, value in kwargs.items() if value is not None and value is not False]
        self.masks.extend(name for name in given if name.endswith("mask"))
        mask = _mask_in_parts(self.layer, self.compute_mask, args, kwargs) if self.masks_in_parts else None
        return self.compute_mask(*args, **kwargs) if mask is None else mask

    def _watched_attention(self, *args, **kwargs):
        if kwargs.get("use_causal_mask"):
            self.masks.append("use_causal_mask")
        if window_of(self.layer):
            self.masks.append("sliding_window")
        if self.attend is not None and self.attends_as_keras:
            heads = _heads(self.layer, self.compute_attention, self.compute_mask, args, kwargs)
            output, attended = (None, None) if heads is None else self.attend(heads, self.calls is not None)
            if attended is not None:
                self._note(None, None, attended)
            if output is not None:
                return output, None
            args = tuple(_whole(self.layer, argument, *args[:2]) for argument in args)
            if attended is not None:
                return self.compute_attention(*args, **kwargs)
        if self.stop is not None and type(self.layer) is Attention and len(args[0].shape) == 4:
            # The scores alone, before anything is computed that would be thrown away.
            self._note(explicit_scores(self.layer, self.compute_attention, args, kwargs), None)
            return self.compute_attention(*args, **kwargs)
        output, scores = self.compute_attention(*args, **kwargs)
        if self.calls is not None:
            explicit = scores
            if scores is None:  # as from a fused kernel; the model goes on with the output of that
                explicit = explicit_scores(self.layer, self.compute_attention, args, kwargs)
            self._note(explicit, args[2] if len(args) > 2 else kwargs["value"])
        return output, scores

    def _note(self, scores, value, attended=None):
        if self.calls is not None:
            masks = ", ".join(self.masks) or "none"
            self.calls.append(Call(self.layer, scores, value, masks, None, None, attended, next(ORDER)))
            if self.stop is not None:
                self.stop()


def window_of(layer: Any) -> int | None:
    """The layer's `sliding_window`; Keras 3.14 has none."""
    return getattr(layer, "_sliding_window", None) or getattr(layer, "sliding_window", None)


def has_values(*tensors: Any) -> bool:
    return all(_backend.concrete(tensor) is not None and _backend.is_usable(tensor) for tensor in tensors)


def _mask_in_parts(layer: Any, compute_mask: Callable, args: tuple, kwargs: dict[str, Any]) -> Mask | None:
    """What Keras would multiply out to a matrix; `None` if there is no mask, or it is not to be taken apart."""
    given = inspect.signature(compute_mask).bind(*args, **kwargs).arguments
    query, value = given.pop("query"), given.pop("value")
    explicit, causal = given.get("attention_mask"), bool(given.pop("use_causal_mask", False))
    tensors = [mask for mask in given.values() if mask is not None]
    if len(query.shape) > 3 or not has_values(*filter(ops.is_tensor, [query, value, *tensors])):
        return None
    of_keras = (compute_mask.__module__ or "").startswith("keras.")
    if of_keras and explicit is not None and len(explicit.shape) == 4 and len(tensors) > 1:
        return None  # Keras sets samples against heads then
    return mask_in_parts(**given, use_causal_mask=causal, window=window_of(layer))


def _heads(layer: Any, compute_attention: Callable, compute_mask: Callable, args: tuple, kwargs: dict) -> Heads | None:
    """`None` if the layer has to compute its attention by itself, as when it is asked for scores."""
    given = inspect.signature(compute_attention).bind(*args, **kwargs).arguments
    query, key, value = (given[name] for name in ("query", "key", "value"))
    mask, training = given.get("attention_mask"), given.get("training")
    asked = given.get("return_attention_scores") or layer.__dict__.get("_return_attention_scores")
    dropout = training and layer.dropout > 0
    if asked or dropout or not has_values(query, key, value):
        return None
    if mask is None and given.get("use_causal_mask"):
        mask = Mask((), causal=True, window=None)
    elif mask is not None and not isinstance(mask, Mask):
        mask = mask_in_parts(attention_mask=mask)

    def own(query, key, value, allowed):
        # The mask is whole: the layer has nothing to add to it. And not every flash attention takes one.
        others = {"_flash_attention": False, "_sliding_window": None, "sliding_window": None}
        if allowed is not None and is_keras_method(compute_mask):
            # The layer brings it into its own form. It reads lengths off the second axis, where they are here, too.
            whole_mask = _with_attributes(layer, compute_mask, **others)
            allowed = whole_mask(query[..., 0], value[..., 0], attention_mask=allowed)
        attention = _with_attributes(layer, compute_attention, **others)
        return attention(query, key, value, attention_mask=allowed, training=training)[0]

    return Heads(layer, query, key, value, mask, own)


def _whole(layer: Any, argument: Any, query: Any, key: Any) -> Any:
    """An argument as the layer's own attention takes it: only this package's takes a mask in parts."""
    if not isinstance(argument, Mask) or isinstance(layer, Attention):
        return argument
    return argument.at(ops.arange(query.shape[1], dtype="int32"), key.shape[1])
