"""Attention that is not one of Keras' multi-head layers, seen by what it computes, whatever layer computes it.

A softmax is attention if its result is contracted, along the axis that it was taken over, with something that is not
the same for all samples. Keras' fused `dot_product_attention` says itself that it is; its scores are computed again.
"""

import contextlib
import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import keras
from keras import ops

from kerasfactory import _backend
from kerasfactory.explain._engine.attention import ORDER, READ_LAYERS, Call, Heads, has_values, is_called
from kerasfactory.layers._attention import mask_in_parts

_REMEMBERED = 16  # results of a softmax that may still be contracted
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

_INNERMOST = threading.local()  # `sights`: the list that this thread fills at present


@contextlib.contextmanager
def noting_in(sights: "list[Sight] | None") -> Iterator[None]:
    """Has this thread fill the list, and no other meanwhile: a model may be read in the middle of another."""
    outer = getattr(_INNERMOST, "sights", None)
    _INNERMOST.sights = sights
    try:
        yield
    finally:
        _INNERMOST.sights = outer


class Sight(NamedTuple):
    """An attention that was seen. The functions belong to the forward pass, and compute when they are called."""

    path: list[Any]  # the layers whose call it is in, the outermost first
    tensor: Any  # one of those that it computes with
    scores: Callable[[], Any]  # (batch, any other axes, head, query, key)
    products: Callable[[Any], tuple[Any, Any]]  # from the scores to what they make of the values, and the real product
    edited: Callable[[Any], Any]  # from other scores to what stands in for the real product
    values: Callable[[], Any]  # (batch, any other axes, key, head, size of a head)
    masks: str
    order: int  # this and what follows: as those of a `Call`
    read_from: str
    has_sink: bool = False
    attended: Any = None


class _Softmax(NamedTuple):
    path: list[Any]
    result: Any
    axis: int


@contextlib.contextmanager
def watching_operations(
    called: WeakSet[Any], attend: Callable | None = None, edit: Callable[[Sight], Any] | None = None
) -> Iterator[list[Sight]]:
    """Fills a list with the attention that this thread computes by Keras' functions.

    For the time of this, functions of ours stand in front of those of Keras. Other threads pass through them.

    Args:
        called: Gets the layers in whose call anything is multiplied.
        attend: From the layers that are being called, and the `Heads` that Keras' fused function is to attend with,
            to its output (`None`: the function is to compute it) and to what `Call.attended` is to be.
        edit: Called with each attention that is seen; returns other scores for it, or `None`.
    """
    sights: list[Sight] = []
    softmaxes: list[_Softmax] = []
    busy = False

    def in_front_of(note):
        def made_of(original):
            def either(*args, **kwargs):
                nonlocal busy
                if busy or getattr(_INNERMOST, "sights", None) is not sights:
                    return original(*args, **kwargs)
                busy = True  # what a function is made of is not looked at
                try:
                    return note(original, lambda: original(*args, **kwargs), *args, **kwargs)
                finally:
                    busy = False

            return either

        return made_of

    def noted(sight, result):
        sights.append(sight)
        scores = None if edit is None else edit(sight)
        return result if scores is None else ops.cast(sight.edited(scores), result.dtype)

    def softmax(original, run, x, axis=-1):
        result = run()
        rank = len(x.shape)
        if isinstance(axis, int) and rank > 1 and axis % rank > 0:
            softmaxes.append(_Softmax(_backend.layers_being_called(), result, axis % rank))
            del softmaxes[:-_REMEMBERED]
        return result

    def contraction(run, operands, letters, out, again):
        result, path = run(), _backend.layers_being_called()
        called.update(path)
        for number, (operand, of_operand) in enumerate(zip(operands, letters, strict=True)):
            found = _softmax_of(operand, softmaxes, path)
            if found is not None and _is_attention(of_operand, of_operand[found.axis], letters[1 - number], out):
                softmaxes[:] = [softmax for softmax in softmaxes if softmax is not found]
                values = operands[1 - number], letters[1 - number]
                replaced = _replacing(again, operands, number)
                return noted(_contracted(path, found, operand, of_operand, *values, out, replaced, result), result)
        return result

    def einsum(original, run, subscripts, *operands, **kwargs):
        letters = _letters(subscripts, operands)
        if len(operands) != 2 or letters is None:
            return run()
        return contraction(run, operands, letters[:2], letters[2], lambda *of: original(subscripts, *of, **kwargs))

    def matmul(original, run, x1, x2):
        ranks = [len(getattr(x, "shape", ())) for x in (x1, x2)]
        if min(ranks) < 2:
            return run()
        ahead = _LETTERS[: max(ranks) - 2]
        left, right = (ahead[max(ranks) - rank :] for rank in ranks)
        return contraction(run, (x1, x2), (f"{left}XY", f"{right}YZ"), f"{ahead}XZ", original)

    def dot_product_attention(original, run, query, key, value, **given):
        path, given = _backend.layers_being_called(), {"query": query, "key": key, "value": value, **given}
        heads = None if attend is None else _heads(path, original, given)
        output, attended = (None, None) if attend is None or heads is None else attend(path, heads)
        if output is None:
            output = run()
        return noted(_fused(path, given, output)._replace(attended=attended), output)

    notes = {"softmax": softmax, "einsum": einsum, "matmul": matmul, "dot_product_attention": dot_product_attention}
    with _in_place({name: in_front_of(note) for name, note in notes.items()}), noting_in(sights):
        yield sights


