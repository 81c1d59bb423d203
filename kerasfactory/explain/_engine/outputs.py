"""The outputs of a model as numbers, a row for each sample, and the checks that go with them."""

import itertools
import weakref
from typing import Any

import keras
import numpy as np
from keras import tree

from kerasfactory import _backend
from kerasfactory.explain._engine.data import batch_size_of, batches_of, size_of
from kerasfactory.explain._engine.observe import build_model, compile_options, kept, state_of, unchanged


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
