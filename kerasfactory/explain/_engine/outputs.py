"""What a model's outputs mean: as numbers, a row for each sample; how far two lie apart; and their loss."""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from scipy import optimize, special

from kerasfactory import _backend
from kerasfactory.explain._engine.data import batch_size_of, batches_of, size_of
from kerasfactory.explain._engine.observe import build_model, compile_options, kept, state_of, unchanged

_FOR_CONSTANT = 500  # samples on which the best constant is looked for
_SEARCHED = 3  # outputs: for more, only the constants that minimize common losses are tried


def predictions(model: Any, x: Any, batch_size: int | None = None) -> np.ndarray:
    """What `model.predict` returns for `x`, as float64 (sample, output); the model stays as it was.

    It is compiled once, for as long as the model lives and no attribute of its layers is set. Random numbers in the
    model are the same in each call.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}")
    batches, _ = batches_of(x, batch_size_of(x, 1024) if batch_size is None else batch_size)
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

    run, state, parts = kept(model, predictions, {}, make), state_of(model), []
    for data in itertools.chain([first], batches):
        outputs, state = run(state, data)
        arrays = [_backend.as_numpy(output) for output in tree.flatten(outputs)]
        if len(arrays) != 1 or arrays[0].ndim not in (1, 2) or len(arrays[0]) != size_of(data):
            raise ValueError(
                "The model must have one output, of shape (sample,) or (sample, output). Make a model of the part "
                "that you ask about, as with `keras.Model(model.input, model.output[:, 0])`. Received outputs of "
                f"shapes: {[array.shape for array in arrays]}"
            )
        parts.append(arrays[0].reshape(len(arrays[0]), -1).astype("float64"))
    return np.concatenate(parts)


def checked_outputs(outputs: np.ndarray, name: str) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(bad):
        raise ValueError(
            f"The model's output is NaN or infinite for {len(bad)} of {len(outputs)} rows of {name}. Look for NaN in "
            "`x` and in `background`, and for values that the model does not know, as the mean of categories."
        )
    return outputs


def checked_target(target: Any, outputs: int) -> int:
    if isinstance(target, bool) or not isinstance(target, int | np.integer) or not 0 <= target < outputs:
        raise ValueError(
            f"`target` must be the number of an output, from 0 to {outputs - 1}. Received: target={target!r}"
        )
    return int(target)


def output_change(outputs: np.ndarray, columns: list[int]) -> tuple[Callable[[Any, Any], Any], str]:
    """A function of two tensors (sample, column) that measures how far they lie apart, (sample,), and its unit."""
    # A guess: outputs that look like probabilities are taken for such.
    in_range = ((outputs >= 0) & (outputs <= 1)).all()
    if in_range and (outputs.shape[1] == 1 or np.allclose(outputs.sum(axis=1), 1, atol=1e-2)):
        share = 0.5 if len(columns) > 1 else 1.0
        return lambda one, other: share * ops.sum(ops.abs(one - other), axis=-1), "total variation"
    spread = outputs[:, columns].std(axis=0)
    if not spread.any():
        raise ValueError(
            "The model's output is the same for all samples of `x`: there is no scale for a change. Give more "
            "samples, or other ones."
        )
    scale = ops.convert_to_tensor(np.where(spread > 0, spread, 1), "float32")
    return lambda one, other: ops.max(ops.abs(one - other) / scale, axis=-1), "relative to the standard deviation"


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
            "`loss` must return the losses of the samples, and not their mean: a number for each sample, "
            f"{samples} here. Received: shape {shape} from loss={loss_name(loss)}"
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
    if not getattr(function, "__module__", "").startswith("keras"):
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


def best_constant_losses(loss: Any, y: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The loss of each sample, (sample,), under the constant output for which their mean is smallest.

    That constant is found among those that minimize common losses (the labels' mean and median, the shares of classes
    and their logarithms), and from there by Powell's method, on at most 500 samples.
    """
    width = outputs.shape[1]
    candidates = [outputs.mean(axis=0)]
    labels = y
    if y.shape[1] != width and (y == np.floor(y)).all() and y.min() >= 0 and y.max() < width:
        labels = np.eye(width)[y[:, 0].astype(int)]
    if labels.shape[1] == width:
        mean = labels.mean(axis=0)
        candidates += [mean, np.median(labels, axis=0)]
        if labels.min() >= 0 and labels.max() <= 1:
            share = np.clip(mean, 1e-6, 1 - 1e-6)
            candidates += [np.log(share), special.logit(share)]
    few = np.linspace(0, len(y) - 1, min(len(y), _FOR_CONSTANT)).astype(int)

    def mean_loss(constant, chosen=few):
        try:
            return loss_values(loss, y[chosen], np.broadcast_to(constant, (len(chosen), width))).mean()
        except ValueError:  # of an output that the loss does not take
            return np.inf

    best = min(candidates, key=mean_loss)
    if width <= _SEARCHED:
        with np.errstate(invalid="ignore"):
            found = optimize.minimize(mean_loss, best, method="Powell", options={"maxfev": 60, "ftol": 1e-5})
        candidates.append(np.reshape(found.x, width))
    everyone = np.arange(len(y))
    best = min(candidates, key=lambda constant: mean_loss(constant, everyone))
    return loss_values(loss, y, np.broadcast_to(best, outputs.shape))
