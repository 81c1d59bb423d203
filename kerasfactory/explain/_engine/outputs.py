"""What a model's outputs mean: as numbers, a row for each sample; what they are numbers of; and their loss."""

import functools
import itertools
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from kerasfactory import _backend
from kerasfactory.explain._engine.attention import unchanged
from kerasfactory.explain._engine.data import batches_of, size_of
from kerasfactory.explain._engine.observe import build_model, compile_options, kept, state_of

_TASKS = ("classification", "multilabel", "regression")
# The losses of Keras by what they say of the outputs. One that is not here says nothing, as a function of one's own.
_OF_CLASSES = (
    *("sparse_categorical_crossentropy", "categorical_crossentropy", "categorical_focal_crossentropy"),
    *("categorical_generalized_cross_entropy", "kl_divergence", "categorical_hinge"),
)
_OF_LABELS = ("binary_crossentropy", "binary_focal_crossentropy", "hinge", "squared_hinge")
_OF_NUMBERS = (
    *("mean_squared_error", "mean_absolute_error", "mean_absolute_percentage_error", "mean_squared_logarithmic_error"),
    *("huber", "log_cosh", "poisson", "cosine_similarity"),
)
_OF_SCORES = ("categorical_hinge", "hinge", "squared_hinge")  # that are no probabilities
_ADAPTING = ("crossentropy", "ce")  # names for `model.compile`, which takes the loss that fits the labels
_ROUNDING = 1e-2  # by how much probabilities may miss 0, 1 or their sum: in half precision
_EAGERLY = {"run_eagerly": True, "jit_compile": False}


class Asked(NamedTuple):
    """The part of a model's outputs that is asked about."""

    number: int  # of the output, among several
    name: str | int | None  # of the output; None if there is one
    indices: tuple[int, ...]  # along its first axes after the samples
    shape: tuple[int, ...]  # of its axes after those, which hold the outputs (sample, output)
    column: int | None  # the one of these that is asked about; None for all


class NoSpreadError(ValueError):
    """All samples have the same outputs: there is no scale for a change."""


class Outputs(NamedTuple):
    """The outputs of a model for its data, and what they mean."""

    values: np.ndarray  # (sample, output), float64
    part: Asked  # where they are among all outputs, and the column that is asked about
    task: str | None  # "classification", "multilabel", "regression"; None if that is not known
    source: str  # what says so: "loss", "task" or "unknown"
    probabilities: bool  # of classes or labels; they are logits if not
    middle: float | None  # what `middle_of` says


def outputs_of(model: Any, x: Any, *, task: str | None, target: Any, batch_size: int | None = None) -> Outputs:
    """What `model.predict` returns for `x` of the output that `target` asks about, and what it means.

    The loss that the model is compiled with says what the outputs mean, unless `task` does. Nothing is guessed from
    their values: only if classes have no such loss, and no layer says how their outputs end, rows that sum to 1 are
    taken for probabilities.
    """
    values, part = _predicted(model, x, batch_size, target)
    values = checked_outputs(values, "`x`")
    task, source = _task(model, task, part)
    if task == "classification" and len(part.shape) > 1:
        raise ValueError(
            f"The model tells classes apart for each of several positions: its output has shape (sample, "
            f"{', '.join(map(str, part.shape))}). Say which position is meant, with `target=0`, or which output of "
            "which position, with `target=(0, 1)`."
        )
    probabilities = task in ("classification", "multilabel") and _are_probabilities(model, part, values)
    return Outputs(values, part, task, source, probabilities, middle_of(model, part, task))


def predictions(model: Any, x: Any, batch_size: int | None = None, target: Any = None) -> np.ndarray:
    """What `model.predict` returns for `x`, as float64 (sample, output); the model stays as it was.

    It is compiled once, for as long as the model lives and no attribute of its layers is set. Random numbers in the
    model are the same in each call. The last number in a `target` chooses among the columns: all are returned.
    """
    return _predicted(model, x, batch_size, target)[0]


