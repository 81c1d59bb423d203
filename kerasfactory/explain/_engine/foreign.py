"""Attention that is not one of Keras' multi-head layers, seen by what it computes, whatever layer computes it.

A softmax is attention if its result is contracted, along the axis that it was taken over, with something that is not
the same for all samples. Keras' fused `dot_product_attention` says itself that it is; its scores are computed again.
"""

import contextlib
import functools
import itertools
import operator
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import keras
from keras import ops, tree

from kerasfactory import _backend
from kerasfactory.explain._engine.adapters import adapter_of
from kerasfactory.explain._engine.attention import (
    ORDER,
    READ_LAYERS,
    STAYS_INSIDE,
    Call,
    Heads,
    all_layers,
    has_values,
    is_called,
)
from kerasfactory.explain._engine.undo import stand_in
from kerasfactory.explain._engine.weights import Softmax, Weights, one_axis
from kerasfactory.layers._attention import mask_in_parts

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
    # From other scores to what stands in for the real product, and (batch, any other axes, key, head, size of a head);
    # not of scores that an adapter made.
    edited: Callable[[Any], Any] | None
    values: Callable[[], Any] | None
    masks: str
    order: int  # this and what follows: as those of a `Call`
    read_from: str
    has_sink: bool = False
    attended: Any = None
    candidate: int = 0


@contextlib.contextmanager
def watching_operations(
    model: Any,
    called: WeakKeyDictionary[Any, str | None],
    attend: Callable | None = None,
    edit: Callable[[Sight], Any] | None = None,
) -> Iterator[list[Sight]]:
    """Fills a list with the attention that this thread computes by functions of Keras and of the backend.

    For the time of this, functions of ours stand in front of those. Other threads pass through them. To be used within
    `unchanged`, which takes away what stands in front of layers that an adapter is registered for.

    Args:
        model: Functions that the files of its layers have imported by name are seen as well.
        called: Gets the layers in whose call anything is multiplied, each with the reason why attention in it cannot be
            read, if there is one.
        attend: From the layers that are being called, and the `Heads` that the fused function is to attend with,
            to its output (`None`: the function is to compute it) and to what `Call.attended` is to be.
        edit: Called with each attention that is seen; returns other scores for it, or `None`.
    """
    sights: list[Sight] = []
    modules = {type(layer).__module__ for layer in all_layers(model)}
    with _in_front_of_operations(_Notes(model, sights, called, attend, edit), modules), noting_in(sights):
        for layer in all_layers(model):
            if adapter_of(layer) is not None:
                stand_in(layer, call=_adapted(layer, sights))
        yield sights


