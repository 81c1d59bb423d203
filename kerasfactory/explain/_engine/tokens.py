"""The tokens that a model attends to, where they enter it, and the model run with them scaled.

Nothing of the model is changed, as with `observe`.
"""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from kerasfactory import _backend
from kerasfactory.explain._engine.attention import (
    ORDER,
    Call,
    Watch,
    all_layers,
    choose_attention,
    differentiate_rightly,
    find_attention,
    unchanged,
)
from kerasfactory.explain._engine.data import size_of
from kerasfactory.explain._engine.foreign import calls_of, is_usable, watching_operations
from kerasfactory.explain._engine.observe import compile_options, kept, state_of
from kerasfactory.explain._engine.undo import stand_in
from kerasfactory.layers import FeatureTokenizer

_TOKEN_LAYERS = (keras.layers.Embedding, FeatureTokenizer)
_EAGERLY = {"run_eagerly": True, "jit_compile": False}
_STEPS = (32, 256)  # Gauss-Legendre nodes; the second for samples in which the first miss the change of the output
_CLOSE = 0.01  # of the sum of absolute values
_ROWS = 32  # tokens to try at once
_REACHES = 1e-4  # of the largest value: a smaller change is rounding


class _Place(NamedTuple):
    """Where tokens (batch, token, channel) enter a model: in a call of a layer, or, without a layer, in an input."""

    layer: Any
    number: int


class TokenScaler(NamedTuple):
    """Runs a model with its tokens scaled, one batch `(inputs,)` at a time. A `scale` is (sample, key)."""

    outputs: Callable[[tuple, Any], Any]  # (batch, scale): the outputs, as floats
    gradient: Callable[[tuple, Any, Any], Any]  # (batch, scale, weights): of sum(weights * outputs), by the scale


class Integral(NamedTuple):
    """Integrated gradients of a batch."""

    values: np.ndarray  # (sample, key)
    change: np.ndarray  # (sample,): of the output, from the baseline to the tokens; what the values ought to sum to


def token_scaler(model: Any, batch: tuple, layers: Any, keys: int) -> TokenScaler:
    """A `TokenScaler` for the tokens that become the `keys` keys of the first of the attention `layers`.

    Raises a `ValueError` if there are no such tokens.
    """
    places = _tokens_of_keys(model, batch, layers, keys)
    numbers = _numbers_of_layers(model)
    keys_of_tokens = {(numbers.get(place.layer), place.number): of_tokens for place, of_tokens in places.items()}
    known = tuple((*place, *of_tokens) for place, of_tokens in keys_of_tokens.items())
    outputs, gradient = kept(model, (token_scaler, known), (), lambda: _scaling_steps(model, keys_of_tokens))
    return TokenScaler(
        lambda batch, scale: outputs(state_of(model), (batch, ops.convert_to_tensor(scale))),
        lambda batch, scale, weights: gradient(state_of(model), (batch, ops.convert_to_tensor(scale), weights)),
    )


def _numbers_of_layers(model: Any) -> dict[Any, int]:
    return {layer: number for number, layer in enumerate(all_layers(model))}


def _scaling_steps(model: Any, keys_of_tokens: dict[tuple, np.ndarray]) -> tuple[Callable, Callable]:
    """Functions of `(state, data)` that do not keep the model, so that they can be kept with it.

    The places of tokens have the number of their layer in place of the layer itself.
    """
    model_reference = weakref.ref(model)

    def run(state, data, scale):
        model = model_reference()
        numbers = _numbers_of_layers(model)
        outside = ops.ones_like(scale[:, :1])  # for tokens that become no key
        scales = ops.concatenate([scale, outside], axis=1)

        def scaled(place, tokens):
            of_tokens = keys_of_tokens.get((numbers.get(place.layer), place.number))
            if of_tokens is None:
                return tokens
            return tokens * ops.cast(ops.take(scales, of_tokens, axis=1)[:, :, None], tokens.dtype)

        with _changing(model, data, scaled) as data:
            for layer in find_attention(model).values():
                differentiate_rightly(layer)
            outputs, _ = _backend.predict_step(model, state, data)
        return tree.map_structure(as_float, outputs)

    def outputs_step(state, data):
        return run(state, *data)

    def gradient_step(state, data):
        batch, scale, weights = data

        def weighted(scale):
            outputs = tree.flatten(run(state, batch, scale[0]))
            return sum(ops.sum(weight * output) for weight, output in zip(weights, outputs, strict=True)), ()

        return _backend.gradient(weighted, [scale])[0][0]

    options = compile_options(model)
    return _backend.compiled(outputs_step, **options), _backend.compiled(gradient_step, **options)