def _predicted(model: Any, x: Any, batch_size: int | None, target: Any) -> tuple[np.ndarray, Asked]:
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}")
    batches, expected = batches_of(x, batch_size)
    first = next(batches, None)
    if first is None or size_of(first) == 0:
        raise ValueError("`x` is empty: it must hold at least one sample.")
    build_model(model, first)

    def make():
        model_reference = weakref.ref(model)

        def step(state, data):
            model = model_reference()
            with unchanged(model):
                return _backend.predict_step(model, state, data)

        return _backend.compiled(step, **compile_options(model))

    run, state, parts = kept(model, predictions, (), make), state_of(model), []
    full = None if expected == 1 else size_of(first)
    for data in itertools.chain([first], batches):
        samples, padded = size_of(data), _backend.padded_size(size_of(data), full)
        if padded > samples:
            rows = np.arange(padded) % samples
            data = tree.map_structure(lambda array, rows=rows: ops.take(array, rows, axis=0), data)
        outputs, state = run(state, data)
        part = asked(model, outputs, target)
        values = _backend.as_numpy(matrix(outputs, part)).astype("float64")
        if len(values) != padded:
            raise ValueError(
                "The model must give one row of outputs for each sample. Received outputs of shape "
                f"{tuple(output_at(outputs, part).shape)} for {padded} samples."
            )
        parts.append(values[:samples])
    return np.concatenate(parts), part


def asked(model: Any, outputs: Any, target: Any) -> Asked:
    """The part of the outputs, arrays in a dictionary or list or alone, that `target` asks about."""
    keys, arrays = _named(outputs)
    path = target if isinstance(target, tuple) else () if target is None else (target,)
    number = 0
    if len(arrays) > 1 or (path and path[0] in keys and isinstance(path[0], str)):
        names = getattr(model, "output_names", ())
        known = {name: number for number, name in enumerate(names)} if len(names) == len(keys) and 0 in keys else {}
        known |= {key: number for number, key in enumerate(keys)}
        if not path or isinstance(path[0], bool) or path[0] not in known:
            _refuse_several(model, keys, arrays, target)
        number, path = known[path[0]], path[1:]
    shape = tuple(arrays[number].shape[1:]) or (1,)
    fits = len(path) <= len(shape) and all(
        isinstance(index, int | np.integer) and not isinstance(index, bool) and 0 <= index < size
        for index, size in zip(path, shape, strict=False)
    )
    if not fits:
        _refuse_target(target, shape, keys[number] if len(arrays) > 1 else None)
    indices = tuple(int(index) for index in path)
    column = indices[-1] if len(indices) == len(shape) else None
    leading = indices[:-1] if column is not None else indices
    return Asked(number, keys[number] if len(arrays) > 1 else None, leading, shape[len(leading) :], column)


def describe_target(target: Any) -> Any:
    """A target as the attributes of a result tell it: a tuple with commas between its parts."""
    return ", ".join(map(str, target)) if isinstance(target, tuple) else target


def _named(outputs: Any) -> tuple[list[Any], list[Any]]:
    """The keys and the arrays of the outputs; a dictionary or list of one output is that output."""
    flat = tree.flatten(outputs)
    if len(flat) == 1:
        return list(outputs) if isinstance(outputs, Mapping) else [0], flat
    keys = list(outputs) if isinstance(outputs, Mapping) else list(range(len(outputs)))
    arrays = [outputs[key] for key in keys]
    if any(not hasattr(array, "shape") for array in arrays):
        raise ValueError(
            "The model's outputs are nested. Make a model of those that you ask about: `keras.Model(model.inputs, "
            f"model.outputs[0])`. Received outputs of shapes: {[tuple(array.shape) for array in flat]}"
        )
    return keys, arrays


def _refuse_several(model: Any, keys: list[Any], arrays: list[Any], target: Any) -> None:
    shapes = ", ".join(f"{key!r} of shape {tuple(array.shape)}" for key, array in zip(keys, arrays, strict=True))
    of_one = (
        "" if _symbolic(model) is None else " Or make a model of it: `keras.Model(model.inputs, model.outputs[0])`."
    )
    raise ValueError(
        f"The model has {len(arrays)} outputs: {shapes}. Say which one is meant, with `target={keys[0]!r}`, or one of "
        f"its numbers, with `target=({keys[0]!r}, 0)`.{of_one} Received: target={target!r}"
    )


def _refuse_target(target: Any, shape: tuple[int, ...], key: Any) -> None:
    if len(shape) == 1:
        said = f"the number of an output, from 0 to {shape[0] - 1}: the model has {shape[0]}"
        if key is not None:
            said = f"{key!r}, or ({key!r}, number) with a number from 0 to {shape[0] - 1}"
    else:
        largest = (*([repr(key)] if key is not None else []), *(size - 1 for size in shape))
        said = (
            f"a tuple of numbers, one for each axis of the output, which has shape (sample, "
            f"{', '.join(map(str, shape))}): at most ({', '.join(map(str, largest))})"
        )
    raise ValueError(f"`target` must be {said}. Received: target={target!r}")