@contextlib.contextmanager
def _in_place(in_front: dict[str, Callable]) -> Iterator[None]:
    """Puts in the place of each function of Keras what is made of it, and them back afterward."""
    places = [(place, name, in_front[operation]) for operation, place, name in _backend.operations()]
    places += [(of_tensors, "__matmul__", in_front["matmul"]) for of_tensors in _backend.tensor_classes()]
    before = [(place, name, getattr(place, name)) for place, name, _ in places]
    try:
        for (place, name, made_of), (_, _, original) in zip(places, before, strict=True):
            setattr(place, name, made_of(original))
        yield
    finally:
        for place, name, original in before:
            setattr(place, name, original)


def _softmax_of(operand: Any, softmaxes: list[_Softmax], path: list[Any]) -> _Softmax | None:
    """The softmax that an operand is the result of, or that something was made of entry by entry in the same layer."""
    shape = tuple(getattr(operand, "shape", ()))
    for found in reversed(softmaxes):
        if found.result is operand:
            return found
    for found in reversed(softmaxes):
        before = list(found.result.shape)
        with_sink = [*before[:-1], before[-1] and before[-1] - 1]
        if path and any(path[-1] is layer for layer in found.path) and shape in (tuple(before), tuple(with_sink)):
            return found
    return None


def _is_attention(scores: str, key: str, value: str, out: str) -> bool:
    """Whether the key is contracted with something of each sample."""
    return key in value and key not in out and scores[0] != key and scores[0] in value and scores[0] in out


def _letters(subscripts: Any, operands: tuple) -> list[str] | None:
    """The letters of the axes of two operands and of the result, `...` written out; `None` if they are not known."""
    if not isinstance(subscripts, str) or "->" not in subscripts:
        return None
    before, out = subscripts.replace(" ", "").split("->")
    parts = before.split(",")
    if len(parts) != len(operands):
        return None
    free = [letter for letter in _LETTERS if letter not in subscripts]
    ranks = [len(x.shape) - len(part.replace("...", "")) for x, part in zip(operands, parts, strict=True)]
    most = max([rank for rank, part in zip(ranks, parts, strict=True) if "..." in part], default=0)
    filled = [part.replace("...", "".join(free[most - rank : most])) for rank, part in zip(ranks, parts, strict=True)]
    return [*filled, out.replace("...", "".join(free[:most]))]


def _replacing(again: Callable, operands: tuple, number: int) -> Callable[[Any], Any]:
    def replaced(scores):
        cast = ops.cast(scores, operands[number].dtype)
        return again(*(cast if place == number else operand for place, operand in enumerate(operands)))

    return replaced