def integral(scaler: TokenScaler, batch: tuple, in_view: np.ndarray, chosen: Callable[[Any], Any]) -> Integral:
    """The gradients of `chosen(outputs)` integrated from no tokens to the batch's own, for the keys `in_view`.

    `chosen(outputs)` is a sum of outputs. It chooses them at the batch's own tokens: a predicted class is that of the
    batch, all along the path. By the scale of a token, the gradient is the sum over its channels of token x gradient.
    """
    outputs = scaler.outputs(batch, np.ones(in_view.shape, "float32"))
    flat = tree.flatten(outputs)

    def of_outputs(flat):
        return chosen(tree.pack_sequence_as(outputs, flat)), ()

    weights, _ = _backend.gradient(of_outputs, flat)  # 1 for what is chosen, else 0

    def values(outputs):
        products = [_backend.as_numpy(weight * output) for weight, output in zip(weights, outputs, strict=True)]
        return sum(product.reshape(len(product), -1).sum(axis=1, dtype="float64") for product in products)

    baseline = scaler.outputs(batch, (~in_view).astype("float32"))
    change = values(flat) - values(tree.flatten(baseline))
    result = np.zeros(in_view.shape)
    for number in _STEPS:
        coarse = missed(Integral(result, change)) > _CLOSE * np.abs(result).sum(axis=1)
        if number != _STEPS[0] and not coarse.any():
            break
        nodes, shares = np.polynomial.legendre.leggauss(number)
        finer = np.zeros(in_view.shape)
        for node, share in zip((nodes + 1) / 2, shares / 2, strict=True):
            scale = np.where(in_view, node, 1).astype("float32")
            finer += share * _backend.as_numpy(scaler.gradient(batch, scale, weights)).astype("float64")
        finer = np.where(in_view, finer, 0)
        result = np.where(coarse[:, None] | (number == _STEPS[0]), finer, result)
    return Integral(result, change)


def missed(integral: Integral) -> np.ndarray:
    """By how much the values of each sample miss the change of its output."""
    return np.abs(integral.values.sum(axis=1) - integral.change)


def _tokens_of_keys(model: Any, batch: tuple, layers: Any, keys: int) -> dict[_Place, np.ndarray]:
    """The places of the tokens, each with the number of the key that each token becomes (`keys` for none)."""
    samples = tree.map_structure(lambda array: ops.repeat(array[:1], 2, axis=0), batch)
    lengths = _lengths(model, samples, layers)
    if len(lengths) == 1 and list(lengths.values()) == [keys]:
        return {place: np.arange(keys) for place in lengths}
    of_layers = {place: length for place, length in lengths.items() if place.layer is not None}
    of_inputs = {place: length for place, length in lengths.items() if place.layer is None}
    for places in (of_layers, of_inputs):  # an input that is looked up in an `Embedding` is no token itself
        reached = {place: _reached(model, samples, layers, place, length) for place, length in places.items()}
        found = {place: indices for place, indices in reached.items() if indices is not None}
        if found:
            return found
    raise ValueError(
        "Integrated gradients are taken by the tokens that become the keys: the output of a `FeatureTokenizer` or a "
        "`keras.layers.Embedding`, or an input of floats, (sample, position, channel). The model has none of which "
        f"each becomes one of the {keys} keys. Explain the part behind its tokens: with "
        "`tokens = model.get_layer(NAME).output`, this is `keras.Model(tokens, model.outputs)`, and "
        "`keras.Model(model.inputs, tokens).predict(x)` is its `x`."
    )