def output_at(outputs: Any, part: Asked) -> Any:
    """The whole of the output that is asked about, as the model returns it: what its loss is computed of."""
    return _named(outputs)[1][part.number]


def matrix(outputs: Any, part: Asked) -> Any:
    """What is asked about, a tensor (sample, output)."""
    output = output_at(outputs, part)
    if part.indices:
        output = output[(slice(None), *part.indices)]
    return ops.reshape(output, (-1, int(np.prod(part.shape))))


def asked_output(model: Any, outputs: Any, task: str | None, target: Any) -> Any:
    """The one number for each sample, a tensor (sample,), to take a gradient of: that of a class if it is predicted."""
    part = asked(model, outputs, target)
    values = matrix(outputs, part)
    if part.column is not None:
        return values[:, part.column]
    task, _ = _task(model, task, part)
    if values.shape[1] == 1:
        middle = middle_of(model, part, task)
        only = values[:, 0]
        return only if middle is None else ops.where(only < middle, 2 * middle - only, only)
    if task == "classification" and len(part.shape) == 1:
        return ops.take_along_axis(values, ops.argmax(values, axis=1)[:, None], axis=1)[:, 0]
    known = "It is not known to tell classes apart" if task is None else f"Its task is {task}"
    if task == "classification":
        known = "It tells classes apart for each of several positions"
    example = (*(() if part.name is None else (part.name,)), *part.indices, *(0 for _ in part.shape))
    hint = ', or `task="classification"` for the predicted class' if task is None and len(part.shape) == 1 else ""
    raise ValueError(
        f"A gradient needs one number as output, but the model has {values.shape[1]} outputs. {known}: say which "
        f"output is meant, as with `target={example[0] if len(example) == 1 else example!r}`{hint}."
    )


def middle_of(model: Any, part: Asked, task: str | None) -> float | None:
    """Where one output that tells two classes apart is between them: 0.5 of a probability, 0 of a logit.

    Below it, the first class is predicted, whose output is as far above it. `None` for other outputs, for one that
    `target` names, and if neither the loss nor the last layer says what it is.
    """
    if task != "classification" or part.column is not None or int(np.prod(part.shape)) != 1:
        return None
    are_probabilities = _said_to_be_probabilities(model, part)
    return None if are_probabilities is None else 0.5 if are_probabilities else 0.0


def check_target(model: Any, data: tuple, target: Any) -> None:
    """Raises a `ValueError` if a model has no such output, for a batch `(inputs,)` of one sample or more."""
    outputs = _symbolic(model)
    if outputs is None or any(None in output.shape[1:] for output in tree.flatten(outputs)):
        step = _backend.compiled(lambda state, data: _backend.predict_step(model, state, data), **_EAGERLY)
        build_model(model, data)
        with unchanged(model):
            outputs, _ = step(state_of(model), tree.map_structure(lambda array: array[:1], data))
    asked(model, outputs, target)


def _symbolic(model: Any) -> Any:
    """The outputs of a model that is a graph, without values; `None` for another."""
    try:
        return model.outputs[0] if isinstance(model, keras.Sequential) else model.output
    except (AttributeError, IndexError, TypeError, ValueError):
        return None


def checked_task(task: Any) -> str | None:
    if task is not None and task not in _TASKS:
        raise ValueError(f"`task` must be one of {', '.join(map(repr, _TASKS))}, or None. Received: task={task!r}")
    return task


def _task(model: Any, task: str | None, part: Asked) -> tuple[str | None, str]:
    """The task, and what says so: "task", "loss" or "unknown"."""
    if checked_task(task) is not None:
        return task, "task"
    name, _ = _known_loss(loss_of(model, part))
    if name in _OF_CLASSES or name in _ADAPTING:
        return "classification", "loss"
    if name in _OF_LABELS:
        return ("classification" if int(np.prod(part.shape)) == 1 else "multilabel"), "loss"
    return ("regression", "loss") if name in _OF_NUMBERS else (None, "unknown")


def loss_of(model: Any, part: Asked) -> Any:
    """The compiled loss of an output, of several or of the only one; `None` if there is none."""
    given = getattr(model, "loss", None)
    if not isinstance(given, Mapping | list | tuple):
        return given
    losses = list(given.values()) if isinstance(given, Mapping) else list(given)
    if part.name is None:
        return losses[0] if len(losses) == 1 else None
    if isinstance(given, Mapping):
        names = getattr(model, "output_names", ())
        name = names[part.number] if isinstance(part.name, int) and part.number < len(names) else part.name
        return given.get(part.name, given.get(name))
    return losses[part.number] if part.number < len(losses) else None