def _contracted(
    path: list[Any],
    found: _Softmax,
    operand: Any,
    scores: str,
    of_values: Any,
    value: str,
    out: str,
    again: Callable,
    result: Any,
) -> Sight:
    order, counts = _order(scores, scores[found.axis], value, out)
    there, back = [scores.index(letter) for letter in order], [order.index(letter) for letter in scores]

    def canonical():
        moved = ops.transpose(operand, there)
        sizes = iter(ops.shape(moved))
        folded = [functools.reduce(operator.mul, itertools.islice(sizes, count), 1) for count in counts]
        return ops.reshape(moved, folded)

    def edited(canonical_scores):
        moved = ops.reshape(canonical_scores, ops.shape(ops.transpose(operand, there)))
        return again(ops.transpose(moved, back))

    def values():
        sizes = dict(zip(scores, ops.shape(operand), strict=True))
        *others, heads, _, _ = [list(itertools.islice(letters, count)) for letters in [iter(order)] for count in counts]
        ahead = [*itertools.chain(*others), order[-1]]
        rest = [letter for letter in value if letter not in scores]
        moved = ops.transpose(of_values, [value.index(letter) for letter in [*ahead, *heads, *rest] if letter in value])
        for place, letter in enumerate([*ahead, *heads]):
            if letter not in value:  # it is the same along this axis
                moved = ops.expand_dims(moved, place)
        of_rest = ops.shape(moved)[len(ahead) + len(heads) :]
        moved = ops.broadcast_to(moved, [*(sizes[letter] for letter in [*ahead, *heads]), *of_rest])
        count = functools.reduce(operator.mul, (sizes[letter] for letter in heads), 1)
        return ops.reshape(moved, [*(sizes[letter] for letter in ahead), count, -1])

    has_sink = operand.shape[-1] != found.result.shape[-1]
    return Sight(
        path,
        operand,
        canonical,
        lambda scores: (edited(scores), result),
        edited,
        values,
        "not known",
        next(ORDER),
        "softmax",
        has_sink,
    )


def _order(scores: str, key: str, value: str, out: str) -> tuple[str, list[int]]:
    """The letters in the order batch, other axes, heads, query, key, and how many letters make each of the new axes.

    What the values have no axis for is the query, or heads that share their values. If there are several, the query is
    the last. Of several axes that the values have as well, it is not known which are heads.
    """
    batch, between = scores[0], [letter for letter in scores[1:] if letter != key]
    without_value = [letter for letter in between if letter in out and letter not in value]
    query, others = without_value[-1:], [letter for letter in between if letter not in without_value]
    if len(others) > 1:
        heads, unknown = without_value[:-1], others
    else:
        heads, unknown = [letter for letter in between if letter not in query], []
    order = "".join([batch, *unknown, *heads, *query, key])
    return order, [1, *[1] * len(unknown), len(heads), len(query), 1]


def _fused(path: list[Any], given: dict[str, Any], output: Any) -> Sight:
    """What `keras.ops.dot_product_attention` computes, with its scores. The arguments are as it describes them."""
    query, key, value = (ops.cast(given[name], "float32") for name in ("query", "key", "value"))
    bias, mask, soft_cap = (given.get(name) for name in ("bias", "mask", "attn_logits_soft_cap"))
    groups = query.shape[2] // key.shape[2]

    def scores():
        scale = given.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        keys = ops.repeat(key, groups, axis=2) if groups > 1 else key
        logits = ops.einsum("bthd,bshd->bhts", query, keys) * scale
        if soft_cap is not None:
            logits = soft_cap * ops.tanh(logits / soft_cap)
        if bias is not None:
            logits = logits + ops.cast(bias, "float32")
        allowed = None if mask is None else ops.cast(mask, "bool")
        if given.get("is_causal"):
            causal = ops.arange(query.shape[1])[:, None] >= ops.arange(key.shape[1])
            allowed = causal if allowed is None else ops.logical_and(allowed, causal)
        if allowed is None:
            return ops.softmax(logits)
        weights = ops.softmax(ops.where(allowed, logits, -1e30))
        return ops.where(ops.any(ops.broadcast_to(allowed, ops.shape(logits)), axis=-1, keepdims=True), weights, 0.0)

    def values():
        return ops.repeat(value, groups, axis=2) if groups > 1 else value

    def sees_a_key(scores):
        return ops.transpose(ops.any(scores != 0, axis=-1, keepdims=True), (0, 2, 1, 3))

    def products(scores):
        made, real = ops.einsum("bhts,bshd->bthd", scores, values()), ops.cast(output, "float32")
        return made, ops.where(sees_a_key(scores), real, 0.0)

    def edited(others):
        made = products(others)[0]
        # What the function returned for queries that may attend to no key is made of no scores.
        return made if mask is None else ops.where(sees_a_key(scores()), made, ops.cast(output, "float32"))

    names = {"mask": mask is not None, "bias": bias is not None, "is_causal": bool(given.get("is_causal"))}
    masks = ", ".join(name for name, is_given in names.items() if is_given) or "none"
    return Sight(path, query, scores, products, edited, values, masks, next(ORDER), "dot_product_attention")