class _Notes:
    """What is noted of each kind of `Operation`: each method gets a call of the function, and what `read` returns."""

    def __init__(self, model: Any, sights: list[Sight], called: Any, attend: Callable | None, edit: Callable | None):
        self.model, self.sights, self.called, self.attend, self.edit = model, sights, called, attend, edit
        self.weights = Weights()
        self.doubtful: dict[int, Sight] = {}  # by origin: of what only looks as if it were made of a softmax
        self.candidates: Counter[int] = Counter()

    def _path(self):
        return _backend.layers_being_called() or [self.model]  # JAX calls the model itself past Keras' scopes

    def softmax(self, run, x, axis):
        result = run()
        self.weights.softmax(self._path(), x, axis, result)
        return result

    def moved(self, run, x, order):
        result = run()
        if self.weights:
            for part in result if isinstance(result, list | tuple) else [result]:
                self.weights.moved(self._path(), x, order, part)
        return result

    def logarithm(self, run, x):
        result = run()
        if self.weights:
            self.weights.logarithm(x, result)
        return result

    def contraction(self, run, subscripts, operands, again):
        result, letters = run(), _letters(subscripts, operands)
        if letters is not None and len(operands) == 2:
            result = self._met(operands, letters[:2], letters[2], again, result)
            self.weights.contracted(operands, letters[:2], letters[2], result)
        return result

    def product(self, run, x1, x2):
        result = run()
        self.weights.product((x1, x2), result)
        self._call(self._path())
        return result

    def average(self, run, x, axis, again):
        result, path, factors = run(), self._path(), self.weights.factors(x) if self.weights else ()
        axis = one_axis(axis)
        if any(map(self.weights.is_of_weights, factors)):  # an entropy
            return result
        if isinstance(axis, int) and any(self.weights.of(factor, path) is not None for factor in factors):
            operands, letters, out, again = _multiplied(factors, axis, again)
            for before, after in zip(factors, operands, strict=True):
                self.weights.moved(path, before, None, after)
            keeps_axis = len(result.shape) == len(x.shape)
            result = self._met(operands, letters, out, again, result, is_sum=True, keeps_axis=keeps_axis)
        return result

    def total(self, run, x, axis, again):
        result = self.average(run, x, axis, again)
        self.weights.sum(x, axis, result)
        return result

    def chosen(self, run, x):
        result = run()
        self.weights.chosen(x, result[0])
        return result

    def shifted(self, run, x1, x2):
        result = run()
        self.weights.shifted(x1, result)
        return result

    def quotient(self, run, x1, x2):
        result = run()
        axis = self.weights.axis_of_quotient(x1, x2)
        if axis is not None:
            self.weights.softmax(self._path(), x1, axis, result)
        return result

    def _met(self, operands, letters, out, again, result, is_sum=False, keeps_axis=False):
        path = self._path()
        self._call(path)
        if not self.weights:
            return result
        for number in sorted((0, 1), key=lambda number: not self.weights.is_result(operands[number])):
            operand, of_operand, values = operands[number], letters[number], letters[1 - number]
            found = self.weights.of(operand, path)
            if found is None:
                continue
            if found.axis is None:
                if set(of_operand) - set(out):
                    self.called[path[-1]] = "its softmax runs over several axes at once"
            elif not _is_attention(of_operand, of_operand[found.axis], values, out):
                self._in_a_loop(path, operand, operands[1 - number], of_operand[found.axis] in set(values) - set(out))
            elif not self.weights.is_gate(found, _long_letters(operand, of_operand), values, operands[1 - number]):
                adds_axis = not is_sum or self._adds_axis(found, operands, letters, number)
                if adds_axis is False or (adds_axis is None and keeps_axis):
                    continue  # it is the sum of the weights that a mask leaves
                factors = operand, of_operand, operands[1 - number], values
                sight = _contracted(path, found, *factors, out, _replacing(again, operands, number), result)
                is_sure = bool(adds_axis) and self.weights.is_result(operand)
                return self._noted(self._instead(sight, found, operand, is_sure), result)
        return result

    def _instead(self, sight, found, operand, is_sure):
        """The sight, in place of an earlier one that only looked as if it were of the same softmax."""
        if not is_sure:
            self.doubtful[found.origin] = sight
        elif found.origin in self.doubtful:
            doubtful = self.doubtful.pop(found.origin)
            self.sights[:] = [one for one in self.sights if one.scores is not doubtful.scores]
        self.weights.met(found, operand, is_sure)
        return sight

    def _adds_axis(self, found, operands, letters, number):
        """Whether values have an axis that their weights lack; `None` if both have the same, as weights of channels."""
        of_weights, of_others = (_long_letters(operands[n], letters[n]) for n in (number, 1 - number))
        if of_others - of_weights or len(of_weights) > found.long_axes:
            return True
        return None if of_others == of_weights and len(of_weights) > 2 else False

    def _in_a_loop(self, path, operand, of_values, is_contracted):
        """Notes weights without an axis of samples, where nothing can be had outside: samples are taken one by one."""
        is_inside = not (_backend.is_usable(operand) or _backend.is_usable(of_values))
        if is_inside and is_contracted and self.weights.is_result(operand):
            self.called[path[-1]] = STAYS_INSIDE

    def _call(self, path):
        for layer in reversed(path):
            if layer in self.called:
                break
            self.called[layer] = None

    def _noted(self, sight, result):
        owner = id(sight.path[-1])
        self.candidates[owner] += 1
        sight = sight._replace(candidate=self.candidates[owner])
        self.sights.append(sight)
        scores = None if self.edit is None else self.edit(sight)
        return result if scores is None else ops.cast(sight.edited(scores), result.dtype)

    def attention(self, run, as_keras, given=None, there=None, back=None):
        path = self._path()
        if given is None:
            return self.unread(run, as_keras)
        adapted = any(adapter_of(layer) for layer in path)  # and needs the scores
        heads = None if self.attend is None or adapted else _heads(path, as_keras, given)
        made, attended = (None, None) if self.attend is None or heads is None else self.attend(path, heads)
        output = run() if made is None else back(made)
        made = there(output) if made is None else made
        others = self._noted(_fused(path, given, made)._replace(attended=attended), made)
        return output if others is made else back(others)

    def unread(self, run, reason):
        self.called[self._path()[-1]] = reason
        return run()

    def switch(self, run, position):
        return position