def _known_loss(loss: Any) -> tuple[str | None, bool]:
    """The name of the function of Keras that a loss computes, if it does so, and whether of logits."""
    keywords: dict[str, Any] = {}
    if isinstance(loss, str):
        if loss in _ADAPTING:
            return loss, False
        try:
            loss = keras.losses.get(loss)
        except ValueError:
            return None, False
    if isinstance(loss, type) and issubclass(loss, keras.losses.Loss):
        loss = loss()
    if isinstance(loss, functools.partial):
        loss, keywords = loss.func, loss.keywords
    logits = bool(keywords.get("from_logits", getattr(loss, "from_logits", False)))
    function = getattr(loss, "fn", loss)
    for name in (*_OF_CLASSES, *_OF_LABELS, *_OF_NUMBERS):
        if function is getattr(keras.losses, name, ...):
            return name, logits
    return None, logits


def _are_probabilities(model: Any, part: Asked, values: np.ndarray) -> bool:
    """Whether outputs of classes or labels are probabilities: what is said of them, unless the values cannot be."""
    if values.min() < -_ROUNDING or values.max() > 1 + _ROUNDING:
        return False
    said = _said_to_be_probabilities(model, part)
    return values.shape[1] > 1 and np.allclose(values.sum(axis=1), 1, atol=_ROUNDING) if said is None else said


def _said_to_be_probabilities(model: Any, part: Asked) -> bool | None:
    """What the loss says of outputs of classes or labels, else the layer they come from; `None` if neither does."""
    name, logits = _known_loss(loss_of(model, part))
    if name in _OF_CLASSES or name in _OF_LABELS or name in _ADAPTING:
        return not logits and name not in _OF_SCORES
    ending = _ending(model, part)
    return None if ending is None else ending in ("softmax", "sigmoid")


def _ending(model: Any, part: Asked) -> str | None:
    """How the layer that an output comes from ends: "softmax", "sigmoid" or "other"; `None` if that is not known."""
    if isinstance(model, keras.Sequential):
        last = model.layers[-1] if model.layers else None
    else:
        outputs = _symbolic(model)
        if outputs is None:
            return None
        output = output_at(outputs, part)
        last = next((layer for layer in model.operations if _output_of(layer) is output), None)
    if isinstance(last, keras.Model):
        return _ending(last, part)
    kind = type(last).__name__.lower()
    if kind in ("softmax", "sigmoid"):
        return kind
    if isinstance(last, keras.layers.Dense | keras.layers.EinsumDense | keras.layers.Activation):
        activation = getattr(last.activation, "__name__", "other")
        return activation if activation in ("softmax", "sigmoid") else "other"
    return None


def _output_of(layer: Any) -> Any:
    try:
        return layer.output
    except AttributeError:  # it is called more than once
        return None


def checked_outputs(outputs: np.ndarray, name: str) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(bad):
        raise ValueError(
            f"The model's output is NaN or infinite for {len(bad)} of {len(outputs)} rows of {name}. Look for NaN in "
            "`x` and in `background`, and for values that the model does not know, such as the mean of category codes."
        )
    return outputs


def on_linear_scale(found: Outputs, values: Any, rounding: float) -> Any:
    """Outputs, a tensor (sample, output), on a scale on which a change means the same everywhere.

    Logits for probabilities: the log-odds of a label, or the logarithms of those of classes. A probability below
    `rounding` counts as `rounding`. The mean over the classes is subtracted, because a softmax takes no notice of it.
    Other numbers stay as they are.
    """
    one_of_several = found.task == "classification" and values.shape[1] > 1
    if found.probabilities:
        logarithms = ops.log(ops.maximum(values, rounding))
        values = logarithms if one_of_several else logarithms - ops.log(ops.maximum(1 - values, rounding))
    return values - ops.mean(values, axis=1, keepdims=True) if one_of_several else values


def spread_of(values: np.ndarray) -> np.ndarray:
    r"""How far numbers (sample, column) lie from their median, (column,), in the unit of a standard deviation.

    \(\sqrt{\pi / 2}\) times the mean absolute deviation from the median: the standard deviation, if they are normal.
    A standard deviation is blown up by heavy tails, and quartiles fall together where most numbers are the same.
    """
    return np.sqrt(np.pi / 2) * np.abs(values - np.median(values, axis=0)).mean(axis=0)


