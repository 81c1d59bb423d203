"""Running somebody's model over data, as `model.predict` does, and watching its attention layers at work.

Nothing of the model is changed: it runs on values of its variables that are passed in and handed back, and what a
forward pass writes into layers is taken out again.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from kerasfactory import _backend
from kerasfactory._warnings import warn
from kerasfactory.explain._engine.adapters import changes
from kerasfactory.explain._engine.attention import (
    STAYS_INSIDE,
    Call,
    Heads,
    Watch,
    all_layers,
    choose_attention,
    find_attention,
    is_called,
    is_keras_method,
    unchanged,
    unseen_attention,
)
from kerasfactory.explain._engine.data import batches_of, check_no_texts, progress_bar, size_of
from kerasfactory.explain._engine.foreign import (
    Sight,
    calls_of,
    is_meant,
    is_usable,
    noting_in,
    path_of,
    watching_operations,
)
from kerasfactory.explain._engine.undo import alone, twin
from kerasfactory.layers._attention import keeping_aside


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
    path: str = ""  # this and what follows: as those of the call
    has_sink: bool = False
    read_from: str = ""
    candidate: int = 0


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
    and of Keras' fused function, it gets what they would attend with, and whether that is one of `layers`, and returns
    their output (`None`: the layer is to do it itself) and something for `measure`. The model then runs eagerly, and
    only so: nothing is compared with a run that forms them.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "`model` must be a keras.Model; `keras.Sequential([layer])` makes one of a layer. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    batches, expected = batches_of(x, batch_size)
    progress = progress_bar(expected, verbose)
    first = next(batches, None)
    if first is None or size_of(first) == 0:
        raise ValueError("`x` is empty: it must hold at least one sample.")
    _check_strings_are_taken(model, first)
    build_model(model, first)
    chosen = choose_attention(model, layers)
    steps = (
        _steps_in_place(model, chosen, layers, measure, attend) if attend else _steps(model, chosen, layers, measure)
    )
    before = state_of(model)
    measured, state, outputs = steps.compared(before, first)
    measured = _in_order(measured, steps.found)
    found = {name: steps.found[name]._replace(layer=steps.found[name].layer()) for name in measured}
    _report_missing(model, chosen, layers, found, steps)
    changes_state = _differ(before[1], state[1])
    inputs = len(tree.flatten(first))
    difference = relative_difference(*outputs)
    batch = Batch(size_of(first), inputs, expected, measured, found, difference, changes_state)
    yield batch
    progress.update(1)

    can_stop = only_scores and not changes_state and not steps.lost and _always_calls_the_same(model)
    can_stop &= not any(call.path for call in found.values())
    watched = steps.watched_until(len(found)) if can_stop else steps.watched
    done = 1
    for data in batches:
        measured, state = watched(state, data)
        done += 1
        if set(measured) != set(found):
            in_loops = ", ".join(sorted(steps.lost))
            hint = f"The scores of {in_loops} stay inside a compiled loop: use `model.compile(run_eagerly=True)`. "
            raise RuntimeError(
                f"In batch {done} the model called other attention layers than in the first: {sorted(measured)} "
                f"instead of {sorted(found)}. {hint if in_loops else ''}Capture such batches one by one."
            )
        yield batch._replace(size=size_of(data), measured=_in_order(measured, steps.found))
        progress.update(done)
    if expected is None:
        progress.update(done, finalize=True)


def state_of(model: Any) -> tuple[list, list]:
    """The values of its variables, or an error if they are with another thread."""
    # TensorFlow's value is the variable itself.
    trainable, non_trainable = (
        [ops.cast(_backend.value_of(variable), variable.dtype) for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    return trainable, non_trainable


def compile_options(model: Any) -> dict[str, Any]:
    """How `model.predict` would compile it."""
    model = twin(model)  # Keras works this out when it is asked, and writes the answer into the model
    return {"run_eagerly": model.run_eagerly, "jit_compile": model.jit_compile}


def _differ(arrays: Sequence[Any], others: Sequence[Any]) -> bool:
    return any(
        one is not other and not np.array_equal(_backend.as_numpy(one), _backend.as_numpy(other))
        for one, other in zip(arrays, others, strict=True)
    )


class _Steps(NamedTuple):
    """Functions from `(state, data)` that run a batch, and what they find out about the model as they are traced."""

    compared: Callable  # to what is measured, the state afterward, and the outputs, unwatched and watched
    watched: Callable  # to what is measured and the state afterward: a compiled function leaves out the rest
    watched_until: Callable  # from a number of calls to the same function, which, if not compiled, stops after them
    found: dict[str, Found]  # with weak references to the layers: what is kept must not keep the model
    lost: set[str]  # layers whose scores cannot be had
    # Layers, as far as it is known, and why attention in them cannot be read, if it cannot.
    called: weakref.WeakKeyDictionary[Any, str | None]


def _steps(model: Any, chosen: dict[str, Any], layers: Any, measure: Callable[[Call], Any]) -> _Steps:
    def make():
        found: dict[str, Found] = {}
        lost: set[str] = set()
        called: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
        # What is kept must not keep the model, or both would stay for ever.
        model_reference = weakref.ref(model)
        layer_references = {name: weakref.ref(layer) for name, layer in chosen.items()}

        def watched_layers():
            return {name: reference() for name, reference in layer_references.items()}

        def watched(state, data, sees_all=False):
            model = model_reference()
            sees_all |= any(call.path for call in found.values())
            with unchanged(model), _watching(watched_layers()) as seen:
                with watching_operations(model, called) if sees_all else contextlib.nullcontext(()) as sights:
                    outputs, state = _backend.predict_step(model, state, data)
                measured = _measured(model, seen, sights, layers, measure, found, lost)
            return measured, state, outputs

        def compared(state, data):
            model = model_reference()
            with unchanged(model), noting_in(None):
                outputs, _ = _backend.predict_step(model, state, data)
            measured, state, watched_outputs = watched(state, data, sees_all=True)
            return measured, state, (outputs, watched_outputs)

        def stopping(number):
            def until(state, data):
                model = model_reference()
                with unchanged(model), _watching(watched_layers(), stop_after=number) as seen:
                    with contextlib.suppress(_EnoughSeen):
                        _backend.predict_step(model, state, data)
                    return _measured(model, seen, (), layers, measure, found, lost), state

            return _backend.compiled(until, run_eagerly=True, jit_compile=False)

        options = compile_options(model)
        compiled = _backend.compiled(lambda state, data: watched(state, data)[:2], **options)
        is_eager = options["run_eagerly"] or keras.config.backend() == "torch"
        return _Steps(
            _backend.compiled(compared, **options, runs_once=True),
            compiled,
            stopping if is_eager else lambda number: compiled,
            found,
            lost,
            called,
        )

    return kept(model, (measure, repr(layers)), chosen, make)


def _steps_in_place(model: Any, chosen: dict[str, Any], layers: Any, measure: Callable, attend: Callable) -> _Steps:
    """Not kept, for nothing is compiled: `attend` needs values."""
    found: dict[str, Found] = {}
    lost: set[str] = set()
    called: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
    # The other layers attend in the same way: they would form what the chosen ones do not.
    others = [layer for layer in find_attention(model).values() if all(layer is not one for one in chosen.values())]

    def attend_fused(path, heads):
        return attend(heads, is_meant(layers, path_of(path, model)))

    def watched(state, data):
        with unchanged(model), _watching(chosen, attend) as seen:
            for layer in others:
                Watch(layer, None, attend)
            with watching_operations(model, called, attend_fused) as sights:
                _, state = _backend.predict_step(model, state, data)
            measured = _measured(model, seen, sights, layers, measure, found, lost)
        return measured, state

    step = _backend.compiled(watched, run_eagerly=True, jit_compile=False)
    return _Steps(lambda state, data: (*step(state, data), ((), ())), step, lambda number: step, found, lost, called)


def _measured(
    model: Any,
    watched: dict[str, list[Call]],
    sights: Sequence[Sight],
    layers: Any,
    measure: Callable,
    found: dict[str, Found],
    lost: set,
) -> dict[str, Any]:
    measured = {}
    seen = calls_of(model, sights, watched, layers)
    numbered = [
        (call, name, number, name if len(calls_of_layer) == 1 else f"{name}#{number}")
        for name, calls_of_layer in seen.items()
        for number, call in enumerate(calls_of_layer, start=1)
    ]
    for call, name, number, full_name in sorted(numbered, key=lambda entry: entry[0].order):
        if not is_usable(call):
            lost.add(name)
            continue
        about = (call.masks, call.path, call.has_sink, call.read_from, call.candidate)
        found[full_name] = Found(name, number, weakref.ref(call.layer), *about)
        measured[full_name] = measure(call)
    return measured


def _in_order(measured: dict[str, Any], found: dict[str, Found]) -> dict[str, Any]:
    """What JAX returns from a compiled function is in the order of the alphabet."""
    return {name: measured[name] for name in list(found) if name in measured}  # another thread may be finding some


# Compiling takes longer than running many a batch: functions are kept, by a key, while their model lives.
_KEPT: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()


def kept(model: Any, key: Any, chosen: Iterable[str], make: Callable[[], Any]) -> Any:
    """What `make` returned for this key, until an attribute of a layer is set or other layers are chosen."""
    with alone():
        kept_of_model, fingerprint = _KEPT.setdefault(model, {}), _fingerprint(chosen, model)
        if key not in kept_of_model or not _same_fingerprint(kept_of_model[key][0], fingerprint):
            kept_of_model[key] = (fingerprint, make())
        return kept_of_model[key][1]


_PLAIN = (bool, int, float, str, type(None))
# Notes that no output depends on: Keras' own, of which the last two change while a model trains on JAX, and that of
# this package's layer.
_CHANGED_BY_USE = ("_called", "_parent_path", "_jax_state", "_jax_state_synced", "_latest")


def _fingerprint(chosen: Iterable[str], model: Any) -> list:
    """All that a traced function may have made a constant of: it changes if any attribute of any layer is set."""
    entries: list[Any] = [changes(), *chosen]
    for layer in all_layers(model):
        for name, value in dict(vars(layer)).items():  # another thread may be adding one
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


def _same_fingerprint(one: list, other: list) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(a is b or (isinstance(a, _PLAIN) and a == b) for a, b in pairs)


def _report_missing(model: Any, chosen: dict[str, Any], layers: Any, found: dict[str, Found], steps: _Steps) -> None:
    """Names the layers that are not in the result, in a warning, or in an error where they were asked for."""
    missing, seen = {}, {call.name for call in found.values()}
    wanted = [layers] if isinstance(layers, str) else layers or ()
    others = [entry for entry in wanted if not choose_attention(model, [entry])]
    unknown = [str(entry) for entry in others if not any(is_called(entry, c.name, c.path) for c in found.values())]
    unseen = unseen_attention(steps.called, [call.layer for call in found.values()])
    for name in [*chosen, *sorted(steps.lost - chosen.keys()), *unknown]:
        if name in steps.lost:
            missing[name] = STAYS_INSIDE
        elif name in unknown and name in unseen:
            missing[name] = unseen[name]
        elif name not in seen:
            missing[name] = "the model did not call it, or it has no softmax over keys that can be seen"
    if layers is None:
        missing = {**missing, **{name: reason for name, reason in unseen.items() if name not in missing}}
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in missing.items())
    if seen and layers is None:
        if missing:
            warn(f"These layers are not captured:{reasons}")
    elif missing:
        raise ValueError(f"These layers cannot be captured:{reasons}")
    elif not seen:
        names = ", ".join(layer.name for layer in model.layers)
        raise ValueError(
            "The model has no attention that this package can see: no `MultiHeadAttention` or `GroupQueryAttention`, "
            "no softmax over the keys of something, and no call of `keras.ops.dot_product_attention`. If one of its "
            f"layers does attend, use `explain.register_attention` to say how it is read. Its layers are: {names}"
        )


class _EnoughSeen(BaseException):
    """Everything is known that is wanted. Keras takes hold of an `Exception` on its way."""


def _always_calls_the_same(model: Any) -> bool:
    """Whether the model is a graph that calls its attention layers, the same ones for all data."""
    of_keras = type(model).call.__module__ in ("keras.src.models.functional", "keras.src.models.sequential")
    return of_keras and all(
        is_keras_method(layer.call)
        or not find_attention(layer)
        or (isinstance(layer, keras.Model) and _always_calls_the_same(layer))
        for layer in model.layers
    )


@contextlib.contextmanager
def _watching(
    attentions: dict[str, Any], attend: Callable | None = None, stop_after: int | None = None
) -> Iterator[dict[str, list[Call]]]:
    """Fills a dictionary with the calls of the layers. To be used within `unchanged`, which takes it all away."""
    calls: dict[str, list[Call]] = {name: [] for name in attentions}

    def stop():
        if sum(map(len, calls.values())) == stop_after:
            raise _EnoughSeen

    for name, layer in attentions.items():
        Watch(layer, calls[name], attend, stop if stop_after else None)
    yield calls


def _check_strings_are_taken(model: Any, data: tuple) -> None:
    """Raises the error for strings if the model is a graph whose inputs are numbers."""
    inputs = [] if isinstance(model, keras.Sequential) and not model.built else getattr(model, "inputs", None) or []
    if inputs and not any(input.dtype == "string" for input in inputs):
        for array in tree.flatten(data):
            check_no_texts("x", array)


def build_model(model: Any, data: Any) -> None:
    """Gives a model its weights that has none yet, as `predict` would."""
    if all(layer.built for layer in all_layers(model)):
        return
    # The scores are computed with weights that are no more.
    with alone(), keras.StatelessScope(), keeping_aside():
        model(data[0])


def relative_difference(outputs: Any, watched_outputs: Any) -> float:
    """The largest difference between two outputs of a model, relative to the largest entry."""
    worst = 0.0
    for one, other in zip(tree.flatten(outputs), tree.flatten(watched_outputs), strict=True):
        one, other = (_backend.as_numpy(a).astype("float64") for a in (one, other))
        same = (one == other) | (np.isnan(one) & np.isnan(other))
        if not same.all():
            worst = max(worst, np.abs(one - other)[~same].max() / np.abs(one[np.isfinite(one)]).max(initial=1e-30))
    return float(worst)


# How far apart, relative to the largest entry, two runs of one computation may lie: rounding, not another computation.
_ROUNDING, _HALF_PRECISION_ROUNDING = 1e-5, 2e-2


def rounding_of(model: Any) -> float:
    """How far apart two runs of this model may lie, relative to the largest entry."""
    half = any(layer.compute_dtype in ("float16", "bfloat16") for layer in all_layers(model))
    return _HALF_PRECISION_ROUNDING if half else _ROUNDING


def warn_of_difference(model: Any, difference: float) -> None:
    """Warns if the first batch's outputs differed when they were observed, by more than rounding."""
    if not difference <= rounding_of(model):
        warn(
            f"The model's outputs for the first batch differ by {difference:.1e} of the largest when the model is "
            "observed. The scores belong to the run that was observed, not to what `predict` returns. The cause may be "
            "outputs that are random or depend on how often the model was called."
        )