@contextlib.contextmanager
def _in_front_of_operations(notes: _Notes, modules: set[str]) -> Iterator[None]:
    """Has what this thread gives to functions noted, by their kind: see `Operation`.

    In these modules they are found under any name: `from jax.nn import softmax`.
    """
    busy = False

    def in_front_of(original, note, read):
        @functools.wraps(original)
        def either(*args, **kwargs):
            nonlocal busy
            if busy or getattr(_INNERMOST, "sights", None) is not notes.sights:
                return original(*args, **kwargs)
            busy = True  # what a function is made of is not looked at
            try:
                return note(lambda: original(*args, **kwargs), *read(original, *args, **kwargs))
            finally:
                busy = False

        return either

    others = [sys.modules[name] for name in modules - {"builtins"} if name in sys.modules and name[:6] != "keras."]
    before = []
    try:
        for kind, home, its_name, read in _backend.all_operations():
            original = getattr(home, its_name)
            watched = in_front_of(original, getattr(notes, kind), read)
            imported = [(place, name) for place in others for name, value in vars(place).items() if value is original]
            for place, name in [(home, its_name), *imported]:
                before.append((place, name, vars(place).get(name)))  # a class may have it of another
                setattr(place, name, watched)
        yield
    finally:
        for place, name, original in reversed(before):
            if original is None:
                delattr(place, name)
            else:
                setattr(place, name, original)


def _long_letters(operand: Any, letters: str) -> set[str]:
    return {letter for letter, size in zip(letters, operand.shape, strict=True) if size != 1}


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
    ranks = [
        len(getattr(x, "shape", ())) - len(part.replace("...", "")) for x, part in zip(operands, parts, strict=True)
    ]
    if min(ranks) < 0:
        return None
    most = max([rank for rank, part in zip(ranks, parts, strict=True) if "..." in part], default=0)
    filled = [part.replace("...", "".join(free[most - rank : most])) for rank, part in zip(ranks, parts, strict=True)]
    return [*filled, out.replace("...", "".join(free[:most]))]


def _multiplied(operands: tuple, axis: int, again: Callable) -> tuple[list[Any], list[str], str, Callable]:
    """A product that is summed along an axis, as a contraction: operands, their letters, those of the result.

    Axes along which a factor is repeated are taken away from it.
    """
    shapes = [tuple(getattr(operand, "shape", ())) for operand in operands]
    rank = max(map(len, shapes))
    letters, axis = _LETTERS[:rank], axis % rank
    aligned = [(*[1] * (rank - len(shape)), *shape) for shape in shapes]
    short = [
        [place for place in range(rank) if one[place] == 1 != other[place]] for one, other in (aligned, aligned[::-1])
    ]

    def whole(*others):
        return again(*(ops.expand_dims(x, places) if places else x for x, places in zip(others, short, strict=True)))

    squeezed = []
    for operand, shape, places in zip(operands, shapes, short, strict=True):
        x = ops.expand_dims(operand, list(range(rank - len(shape)))) if rank > len(shape) else operand
        squeezed.append(ops.squeeze(x, places) if places else x)
    kept = ["".join(letter for place, letter in enumerate(letters) if place not in places) for places in short]
    return squeezed, kept, letters.replace(letters[axis], ""), whole


