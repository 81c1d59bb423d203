"""Whether attention matters: a model's outputs when it attends to something else."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import xarray as xr
from keras import ops
from scipy import special

from kerasfactory import _backend
from kerasfactory._arguments import checked_level, generator, positive_integer
from kerasfactory.explain._capture import capture
from kerasfactory.explain._engine.data import batch_size_of, batches_of, progress_bar, sampled
from kerasfactory.explain._engine.edit import Editor, editor
from kerasfactory.explain._engine.outputs import checked_outputs, checked_target, output_change, predictions
from kerasfactory.explain._engine.statistics import bootstrap_interval, sign_tests

_SAMPLES = 256
_HIDDEN = -1e9  # the logit of a key out of view

_RATE, _NOISE = 0.3, 0.5  # of the adversary's ascents, which need not converge: the best run on the way counts


def attention_controls(
    model: keras.Model,
    x: Any,
    *,
    target: int | None = None,
    layers: str | Sequence[str] | None = None,
    draws: int = 5,
    steps: int = 30,
    tolerance: float = 0.02,
    level: float = 0.05,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    seed: int = 0,
) -> xr.Dataset:
    r"""How much of a model's output depends on where its attention is.

    The model runs with other scores than its own, in all layers at once:

    - `uniform`: each query gives the same weight to all keys in its view.
    - `permuted`: the weights of each query are shuffled among the keys in its view, `draws` times; the median counts.
    - `adversarial`: scores as far as possible from the model's own while the output changes by at most `tolerance`
      (Jain & Wallace 2019, [*Attention is not Explanation*](https://arxiv.org/abs/1902.10186), section 4.2.2). They are
      found by `steps` steps of gradient ascent on logits, once from near the model's own scores and once from far away.
      If none are found, this does not prove that there are none.

    A query without a key in view keeps what the layer gives it: with Keras' fused attention, the mean of all values.

    If uniform attention leaves the output as it is, attention does not decide the output, whatever the map looks like.
    That other scores give the same output is weaker evidence. The adversary may find scores that the model could not
    have learned to produce (Wiegreffe & Pinter 2019, [*Attention is not not
    Explanation*](https://arxiv.org/abs/1908.04626)), and it may change freely the queries that the model does not read.
    Compare its distance with that of `permuted`: scores of the same shape that know nothing.

    With the scores \(A\) of the model and others \(B\), over \(R\) rows, the queries of all heads and layers that
    attend to any key, the distance is the mean Jensen–Shannon divergence to the base 2, from 0 to 1,

    $$
    \operatorname{jsd} = \frac{1}{R} \sum_{i=1}^{R} \left( \tfrac{1}{2} \sum_j A_{ij} \log_2 \frac{A_{ij}}{M_{ij}}
    + \tfrac{1}{2} \sum_j B_{ij} \log_2 \frac{B_{ij}}{M_{ij}} \right), \qquad M = \tfrac{1}{2} (A + B) .
    $$

    The change of an output is, for probabilities, the total variation distance \(\tfrac{1}{2} \sum_c |p_c - q_c|\),
    from 0 to 1 (the absolute difference for a single one, or for a `target`). For other outputs it is the largest
    absolute difference, each in standard deviations of that output over the samples.

    Args:
        model: A `keras.Model`, as for `capture`, with one output of shape (sample,) or (sample, output).
        x: Arrays, as `model.predict` takes them, of at least 2 samples. Up to 256 are used, drawn at random.
        target: The number of the output whose change counts; all of them if not given.
        layers: Names of the layers, as for `capture`. The others keep their scores.
        draws: How often permuted weights are drawn for each sample.
        steps: How many steps each ascent has.
        tolerance: The largest change of the output that counts as none; above 0.
        level: The error level: the intervals cover \(1 - \text{level}\). Between 0 and 0.5.
        batch_size: Samples in a batch; as many as make 16,384 positions, at most 1,024, if not given.
        verbose: As for `capture`.
        seed: The seed of all that is drawn: samples, permutations, starts of the ascents and the bootstrap.

    Returns:
        xr.Dataset: Over `control` (`uniform`, `permuted`, `adversarial`), with these variables.

        - `change`, `jsd` (control, sample): as above. For the adversary, `change` is at most `tolerance`, and `jsd` is
          how far it got. Where masks are in force, the keys in view are those with a weight above 0.
        - `median_change` (control), and its `interval` (control, bound: `lower`, `upper`), a percentile bootstrap over
          the samples.
        - `p_value` (control): of the exact sign test that the median change is above the `tolerance`; and `p_opposite`,
          that it is not. They say nothing of the adversary, which keeps to it.

        The coordinate `sample` says which samples were used. The attributes are `layers`, `target`, `change` (its
        unit: `"total variation"` or `"relative to the standard deviation"`), `tolerance`, `draws`, `steps`, `level` and
        `seed`.

    Raises:
        ValueError: As `capture`; if `x` is no array or has fewer than 2 samples; if an argument is out of range; if the
            model has other outputs, they are NaN, the same for all samples, or not made of its scores; if scores
            cannot be told apart by sample, query and key.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        keras.utils.set_random_seed(0)
        inputs = keras.Input((6, 8))
        attended = keras.layers.MultiHeadAttention(num_heads=1, key_dim=8, name="attention")(inputs, inputs)
        pooled = keras.layers.GlobalAveragePooling1D()
        uses = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))
        hardly = keras.Model(inputs, keras.layers.Dense(1)(pooled(inputs) + 0.001 * pooled(attended)))

        x = np.random.default_rng(0).normal(size=(60, 6, 8))
        results = [explain.attention_controls(model, x, steps=5, verbose=0) for model in (uses, hardly)]
        print([result["median_change"].sel(control="uniform").item() > 0.02 for result in results])
        #> [True, False]
        ```
    """
    draws, steps = positive_integer("draws", draws), positive_integer("steps", steps)
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be above 0. Received: tolerance={tolerance!r}")
    checked_level(level)
    rng = generator(seed, "attention_controls")
    chosen, x = sampled(x, _SAMPLES, rng)
    if len(chosen) < 2:
        raise ValueError(f"`x` must hold at least 2 samples: one has no spread. Received: {len(chosen)}")
    batch_size = positive_integer("batch_size", batch_size_of(x, 1024) if batch_size is None else batch_size)
    outputs = checked_outputs(predictions(model, x, batch_size), "`x`")
    columns = list(range(outputs.shape[1])) if target is None else [checked_target(target, outputs.shape[1])]
    distance, unit = output_change(outputs, columns)

    def change(new_outputs, own_outputs):
        flat = ops.reshape(ops.cast(new_outputs, "float32"), (-1, outputs.shape[1]))
        return distance(ops.take(flat, columns, axis=1), own_outputs)

    def penalty(new_outputs, weights_and_own_outputs):
        weights, own_outputs = weights_and_own_outputs
        return ops.sum(weights * ops.maximum(change(new_outputs, own_outputs) - tolerance, 0))

    captured = _captured(model, x, layers, batch_size)
    batches, expected = batches_of(x, batch_size)
    progress = progress_bar(expected, verbose)
    edit = editor(model, next(batches_of(x, batch_size)[0]), layers)  # one for all batches: it keeps what it compiles
    results = []
    for number, inputs in enumerate(batches):
        rows = slice(number * batch_size, (number + 1) * batch_size)
        own = {name: scores.values[rows].astype("float32") for name, scores in captured.items()}
        # Without a mask all keys are in view, also those whose weight underflows to 0.
        visible = {name: (weights > 0) | (captured[name].attrs["masks"] == "none") for name, weights in own.items()}
        own_outputs = ops.convert_to_tensor(outputs[rows, columns], "float32")
        batch = _Batch(edit, inputs, own, visible, own_outputs, change, penalty)
        results.append(batch.controls(draws, tolerance, steps, rng))
        progress.add(1)

    changes, distances = np.moveaxis(np.concatenate(results, axis=-1), 1, 0)
    p_values, p_opposites = np.transpose([sign_tests(row, tolerance) for row in changes])
    return xr.Dataset(
        {
            "change": (("control", "sample"), changes),
            "jsd": (("control", "sample"), distances),
            "median_change": ("control", np.median(changes, axis=1)),
            "interval": (("control", "bound"), [bootstrap_interval(row, np.median, level, seed) for row in changes]),
            "p_value": ("control", p_values),
            "p_opposite": ("control", p_opposites),
        },
        {"control": ["uniform", "permuted", "adversarial"], "sample": chosen, "bound": ["lower", "upper"]},
        {"layers": ", ".join(captured), "target": "all outputs" if target is None else target, "change": unit}
        | {"tolerance": tolerance, "draws": draws, "steps": steps, "level": level, "seed": seed},
    )


def _captured(model: Any, x: Any, layers: Any, batch_size: int | None) -> dict[str, xr.DataArray]:
    captured = capture(model, x, layers=layers, batch_size=batch_size, verbose=0)
    for name, scores in captured.items():
        if scores.dims[0] != "sample" or scores.dims[-2:] != ("query", "key"):
            raise ValueError(
                f"The scores of layer {name!r} have the axes {scores.dims}: they cannot be told apart by sample, "
                "query and key. Leave it out with `layers=[...]`."
            )
    return captured


class _Batch(NamedTuple):
    """A batch, to be run with other scores than its own. A run gives how far outputs and scores change, (2, sample)."""

    edit: Editor
    inputs: tuple
    own: dict[str, np.ndarray]  # scores (sample, head, query, key) of each layer
    visible: dict[str, np.ndarray]  # whether a query may attend to a key, in the same shapes
    own_outputs: Any  # a tensor (sample, column)
    change: Callable  # of outputs and `own_outputs`: (sample,)
    penalty: Callable  # of outputs, and weights (sample,) with `own_outputs`: what the adversary pays for changes

    def run(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        return self.compared(self.edit.predict(self.inputs, _replaced, scores), scores)

    def compared(self, outputs: Any, scores: dict[str, np.ndarray]) -> np.ndarray:
        return np.stack([_backend.as_numpy(self.change(outputs, self.own_outputs)), _distance(self.own, scores)])

    def controls(self, draws: int, tolerance: float, steps: int, rng: np.random.Generator) -> np.ndarray:
        """The runs with uniform, permuted and adversarial scores: (control, 2, sample)."""
        uniform = self.run({name: _uniform(visible) for name, visible in self.visible.items()})
        permuted = [
            self.run({name: _permuted(scores, self.visible[name], rng) for name, scores in self.own.items()})
            for _ in range(draws)
        ]
        # An ascent starts near the model's own scores, where the output is right but the divergence has no slope, or
        # far away from them.
        starts: list[dict[str, np.ndarray]] = []
        for sign, least in ((1, 1e-6), (-1, 1e-2)):
            starts.append({})
            for name, visible in self.visible.items():
                logits = sign * np.log(np.maximum(self.own[name], least)) + _NOISE * rng.normal(size=visible.shape)
                starts[-1][name] = np.where(visible, logits, _HIDDEN)
        adversarial = np.zeros_like(uniform)
        for run in [uniform, *permuted, *(run for start in starts for run in self._ascent(start, tolerance, steps))]:
            better = (run[0] <= tolerance) & (run[1] > adversarial[1])
            adversarial[:, better] = run[:, better]
        return np.stack([uniform, np.median(permuted, axis=0), adversarial])

    def _ascent(self, logits: dict[str, np.ndarray], tolerance: float, steps: int) -> Iterator[np.ndarray]:
        """The runs on a gradient ascent from these logits to larger distances, changes of the output penalized."""
        moments = {name: (np.zeros_like(values), np.zeros_like(values)) for name, values in logits.items()}
        penalty_weights = np.full(len(self.own_outputs), 10.0)
        rows = _attending_rows(self.own)  # over which the distance is a mean
        for step in range(1, steps + 1):
            scores = {}
            for name, values in logits.items():
                attends = self.visible[name].any(axis=-1, keepdims=True)
                scores[name] = (special.softmax(values, axis=-1) * attends).astype("float32")
            more = penalty_weights.astype("float32"), self.own_outputs
            gradients, outputs, _ = self.edit.gradient(self.inputs, _replaced, scores, self.penalty, more)
            result = self.compared(outputs, scores)
            yield result
            penalty_weights *= np.where(result[0] > tolerance, 1.3, 0.9)
            for name, weights in scores.items():
                middle = (self.own[name] + weights) / 2
                divergence_slope = np.log2(np.maximum(weights, 1e-12) / np.maximum(middle, 1e-12)) / 2
                divergence_slope = divergence_slope / rows.reshape(-1, *[1] * (weights.ndim - 1))
                slope = _backend.as_numpy(gradients[name]) - divergence_slope
                slope = weights * (slope - (weights * slope).sum(axis=-1, keepdims=True))  # by the logits
                mean, square = moments[name]  # Adam's (Kingma & Ba 2015)
                mean += 0.1 * (slope - mean)
                square += 0.01 * (slope**2 - square)
                logits[name] -= _RATE * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-9)


def _replaced(name: str, scores: Any, given: Any) -> Any:
    # A query without a key in view has no other scores than its own.
    return ops.where(ops.any(given[name] != 0, axis=-1, keepdims=True), given[name], ops.cast(scores, "float32"))


def _uniform(visible: np.ndarray) -> np.ndarray:
    return visible.astype("float32") / np.maximum(visible.sum(axis=-1, keepdims=True, dtype="float32"), 1)


def _permuted(scores: np.ndarray, visible: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The weights of each row, shuffled among the keys in its view."""
    places = np.arange(scores.shape[-1])
    order = np.argsort(np.where(visible, rng.random(scores.shape), 2), axis=-1)
    in_view_first = np.argsort(np.where(visible, places, places + len(places)), axis=-1)
    result = np.empty_like(scores)
    np.put_along_axis(result, in_view_first, np.take_along_axis(scores, order, axis=-1), axis=-1)
    return result


def _attending_rows(scores: dict[str, np.ndarray]) -> np.ndarray:
    """How many queries, of all heads and layers, attend to any key: (sample,)."""
    return sum((weights > 0).any(axis=-1).reshape(len(weights), -1).sum(axis=1) for weights in scores.values())


def _distance(own: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> np.ndarray:
    """The mean Jensen–Shannon divergence to the base 2: (sample,)."""
    total = 0.0
    for name, scores in own.items():
        middle = (scores + other[name]) / 2
        terms = special.rel_entr(scores, middle) + special.rel_entr(other[name], middle)
        total = total + terms.reshape(len(scores), -1).sum(axis=1, dtype="float64") / (2 * np.log(2))
    return total / _attending_rows(own)
