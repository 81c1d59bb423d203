"""Running somebody's model with the scores of its attention layers changed, and the gradients of what comes out.

Nothing of the model is changed, as with `observe`.
"""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops, tree

from kerasfactory import _backend
from kerasfactory.explain._capture import _float_scores, _rounding
from kerasfactory.explain._observe import (
    Found,
    _difference,
    _explicit_scores,
    _state,
    _unchanged,
    find_attention,
    observe,
)


class Editor(NamedTuple):
    """Runs a model with its scores edited, one batch `(inputs,)` at a time.

    An `edit(name, scores, given)` gets the scores (batch, head, query, key) of a call by the name that `capture` gives
    it, and returns others of the same shape. `given` holds arrays, in dictionaries or lists: what changes from run to
    run belongs there, for an `edit` may be compiled, once for each function.

    `gradient` returns the gradient of `scalar(outputs, more)` by `given`, in the form of that, the outputs, and the
    scores before the edit, by name. It may be compiled too, once for each pair of functions: `more` holds arrays, as
    `given` does, of at least one axis. `once` says that there is but one batch.
    """

    found: dict[str, Found]  # the calls, by the names that `capture` gives them, in the order of `layers`
    shapes: dict[str, tuple[int, ...]]  # of their scores: (head, query, key)
    predict: Callable[[tuple, Callable, Any], Any]  # (batch, edit, given): the outputs
    gradient: Callable[..., tuple[Any, Any, dict[str, Any]]]  # (batch, edit, given, scalar, more=(), once=False)


def editor(model: Any, batch: tuple, layers: Any) -> Editor:
    """An `Editor` for the attention layers of a model, all or those named by `layers`.

    The batch `(inputs,)` tells which calls there are. Raises what `observe` raises, and `ValueError` if the outputs are
    not made of the scores, so that changing these would show nothing.
    """
    first = next(observe(model, iter([batch]), layers, None, 0, _float_scores))
    shapes = {name: tuple(scores.shape[1:]) for name, scores in first.measured.items()}
    names = {(found.name, found.number): name for name, found in first.found.items()}
    attentions = {name: layer for name, layer in find_attention(model).items() if (name, 1) in names}

    def run(state, data, edit, given):
        before: dict[str, Any] = {}
        with _unchanged(model):
            for name, layer in attentions.items():
                _edit(layer, name, names, lambda name, scores: edit(name, scores, given), before)
            outputs, _ = _backend.predict_step(model, state, data)
        return outputs, before

    with _unchanged(model):
        how = {"run_eagerly": model.run_eagerly, "jit_compile": model.jit_compile}
    eagerly = {"run_eagerly": True, "jit_compile": False}
    steps: dict[Callable, Callable] = {}
    slopes: dict[tuple[Callable, Callable], Callable] = {}

    def predict(batch, edit, given):
        if edit not in steps:
            steps[edit] = _backend.compiled(lambda state, both: run(state, both[0], edit, both[1])[0], **how)
        return steps[edit](_state(model), (batch, _tensors(given)))

    def gradient(batch, edit, given, scalar, more=(), once=False):
        def step(state, data):
            batch, given, more = data

            def of(given):
                outputs, scores = run(state, batch, edit, given)
                return scalar(outputs, more), (outputs, scores)

            gradients, (outputs, scores) = _backend.gradient(of, given)
            return gradients, outputs, scores

        data = (batch, _tensors(given), _tensors(more))
        if (edit, scalar) not in slopes:
            slopes[edit, scalar] = _backend.compiled(step, **how, runs_once=once)
        with contextlib.suppress(Exception):
            return slopes[edit, scalar](_state(model), data)
        # Not everybody's loss can be compiled. And where something is wrong, this is where all shapes are known.
        slopes[edit, scalar] = _backend.compiled(step, **eagerly)
        return slopes[edit, scalar](_state(model), data)

    def unedited(state, data):
        with _unchanged(model):
            return _backend.predict_step(model, state, data)[0]

    def as_it_is(state, data):
        return run(state, data, lambda name, scores, given: scores, {})[0]

    # Compiling would take longer than these two runs.
    expected, outputs = (_backend.compiled(step, **eagerly)(_state(model), batch) for step in (unedited, as_it_is))
    difference = _difference(expected, outputs)
    if not difference <= _rounding(model):
        raise ValueError(
            "The model's outputs are not made of its attention scores: with the same scores, formed and multiplied "
            f"with the values, they differ by {difference:.1e} of the largest. There is no telling what other scores "
            "would do. Leave out layers that compute something else, with `layers=[...]`; "
            "`explain.recomposition_error` tells which they are. Random outputs, and NaN in `x`, do this too."
        )
    return Editor(first.found, shapes, predict, gradient)


def _edit(layer: Any, name: str, names: dict[tuple[str, int], str], edit: Callable, before: dict[str, Any]) -> None:
    """Has the layer attend with edited scores. To be used within `_unchanged`, which takes it away."""
    compute_attention, numbers = layer._compute_attention, itertools.count(1)

    def edited(*args, **kwargs):
        full_name = names[name, next(numbers)]
        before[full_name] = _explicit_scores(layer, compute_attention, args, kwargs)
        scores = edit(full_name, before[full_name])
        value = args[2] if len(args) > 2 else kwargs["value"]
        return ops.einsum(layer._combine_equation, ops.cast(scores, value.dtype), value), scores

    layer.__dict__["_compute_attention"] = edited  # Keras and PyTorch would take note of an attribute that is set


def _tensors(given: Any) -> Any:
    return tree.map_structure(ops.convert_to_tensor, given)