def resolve_loss(model: Any, loss: Any) -> Any:
    """The loss that is meant, out of a list or dictionary of one; the one that the model is compiled with for `None`.

    It is a name, a `keras.losses.Loss` or a function: `model.compile` chooses by the outputs what some names mean.
    """
    given = getattr(model, "loss", None) if loss is None else loss
    if given is None:
        raise ValueError(
            "The model has no loss. Compile it with one, or give `loss`, as `model.compile` takes it. Received: "
            "loss=None, and a model that is not compiled with a loss."
        )
    losses = tree.flatten(given)
    if len(losses) != 1 or not (isinstance(losses[0], str) or callable(losses[0])):
        raise ValueError(
            "The loss must be one function, of one output: a name that Keras knows, a `keras.losses.Loss`, or a "
            "function of `(y, outputs)` that returns a value for each sample. If the model is compiled with several "
            "losses, compile it with one, or give such a function as `loss` where there is this argument. Received: "
            f"loss={', '.join(loss_name(loss) for loss in losses)}"
        )
    return losses[0]


def loss_name(loss: Any) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", "loss"))


def compiled_loss(loss: Any, targets: Any, outputs: Any) -> keras.losses.Loss:
    """What `model.compile(loss=loss)` makes of the loss for such targets and outputs."""
    return _backend.get_loss(loss, targets, outputs)


def sample_losses(loss: Any, targets: Any, outputs: Any) -> Any:
    """The loss of each sample, a tensor (sample,), before `model.compile(loss=loss)` would reduce it to a number.

    Several outputs are for a function, which gets targets and outputs as they are.
    """
    flat = tree.flatten(outputs)
    samples = flat[0].shape[0]
    if len(flat) == 1:
        (outputs,), (targets,) = flat, tree.flatten(targets)
        function = compiled_loss(loss, targets, outputs)
        # A loss of single precision would round outputs of double precision.
        is_double = keras.backend.standardize_dtype(outputs.dtype) == "float64"
        dtype = "float64" if is_double else function.dtype
        losses = function.call(ops.cast(targets, dtype), ops.cast(outputs, dtype))
    elif callable(loss):
        losses = loss(targets, outputs)
    else:
        raise ValueError(
            f"The model has {len(flat)} outputs: give a function of `(y, outputs)` as `loss`. Received: "
            f"loss={loss_name(loss)}"
        )
    shape = tuple(getattr(losses, "shape", ()))
    if shape[:1] != (samples,):
        raise ValueError(
            f"`loss` must return the loss of each sample, not their mean: a number for each sample, {samples} here. "
            f"Received: shape {shape} from loss={loss_name(loss)}"
        )
    return losses if len(shape) == 1 else ops.mean(losses, axis=tuple(range(1, len(shape))))


def loss_values(loss: Any, targets: Any, outputs: Any) -> np.ndarray:
    """`sample_losses` of arrays or tensors, as float64, and a `ValueError` where one is not finite."""
    targets, outputs = tree.map_structure(ops.convert_to_tensor, (targets, outputs))
    values = _backend.as_numpy(sample_losses(loss, targets, outputs)).astype("float64")
    if not np.isfinite(values).all():
        raise ValueError(
            f"The loss {loss_name(loss)} is NaN or infinite: that of {np.count_nonzero(~np.isfinite(values))} of "
            f"{len(values)} samples in a batch is not finite. Look for NaN or infinite numbers in `x`, and in the "
            "model's weights, and check that `y` and the outputs are what the loss takes."
        )
    return values


def check_labels(loss: Any, labels: np.ndarray, outputs: np.ndarray) -> None:
    """Raises a `ValueError` if a loss of Keras does not take the labels (sample, label): it gives numbers for any."""
    function: Any = getattr(compiled_loss(loss, labels, outputs), "fn", None)
    if not (getattr(function, "__module__", None) or "").startswith("keras"):
        return
    name, width, number_of_outputs = function.__name__, labels.shape[1], outputs.shape[1]
    is_sparse = "sparse" in name
    if width != (1 if is_sparse else number_of_outputs):
        raise ValueError(
            f"For the loss {name} and a model with {number_of_outputs} outputs, `y` must hold "
            f"{1 if is_sparse else number_of_outputs} numbers for each sample. Received: {width}"
        )
    largest = number_of_outputs - 1 if is_sparse else 1
    fits = labels.min() >= 0 and labels.max() <= largest and not (is_sparse and (labels != np.floor(labels)).any())
    if "crossentropy" in name and not fits:
        raise ValueError(
            f"For the loss {name}, `y` must hold {'integers' if is_sparse else 'numbers'} from 0 to {largest}. "
            f"Received: from {labels.min()} to {labels.max()}"
        )
