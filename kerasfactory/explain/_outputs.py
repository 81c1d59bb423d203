"""The outputs of a model as numbers, a row for each sample, and the checks that go with them."""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from scipy import stats

from kerasfactory import _backend
from kerasfactory.explain._observe import (
    _KEPT,
    _batches,
    _build,
    _fingerprint,
    _same,
    _size,
    _state,
    _unchanged,
    batch_size_of,
)

_RESAMPLES = 2000


def predictions(model: Any, x: Any, batch_size: int | None = None) -> np.ndarray:
    """What `model.predict` returns for `x`, as float64 (sample, output); the model stays as it was.

    It is compiled once, for as long as the model lives and no attribute of its layers is set. Random numbers in the
    model are the same in each call.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}")
    batches, _ = _batches(x, batch_size_of(x, 1024) if batch_size is None else batch_size)
    first = next(batches, None)
    if first is None or _size(first) == 0:
        raise ValueError("`x` is empty: it must hold at least one sample.")
    _build(model, first)
    kept, traced_of = _KEPT.setdefault(model, {}), _fingerprint({}, model)
    if predictions not in kept or not _same(kept[predictions][0], traced_of):
        its_model = weakref.ref(model)

        def step(state, data):
            model = its_model()
            with _unchanged(model):
                return _backend.predict_step(model, state, data)

        with _unchanged(model):
            how = {"run_eagerly": model.run_eagerly, "jit_compile": model.jit_compile}
        kept[predictions] = (traced_of, _backend.compiled(step, **how))
    run, state, parts = kept[predictions][1], _state(model), []
    for data in itertools.chain([first], batches):
        outputs, state = run(state, data)
        arrays = [_backend.as_numpy(output) for output in tree.flatten(outputs)]
        if len(arrays) != 1 or arrays[0].ndim not in (1, 2) or len(arrays[0]) != _size(data):
            raise ValueError(
                "The model must have one output, of shape (sample,) or (sample, output). Make a model of the part "
                "that you ask about, as with `keras.Model(model.input, model.output[:, 0])`. Received outputs of "
                f"shapes: {[array.shape for array in arrays]}"
            )
        parts.append(arrays[0].reshape(len(arrays[0]), -1).astype("float64"))
    return np.concatenate(parts)


def _some(samples: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    """The numbers of all samples, or of some."""
    return np.arange(samples) if samples <= limit else np.sort(rng.choice(samples, limit, replace=False))


def _sampled(x: Any, limit: int, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
    """The numbers of all samples of the arrays `x`, or of some, and these samples."""
    if not isinstance(x, dict | list | tuple) and not hasattr(x, "__array__"):
        raise ValueError(
            f"`x` must be an array, or a dictionary or list of arrays. Received: x of type {type(x).__name__}"
        )
    chosen = _some(len(tree.flatten(x)[0]), limit, rng)
    return chosen, tree.map_structure(lambda array: np.asarray(array)[chosen], x)


def _interval(values: np.ndarray, statistic: Callable, level: float, seed: int) -> np.ndarray:
    if len(values) < 2 or np.isnan(values).any():
        return np.full(2, np.nan)
    result = stats.bootstrap(
        (values,),
        statistic,
        n_resamples=_RESAMPLES,
        batch=100,
        confidence_level=1 - level,
        method="percentile",
        rng=seed,
    )
    return np.array(result.confidence_interval)


def _table(name: str, given: Any) -> np.ndarray:
    if not hasattr(given, "__array__") and not ops.is_tensor(given):
        raise ValueError(
            f"`{name}` must be an array with the features along axis 1. Received: {name} of type {type(given).__name__}"
        )
    array = _backend.as_numpy(given) if ops.is_tensor(given) else np.asarray(given)
    if array.ndim < 2 or 0 in array.shape or array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{name}` must be an array of numbers with the features along axis 1. Received: shape {array.shape}, "
            f"dtype {array.dtype}"
        )
    return array


def _without_nan(values: np.ndarray, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} is NaN or infinite in {len(bad)} of {len(values)} samples, the first of them number {bad[0]}. "
            "Leave them out, or find out why."
        )


def _finite(outputs: np.ndarray, name: str) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(bad):
        raise ValueError(
            f"The model's output is NaN or infinite for {len(bad)} of {len(outputs)} rows of {name}. Look for NaN in "
            "`x` and in `background`, and for values that the model does not know, as the mean of categories."
        )
    return outputs


def _checked_target(target: Any, outputs: int) -> int:
    if isinstance(target, bool) or not isinstance(target, int | np.integer) or not 0 <= target < outputs:
        raise ValueError(
            f"`target` must be the number of an output, from 0 to {outputs - 1}. Received: target={target!r}"
        )
    return int(target)


def _sign_tests(values: np.ndarray, threshold: float) -> tuple[float, float]:
    """The exact p-values of the median being above the threshold, and of its not being so."""
    above = int((values > threshold).sum())
    greater, less = (stats.binomtest(above, len(values), alternative=side).pvalue for side in ("greater", "less"))
    return float(greater), float(less)


def _checked_level(level: float) -> None:
    if not 0 < level < 0.5:
        raise ValueError(f"`level` must be a number between 0 and 0.5. Received: level={level!r}")
