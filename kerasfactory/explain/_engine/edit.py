"""Running somebody's model with the scores of its attention layers changed, and the gradients of what comes out.

Nothing of the model is changed, as with `observe`.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from keras import ops, tree

from kerasfactory import _backend
from kerasfactory._warnings import warn
from kerasfactory.explain._engine.adapters import adapter_of
from kerasfactory.explain._engine.attention import (
    choose_attention,
    differentiate_rightly,
    edit_scores,
    find_attention,
    float_scores,
    unchanged,
)
from kerasfactory.explain._engine.foreign import Sight, watching_operations
from kerasfactory.explain._engine.observe import (
    Found,
    compile_options,
    kept,
    observe,
    relative_difference,
    rounding_of,
    state_of,
)

_EAGERLY = {"run_eagerly": True, "jit_compile": False}


class Editor(NamedTuple):
    """Runs a model with its scores edited, one batch `(inputs,)` at a time.

    An `edit(name, scores, given)` gets the scores (batch, head, query, key) of a call by the name that `capture` gives
    it, and returns others of the same shape. `given` holds arrays, in dictionaries or lists: what changes from run to
    run belongs there, for an `edit` is compiled and kept, once for each function. Where a query may attend to no key,
    what `edit` gets is what the layer really uses: 0, or the same weight for all keys (see `edit_scores`).

    `gradient` returns the gradient of a scalar by `given`, in the form of that, the outputs, and the scores before the
    edit, by name. A `scalar` is a function and its settings, `(function, *settings)`, for
    `function(model, outputs, more, *settings)`: what is compiled is kept for each of them, while the model lives.
    `more` holds arrays, as `given` does, of at least one axis. `once` says that there is but one batch.
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
    first = next(observe(model, iter([batch]), layers, None, 0, float_scores))
    _check_not_adapted(first.found)
    shapes = {name: tuple(scores.shape[1:]) for name, scores in first.measured.items()}
    called = tuple((name, call.name, call.candidate or call.number, call.path) for name, call in first.found.items())
    of_calls = {call.name: call.layer for call in first.found.values()}
    chosen = choose_attention(model, layers)
    steps = kept(model, (editor, repr(layers), called), chosen, lambda: _steps(model, first.found, of_calls))
    _check_made_of_scores(model, batch, steps.run)

    def predict(batch, edit, given):
        return steps.predicting(edit)(state_of(model), (batch, _tensors(given)))

    def gradient(batch, edit, given, scalar, more=(), once=False):
        data = (batch, _tensors(given), _tensors(more))
        return steps.differentiating(edit, scalar, once)(state_of(model), data)

    return Editor(first.found, shapes, predict, gradient)


class _Steps(NamedTuple):
    """Functions that do not keep their model, so that they can be kept with it."""

    run: Callable  # from (state, data, edit, given) to the outputs and the scores before the edit, by name
    predicting: Callable[[Callable], Callable]  # from an edit to a function of (state, data)
    differentiating: Callable[[Callable, tuple, bool], Callable]


def _steps(model: Any, found: dict[str, Found], layers: dict[str, Any]) -> _Steps:
    names = {(call.name, call.candidate or call.number): name for name, call in found.items()}
    is_foreign = {call.name: bool(call.path) for call in found.values()}
    references = {name: weakref.ref(layer) for name, layer in layers.items()}
    model_reference, options, compiled = weakref.ref(model), compile_options(model), dict[Any, Callable]()

    def run(state, data, edit, given):
        model, before = model_reference(), dict[str, Any]()
        of_keras, foreign = ({n: of() for n, of in references.items() if is_foreign[n] is it} for it in (False, True))

        def edited(name, scores, weights):
            before[name] = scores
            return edit(name, weights, given)

        with unchanged(model):
            for layer in find_attention(model).values():
                if all(layer is not edited for edited in of_keras.values()):
                    differentiate_rightly(layer)
            for layer_name, layer in of_keras.items():
                _edit_calls(layer, layer_name, names, edited)
            of_sight = _edit_of_sights(of_keras, foreign, names, edited)
            watching = watching_operations(model, weakref.WeakKeyDictionary(), edit=of_sight)
            with watching if foreign else contextlib.nullcontext():
                outputs, _ = _backend.predict_step(model, state, data)
        return outputs, before

    def predicting(edit):
        def step(state, data):
            batch, given = data
            return run(state, batch, edit, given)[0]

        if edit not in compiled:
            compiled[edit] = _backend.compiled(step, **options)
        return compiled[edit]

    def differentiating(edit, scalar, once):
        function, *settings = scalar
        key = (edit, once, *(part if isinstance(part, Hashable) else id(part) for part in scalar))

        def step(state, data):
            batch, given, more = data

            def of(given):
                outputs, scores = run(state, batch, edit, given)
                return function(model_reference(), outputs, more, *settings), (outputs, scores)

            gradients, (outputs, scores) = _backend.gradient(of, given)
            return gradients, outputs, scores

        if key not in compiled:
            compiled[key] = _or_eagerly(step, _backend.compiled(step, **options, runs_once=once))
        return compiled[key]

    return _Steps(run, predicting, differentiating)