def _heads(path: list[Any], original: Callable, given: dict[str, Any]) -> Heads | None:
    """What the fused function attends with; `None` if the scores have to be formed, or a layer of Keras calls it."""
    plain = {"query", "key", "value", "mask", "scale", "is_causal", "flash_attention"}
    others = [name for name, argument in given.items() if name not in plain and argument is not None]
    query, key, value = (ops.convert_to_tensor(given[name]) for name in ("query", "key", "value"))
    mask, scale = given.get("mask"), given.get("scale")
    is_of_keras = any(isinstance(layer, READ_LAYERS) for layer in path)
    if others or not path or is_of_keras or not has_values(query, key, value):
        return None
    dtype = keras.backend.result_type(query.dtype, key.dtype, value.dtype)
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = (ops.repeat(tensor, groups, axis=2) for tensor in (key, value))
    if scale is not None:
        query = query * ops.cast(scale * query.shape[-1] ** 0.5, query.dtype)
    if mask is not None:
        mask = ops.reshape(mask, (*[1] * (4 - len(mask.shape)), *mask.shape))
    in_parts = mask_in_parts(attention_mask=mask, use_causal_mask=bool(given.get("is_causal")))

    def own(query, key, value, allowed):
        return original(query, key, value, mask=allowed, flash_attention=False)

    query, key, value = (ops.cast(tensor, dtype) for tensor in (query, key, value))
    return Heads(path[-1], query, key, value, in_parts, own)


def calls_of(model: Any, sights: Sequence[Sight], calls: dict[str, list[Call]], layers: Any) -> dict[str, list[Call]]:
    """The calls that `layers` means, by the name of their layer; `calls` are those that were watched, which come first.

    A layer that Keras' own calls are known of is left out: what it computes was seen as well.
    """
    known = {id(call.layer) for of_layer in calls.values() for call in of_layer if is_usable(call)}
    rest = [sight for sight in sights if sight.path and not any(id(layer) in known for layer in sight.path)]
    paths = {id(sight.path[-1]): path_of(sight.path, model) for sight in rest}
    last = [path.rpartition("/")[2] for path in [*paths.values(), *calls]]
    found = {name: of_layer for name, of_layer in calls.items() if any(map(is_usable, of_layer))}
    for owner, path in paths.items():
        short = path.rpartition("/")[2]
        name = short if last.count(short) == 1 else path
        if is_meant(layers, path):
            found[name] = [_call_of(sight, path) for sight in rest if id(sight.path[-1]) == owner]
    return {name: [] for name in calls} | found


def path_of(called: list[Any], model: Any) -> str:
    """The names of the layers that are being called, the outermost first."""
    layers = [layer.name for layer in called if layer is not model]
    return "/".join(layers or [model.name])


def is_meant(layers: Any, path: str) -> bool:
    """Whether `layers`, an argument of the user, means the layer that a path leads to."""
    wanted = [layers] if isinstance(layers, str) else layers
    return wanted is None or any(is_called(entry, path, path) for entry in wanted)


def is_usable(call: Call) -> bool:
    """Whether the scores of a call can be had here."""
    return call.attended is not None or (call.scores is not None and _backend.is_usable(call.scores))


def _call_of(sight: Sight, path: str) -> Call:
    is_wanted = sight.attended is None and _backend.is_usable(sight.tensor)
    return Call(
        sight.path[-1],
        scores=sight.scores() if is_wanted else None,
        value=None,
        masks=sight.masks,
        query=None,
        output=None,
        attended=sight.attended,
        order=sight.order,
        path=path,
        products=sight.products if is_wanted else None,
        has_sink=sight.has_sink,
        read_from=sight.read_from,
        values=sight.values if is_wanted else None,
    )