def _replacing(again: Callable, operands: tuple, number: int) -> Callable[[Any], Any]:
    def replaced(scores):
        cast = ops.cast(scores, operands[number].dtype)
        return again(*(cast if place == number else operand for place, operand in enumerate(operands)))

    return replaced


def _contracted(
    path: list[Any],
    found: Softmax,
    operand: Any,
    scores: str,
    of_values: Any,
    value: str,
    out: str,
    again: Callable,
    result: Any,
) -> Sight:
    order, counts = _order(scores, scores[found.axis or 0], value, out)
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
    if others or is_of_keras or not has_values(query, key, value):
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


def _adapted(layer: Any, sights: list[Sight]) -> Callable:
    """The layer's `call`, which puts what the registered adapter makes in the place of what is seen in it."""
    call, adapter = layer.call, adapter_of(layer)

    def adapted(*args, **kwargs):
        start, path = len(sights), _backend.layers_being_called() or [layer]
        output = call(*args, **kwargs)
        made = functools.partial(_made_by, adapter, layer, output, args, kwargs, path)
        seen: list[Sight | None] = [sight for sight in sights[start:] if _backend.is_usable(sight.tensor)]
        sights[start:] = map(made, seen or [None])
        return output

    return adapted


def _made_by(adapter: Any, layer: Any, output: Any, args: tuple, kwargs: dict, path: list[Any], seen: Any) -> Sight:
    @functools.cache
    def result():
        try:
            of_adapter = adapter(layer, None if seen is None else seen.scores(), *args, **kwargs)
        except Exception as error:
            error.add_note(
                f"Raised by the adapter that is registered for `{type(layer).__name__}`, in layer {layer.name!r}."
            )
            raise
        scores, remade = of_adapter if isinstance(of_adapter, tuple) and len(of_adapter) == 2 else (of_adapter, None)
        if len(getattr(scores, "shape", ())) < 4:
            what = f"shape {tuple(scores.shape)}" if hasattr(scores, "shape") else f"type {type(scores).__name__}"
            raise ValueError(
                f"The adapter that is registered for `{type(layer).__name__}` must return scores with the axes (batch, "
                "head, query, key), others between batch and head, or a pair of these and the layer's output. For "
                f"layer {layer.name!r} it returned: {what}"
            )
        return ops.convert_to_tensor(scores), remade

    def products(scores):
        remade = result()[1]
        if remade is not None:
            return remade, tree.flatten(output)[0]
        if seen is None:
            raise ValueError(
                f"There is nothing to compare in layer {layer.name!r}: no attention was seen in it, and the adapter "
                f"for `{type(layer).__name__}` returns scores alone. Let it return a pair: the scores, and the output "
                "that the layer computes from them. Or leave the layer out with `layers=[...]`."
            )
        return seen.products(seen.scores())

    if seen is None:
        tensor = tree.flatten(output)[0]
        return Sight(path, tensor, lambda: result()[0], products, None, None, "not known", next(ORDER), "adapter")
    return seen._replace(
        path=path, scores=lambda: result()[0], products=products, edited=None, values=None, read_from="adapter"
    )


def calls_of(model: Any, sights: Sequence[Sight], calls: dict[str, list[Call]], layers: Any) -> dict[str, list[Call]]:
    """The calls that `layers` means, by the name of their layer; `calls` are those that were watched, which come first.

    A layer that Keras' own calls are known of is left out: what it computes was seen as well.
    """
    known = {id(call.layer) for of_layer in calls.values() for call in of_layer if is_usable(call)}
    rest = [sight for sight in sights if not any(id(layer) in known for layer in sight.path)]
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
        candidate=sight.candidate,
    )