def _or_eagerly(step: Callable, compiled: Callable) -> Callable:
    """The compiled step, until it fails where the step itself does not."""
    use = compiled

    def run(state, data):
        nonlocal use
        try:
            return use(state, data)
        except Exception as error:
            # Not everybody's loss can be compiled. And where something is wrong, this is where all shapes are known.
            eager = _backend.compiled(step, **_EAGERLY)
            result = eager(state, data)
            use = eager
            warn(
                "The gradients could not be compiled, and are computed eagerly, which takes longer. The cause was "
                f"{type(error).__name__}: {str(error).strip()[:500]}"
            )
            return result

    return run


def _check_not_adapted(found: dict[str, Found]) -> None:
    adapted = [name for name, call in found.items() if adapter_of(call.layer) is not None]
    if adapted:
        raise ValueError(
            f"The scores of {', '.join(adapted)} are those that a registered adapter returns. They cannot be changed, "
            "because they cannot be put back into the layer. Choose other layers with `layers=[...]`, or other methods."
        )


def _check_made_of_scores(model: Any, batch: tuple, run: Callable) -> None:
    def unedited(state, data):
        with unchanged(model):
            return _backend.predict_step(model, state, data)[0]

    def with_its_own_scores(state, data):
        return run(state, data, lambda name, scores, given: scores, {})[0]

    # Compiling would take longer than these two runs.
    expected, outputs = (
        _backend.compiled(step, **_EAGERLY)(state_of(model), batch) for step in (unedited, with_its_own_scores)
    )
    difference = relative_difference(expected, outputs)
    if not difference <= rounding_of(model):
        raise ValueError(
            "The model's outputs do not follow from its attention scores: computed again from the same scores, they "
            f"differ by {difference:.1e} of the largest. So it cannot be computed what other scores would do. Leave "
            "out layers that compute something else, with `layers=[...]`; `explain.recomposition_error` shows which "
            "they are. Random outputs and NaN in `x` have the same effect. So does padding in half precision after "
            "`tokens + attended`, which drops the mask: write `keras.layers.Add()([tokens, attended])`."
        )


def _edit_calls(layer: Any, layer_name: str, names: dict[tuple[str, int], str], edited: Callable) -> None:
    """Has a layer of Keras attend with edited scores in each of its calls."""
    numbers = itertools.count(1)
    edit_scores(layer, lambda scores, weights: edited(names[layer_name, next(numbers)], scores, weights))


def _edit_of_sights(
    of_keras: dict[str, Any], foreign: dict[str, Any], names: dict[tuple[str, int], str], edited: Callable
) -> Callable[[Sight], Any]:
    """From what is seen as the model runs to its edited scores, or to `None` if it is not to be edited."""
    known = {id(layer) for layer in of_keras.values()}
    owners = {id(layer): name for name, layer in foreign.items()}

    def of_sight(sight):
        layer_name = owners.get(id(sight.path[-1]))
        if layer_name is None or any(id(layer) in known for layer in sight.path):
            return None
        name = names.get((layer_name, sight.candidate))
        if name is None:  # its scores cannot be had outside a loop, or are those of something else
            return None
        scores = sight.scores()
        return edited(name, scores, scores)

    return of_sight


def _tensors(given: Any) -> Any:
    return tree.map_structure(ops.convert_to_tensor, given)
