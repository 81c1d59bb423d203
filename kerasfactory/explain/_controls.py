"""Whether attention matters: a model's outputs when it attends to something else."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import xarray as xr
from keras import ops
from scipy import special

from kerasfactory import _backend
from kerasfactory._arguments import checked_level, generator, positive_integer
from kerasfactory.explain._capture import capture
from kerasfactory.explain._engine.data import batch_size_of, batches_of, progress_bar, sampled, size_of
from kerasfactory.explain._engine.edit import Editor, editor
from kerasfactory.explain._engine.outputs import checked_outputs, checked_target, predictions
from kerasfactory.explain._engine.statistics import bootstrap_interval, sign_tests

_SAMPLES = 256
_HIDDEN = -1e9  # the logit of a key out of view

# Of the adversary's ascent, which keeps the best that it passes: it need not converge.
_RATE, _NOISE = 0.3, 0.5


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

    - `uniform`: each query looks at all keys in its view alike.
    - `permuted`: its weights are dealt out at random to the keys in its view, `draws` times; the median counts.
    - `adversarial`: scores as far as possible from the model's own while the output changes by at most `tolerance`
      (Jain & Wallace 2019, [*Attention is not Explanation*](https://arxiv.org/abs/1902.10186), section 4.2.2), found by
      `steps` steps of gradient ascent on logits, once from near the model's own scores and once from far away. That
      none are found does not prove that there are none.

    If uniform attention leaves the output as it is, attention is not what decides, whatever it looks like. That other
    scores make the same output is weaker evidence: the adversary may alter what the model could not have learned to
    produce (Wiegreffe & Pinter 2019, [*Attention is not not Explanation*](https://arxiv.org/abs/1908.04626)), and
    queries that nothing is read from are free. Set its distance beside that of `permuted`, scores of the same shape
    that know nothing.

    With the scores \(A\) of the model and others \(B\), over \(R\) rows, the queries of all heads and layers that
    look at any key, the distance is the mean Jensen–Shannon divergence to the base 2, from 0 to 1,

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
        draws: Of permuted weights, for each sample.
        tolerance: The change that is none; above 0.
        steps: Of each ascent.
        level: The intervals cover \(1 - \text{level}\); between 0 and 0.5.
        batch_size: Samples in a batch; as many as make 16,384 positions, at most 1,024, if not given.
        verbose: As for `capture`.
        seed: Of all that is drawn.

    Returns:
        xr.Dataset: Over `control` (`uniform`, `permuted`, `adversarial`), with these variables.

        - `change`, `jsd` (control, sample): as above. For the adversary, `change` is at most `tolerance`, and `jsd` is
          how far it got. Where masks are in force, the keys in view are those with a weight above 0.
        - `median_change` (control), and its `interval` (control, bound: `lower`, `upper`), a percentile bootstrap over
          the samples.
        - `p_value` (control): of the exact sign test that the median change is above the `tolerance`; and `p_opposite`,
          that it is not. They say nothing of the adversary, which keeps to it.

        The coordinate `sample` says which samples were used. The attributes say `layers`, `target`, `change` (its
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
    batch_size = batch_size_of(x, 1024) if batch_size is None else batch_size

    outputs = checked_outputs(predictions(model, x, batch_size), "`x`")
    columns = list(range(outputs.shape[1])) if target is None else [checked_target(target, outputs.shape[1])]
    distance, said_of_change = _change_of(outputs, columns)

    def change(outputs_of_batch, own):
        flat = ops.reshape(ops.cast(outputs_of_batch, "float32"), (-1, outputs.shape[1]))
        return distance(ops.take(flat, columns, axis=1), own)

    def penalty(outputs_of_batch, more):
        weights, own = more
        return ops.sum(weights * ops.maximum(change(outputs_of_batch, own) - tolerance, 0))

    captured = capture(model, x, layers=layers, batch_size=batch_size, verbose=0)
    for name, scores in captured.items():
        if scores.dims[0] != "sample" or scores.dims[-2:] != ("query", "key"):
            raise ValueError(
                f"The scores of layer {name!r} have the axes {scores.dims}: they cannot be told apart by sample, "
                "query and key. Leave it out with `layers=[...]`."
            )

    batches, expected = batches_of(x, batch_size)
    progress = progress_bar(expected, verbose)
    edit: Editor | None = None
    of_batches, start = [], 0
    for number, batch in enumerate(batches, start=1):
        edit = edit or editor(model, batch, layers)
        stop = start + size_of(batch)
        own = {name: scores.values[start:stop].astype("float32") for name, scores in captured.items()}
        # A weight may be 0 without a mask, by underflow.
        view = {name: (of > 0) | (captured[name].attrs["masks"] == "none") for name, of in own.items()}
        run = _Run(edit, batch, own, view, outputs[start:stop, columns], change, penalty)
        uniform = run({name: _uniform(view[name]) for name in own})
        permuted = np.stack(
            [run({name: _permuted(scores, view[name], rng) for name, scores in own.items()}) for _ in range(draws)]
        )
        adversarial = run.adversary([uniform, *permuted], tolerance, steps, rng)
        of_batches.append(np.stack([uniform, np.median(permuted, axis=0), adversarial]))
        start = stop
        progress.update(number)

    changes, distances = np.moveaxis(np.concatenate(of_batches, axis=-1), 1, 0)
    p_values, p_opposites = np.transpose([sign_tests(row, tolerance) for row in changes])
    dims = ("control", "sample")
    return xr.Dataset(
        {
            "change": (dims, changes),
            "jsd": (dims, distances),
            "median_change": ("control", np.median(changes, axis=1)),
            "interval": (("control", "bound"), [bootstrap_interval(row, np.median, level, seed) for row in changes]),
            "p_value": ("control", p_values),
            "p_opposite": ("control", p_opposites),
        },
        {"control": ["uniform", "permuted", "adversarial"], "sample": chosen, "bound": ["lower", "upper"]},
        {
            "layers": ", ".join(captured),
            "target": "all outputs" if target is None else target,
            "change": said_of_change,
            "tolerance": tolerance,
            "draws": draws,
            "steps": steps,
            "level": level,
            "seed": seed,
        },
    )


class _Run:
    """Runs a batch with other scores than its own, and tells how far outputs and scores then are: (2, sample)."""

    def __init__(
        self,
        edit: Editor,
        batch: tuple,
        own: dict[str, np.ndarray],
        view: dict[str, np.ndarray],
        outputs: np.ndarray,
        change: Callable,
        penalty: Callable,
    ):
        self.edit, self.batch, self.own, self.view, self.penalty = edit, batch, own, view, penalty
        self.outputs = ops.convert_to_tensor(outputs, "float32")
        self.change = lambda outputs: change(outputs, self.outputs)

    def __call__(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        outputs = self.edit.predict(self.batch, _replaced, scores)
        return np.stack([_backend.as_numpy(self.change(outputs)), _distance(self.own, scores)])

    def adversary(self, known: list[np.ndarray], tolerance: float, steps: int, rng: np.random.Generator) -> np.ndarray:
        """Of the most distant scores that keep the output, among those `known` and on a way of ascent."""
        best = np.zeros((2, len(self.outputs)))

        def keep(result):
            better = (result[0] <= tolerance) & (result[1] > best[1])
            best[:, better] = result[:, better]

        for result in known:
            keep(result)
        # From near its own scores, where the output is right but the divergence has no slope; and from far away.
        for sign, least in ((1, 1e-6), (-1, 1e-2)):
            logits = {}
            for name, view in self.view.items():
                start = sign * np.log(np.maximum(self.own[name], least)) + _NOISE * rng.normal(size=view.shape)
                logits[name] = np.where(view, start, _HIDDEN)
            self._ascend(logits, tolerance, steps, keep)
        return best

    def _ascend(self, logits: dict[str, np.ndarray], tolerance: float, steps: int, keep: Callable) -> None:
        moments = {name: (np.zeros_like(of), np.zeros_like(of)) for name, of in logits.items()}
        pressure = np.full(len(self.outputs), 10.0)
        rows = _looking_rows(self.own)
        for step in range(1, steps + 1):
            scores = {
                name: (special.softmax(of, axis=-1) * self.view[name].any(axis=-1, keepdims=True)).astype("float32")
                for name, of in logits.items()
            }
            more = pressure.astype("float32"), self.outputs
            gradients, outputs, _ = self.edit.gradient(self.batch, _replaced, scores, self.penalty, more)
            change = _backend.as_numpy(self.change(outputs))
            keep(np.stack([change, _distance(self.own, scores)]))
            pressure *= np.where(change > tolerance, 1.3, 0.9)
            for name, of in scores.items():
                middle = (self.own[name] + of) / 2
                of_divergence = np.log2(np.maximum(of, 1e-12) / np.maximum(middle, 1e-12)) / 2
                slope = _backend.as_numpy(gradients[name]) - of_divergence / rows.reshape(-1, *[1] * (of.ndim - 1))
                slope = of * (slope - (of * slope).sum(axis=-1, keepdims=True))
                mean, square = moments[name]  # Adam's (Kingma & Ba 2015)
                mean += 0.1 * (slope - mean)
                square += 0.01 * (slope**2 - square)
                logits[name] -= _RATE * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-9)


def _change_of(outputs: np.ndarray, columns: list[int]) -> tuple[Callable, str]:
    """A function of two outputs (sample, column) that says how far they lie apart."""
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


def _replaced(name: str, scores: Any, given: Any) -> Any:
    return given[name]


def _uniform(view: np.ndarray) -> np.ndarray:
    return view.astype("float32") / np.maximum(view.sum(axis=-1, keepdims=True, dtype="float32"), 1)


def _permuted(scores: np.ndarray, view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The weights of each row, dealt out anew to the keys in its view."""
    places = np.arange(scores.shape[-1])
    order = np.argsort(np.where(view, rng.random(scores.shape), 2), axis=-1)
    in_view_first = np.argsort(np.where(view, places, places + len(places)), axis=-1)
    result = np.empty_like(scores)
    np.put_along_axis(result, in_view_first, np.take_along_axis(scores, order, axis=-1), axis=-1)
    return result


def _looking_rows(scores: dict[str, np.ndarray]) -> np.ndarray:
    """How many queries, of all heads and layers, look at any key: (sample,)."""
    return sum((of > 0).any(axis=-1).reshape(len(of), -1).sum(axis=1) for of in scores.values())


def _distance(own: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> np.ndarray:
    """The mean Jensen–Shannon divergence to the base 2: (sample,)."""
    total = 0.0
    for name, scores in own.items():
        middle = (scores + other[name]) / 2
        terms = special.rel_entr(scores, middle) + special.rel_entr(other[name], middle)
        total = total + terms.reshape(len(scores), -1).sum(axis=1, dtype="float64") / (2 * np.log(2))
    return total / _looking_rows(own)