def _lengths(model: Any, samples: tuple, layers: Any) -> dict[_Place, int]:
    """The places at which tokens may enter before the first attention, each with the number of tokens."""
    lengths: dict[_Place, tuple[int, int]] = {}

    def noted(place, tokens):
        # What has no axis of samples is the same for all, as the embeddings of positions are.
        if len(tokens.shape) == 3 and tokens.shape[0] == size_of(samples):
            lengths[place] = next(ORDER), tokens.shape[1]
        return tokens

    first = _first_call(model, samples, noted, layers)
    return {place: length for place, (order, length) in lengths.items() if order < first.order}


def _reached(model: Any, samples: tuple, layers: Any, place: _Place, length: int) -> np.ndarray | None:
    """The key that each token becomes; `None` if one becomes several, several become one, or none becomes any."""
    rng = np.random.default_rng(0)
    reaches: list[np.ndarray] = []
    for start in range(0, length, _ROWS):
        rows = min(_ROWS, length - start)
        data = tree.map_structure(lambda array, rows=rows: ops.repeat(array[:1], rows + 1, axis=0), samples)

        def alone(here, tokens, start=start, rows=rows):
            """One token in each sample, and none in the last."""
            if here != place:
                return tokens
            only = np.zeros(tokens.shape, "float32")
            only[np.arange(rows), start + np.arange(rows)] = rng.normal(size=(rows, tokens.shape[2]))
            return ops.cast(ops.convert_to_tensor(only), tokens.dtype)

        call = _first_call(model, data, alone, layers)
        value = _backend.as_numpy(ops.cast(call.value if call.values is None else call.values(), "float32"))
        value = np.abs(value.reshape(*value.shape[:2], -1))
        change = np.abs(value[:-1] - value[-1]).max(axis=-1)
        reaches.append(change > _REACHES * value.max())
    reach = np.concatenate(reaches)  # (token, key)
    if not reach.any() or reach.sum(axis=0).max() > 1 or reach.sum(axis=1).max() > 1:
        return None
    return np.where(reach.any(axis=1), reach.argmax(axis=1), reach.shape[1])


def _first_call(model: Any, data: tuple, change: Callable[[_Place, Any], Any], layers: Any) -> Call:
    """The first call of the attention `layers` as the model runs eagerly with other tokens, as `_changing` has it."""
    chosen = choose_attention(model, layers)

    def step(state, data):
        calls: dict[str, list[Call]] = {name: [] for name in chosen}
        with _changing(model, data, change) as data:
            for name, layer in chosen.items():
                Watch(layer, calls[name])
            with watching_operations(model, weakref.WeakKeyDictionary()) as sights:
                _backend.predict_step(model, state, data)
            seen = itertools.chain(*calls_of(model, sights, calls, layers).values())
            return min(filter(is_usable, seen), key=lambda call: call.order)

    return _backend.compiled(step, **_EAGERLY)(state_of(model), data)


@contextlib.contextmanager
def _changing(model: Any, data: tuple, change: Callable[[_Place, Any], Any]) -> Iterator[tuple]:
    """The data to run the model with, so that `change(place, tokens)` stands for the tokens at each place."""
    leaves = [
        change(_Place(None, number), leaf) if "float" in keras.backend.standardize_dtype(leaf.dtype) else leaf
        for number, leaf in enumerate(tree.flatten(data))
    ]
    with unchanged(model):
        for layer in all_layers(model):
            if isinstance(layer, _TOKEN_LAYERS):
                _change_output(layer, change)
        yield tree.pack_sequence_as(data, leaves)


def _change_output(layer: Any, change: Callable[[_Place, Any], Any]) -> None:
    numbers = itertools.count(1)

    def changed(call, *args, **kwargs):
        return change(_Place(layer, next(numbers)), call(*args, **kwargs))

    for name in {"call", "quantized_call"} & set(dir(layer)):
        stand_in(layer, **{name: functools.partial(changed, getattr(layer, name))})


def as_float(tensor: Any) -> Any:
    return ops.cast(tensor, "float64" if keras.backend.standardize_dtype(tensor.dtype) == "float64" else "float32")
