"""Whether attention matters: a model's outputs when it attends to something else."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import xarray as xr
from keras import ops, tree
from scipy import special, stats

from kerasfactory import _backend
from kerasfactory._arguments import checked_level, generator, positive_integer
from kerasfactory.explain._capture import capture
from kerasfactory.explain._engine.data import (
    batch_size_of,
    batches_of,
    chosen_samples,
    progress_bar,
    sampled,
)
from kerasfactory.explain._engine.edit import Editor, editor
from kerasfactory.explain._engine.labels import with_rows_of
from kerasfactory.explain._engine.observe import rounding_of
from kerasfactory.explain._engine.outputs import (
    NoSpreadError,
    Outputs,
    check_labels,
    describe_target,
    loss_name,
    loss_of,
    loss_values,
    matrix,
    on_linear_scale,
    output_at,
    outputs_of,
    resolve_loss,
    spread_of,
)
from kerasfactory.explain._engine.statistics import clusters_of, mean_interval
from kerasfactory.explain._engine.tables import check_aligned, check_table, in_arrays

_SAMPLES = 1024
_ADVERSARIAL_SAMPLES = 256  # the adversary takes some 60 runs and gradients for each, the other controls one a draw
_SHARE = 0.02  # of the rows: if the output changes in fewer, attention is not said to matter
_HIDDEN = -1e9  # the logit of a key out of view

_RATE, _NOISE = 0.3, 0.5  # of the adversary's ascents, which need not converge: the best run on the way counts


def attention_controls(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    task: str | None = None,
    target: int | str | tuple[int | str, ...] | None = None,
    layers: str | Sequence[str] | None = None,
    groups: Any = None,
    block: int | None = None,
    draws: int = 5,
    steps: int = 30,
    tolerance: float = 0.02,
    level: float = 0.05,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    seed: int = 0,
) -> xr.Dataset:
    r"""Measures how much a model's output depends on where it attends.

    The model runs with other scores than its own, in all layers at once:

    - `uniform`: each query gives the same weight to all keys in its view.
    - `permuted`: the weights of each query are shuffled among the keys in its view, `draws` times. The median over
      these counts.
    - `adversarial`: scores as far as possible from the model's own while the output changes by at most `tolerance`
      (Jain & Wallace 2019, [*Attention is not Explanation*](https://arxiv.org/abs/1902.10186), section 4.2.2). They are
      found by `steps` steps of gradient ascent on logits, once from near the model's own scores and once from far away.
      If none are found, this does not prove that there are none.

    A query without a key in view keeps what the layer gives it: with Keras' fused attention, the mean of all values. An
    attention sink keeps its part of the weight, and the scores of a row sum to the rest.

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

    The change of a row's output is relative to how much the outputs \(f_c\) vary over the samples \(s\),

    $$
    \operatorname{change}_s = \max_c \frac{|f_c(x_s; B) - f_c(x_s; A)|}{\sigma_c}, \qquad
    \sigma_c = \sqrt{\frac{\pi}{2}} \; \frac{1}{n} \sum_s |f_c(x_s; A) - \operatorname{median} f_c| .
    $$

    If the model predicts classes or labels, \(f\) are its logits, which are calculated from probabilities if necessary:
    a change from 0.01 to 0.02 is as large as one from 0.5 to 0.67. The logits of classes are centered, because adding a
    constant to all of them does not change a softmax. Otherwise \(f\) are the outputs themselves, and another unit or
    origin changes nothing. The spread \(\sigma_c\) is the standard deviation if the outputs are normal. Heavy tails
    increase it less than a standard deviation, and a rare class does not make it collapse, as it does quartiles.

    The tests are about the `share` of rows that change by more than `tolerance`, and not about the typical row, because
    attention may decide in a part of the rows. The smallest share that counts is 2%. To say that attention does *not*
    decide, look at `mean_change` as well. It is large if a few rows, such as those of a rare class, change a lot.

    Args:
        model: A `keras.Model`, as for `capture`. If it has a dictionary or list of several outputs, `target` says which
            is meant.
        x: Arrays, as `model.predict` takes them, of at least 2 samples. Up to 1,024 are used, drawn at random, and up
            to 256 of these for `adversarial`, which takes more runs.
        y: Labels, one for each sample, as the compiled loss takes them. With them, it is also tested whether uniform
            attention makes the loss larger.
        task: What the outputs mean: `"classification"` (one of several classes), `"multilabel"` or `"regression"`. The
            compiled loss says so if it is one of Keras and this is not given. It also says whether the outputs are
            probabilities or logits; else the activation of the last layer does, and if none is known, classes that sum
            to 1 are probabilities. If neither says anything, the outputs are numbers.
        target: The number of the output whose change counts; all of them if not given. For a dictionary or list of
            several outputs a key, or a tuple that starts with it; for outputs of more axes a tuple of numbers, such as
            (step, quantile).
        layers: Names of the layers, as for `capture`. The others keep their scores.
        groups: Labels of the samples, (sample,), such as the patients that they are from. Samples of one group count as
            one. Otherwise they are taken to be independent.
        block: The length of runs of a series, in samples, that count as one. Not with `groups`.
        draws: How often permuted weights are drawn for each sample.
        steps: How many steps each ascent has. 0 leaves the adversary out, which takes longer than all else.
        tolerance: The largest change of a row's output that counts as none, relative to the spread; above 0. Also the
            largest increase of the loss that counts as none, relative to the model's loss.
        level: The error level: the intervals cover \(1 - \text{level}\). Between 0 and 0.5.
        batch_size: Samples in a batch, as for `capture`. What is drawn does not depend on it.
        verbose: As for `capture`.
        seed: The seed of all that is drawn: samples, permutations, starts of the ascents and the bootstrap.

    Returns:
        xr.Dataset: Over `control` (`uniform`, `permuted`, and with `steps` `adversarial`), with these variables.

        - `change`, `jsd` (control, sample): as above. For the adversary, `change` is at most `tolerance`, and `jsd` is
          how far it got; NaN in the samples that it did not run on. Where masks are in force, the keys in view are
          those with a weight above 0.
        - `median_change`, `mean_change` (control), over the samples.
        - `share` (control) of the samples that change by more than `tolerance`, and its `interval` (control, bound:
          `lower`, `upper`), that of Clopper & Pearson (1934). With `groups` or `block` it is that of
          \(n^2 / \sum n_g^2\) samples: as many as there are groups, if they are of one size (as Korn & Graubard 1998,
          Survey Methodology 24:193–201, for groups of copies).
        - `p_value` (control): of the exact binomial test that the share is above 2%; and `p_opposite`, that it is
          below. They say nothing about the adversary, which stays within the tolerance.
        - With `y`: `loss_increase`, the mean of the loss with uniform attention minus that with the model's own, which
          is taken to be 0 in samples that change by at most `tolerance`; its `mean_interval` (bound), a studentized
          bootstrap over samples or groups; `p_value_loss`, that it is above 0; and `p_opposite_loss`, that it is below
          `tolerance` times the model's loss. The latter is at least \(0.98^n\): \(n\) samples or groups do not show
          what 2% of them do.

        The coordinate `sample` says which samples were used. The attributes are `layers`, `task` (or `"unknown"`),
        `target`, `change` (its unit: `"relative to the spread of the logits"` or `"… of the output"`), `tolerance`,
        `smallest_share`, `draws`, `steps`, `level` and `seed`; with `y` also the name of the `loss` and its mean,
        `loss_value`.

    Raises:
        ValueError: As `capture`; if `x` is not an array or has fewer than 2 samples; if an argument is out of range; if
            the outputs are NaN, the same for all samples, or not made of the model's scores; if there are several and
            no `target` says which; if it is not clear which axes of the scores are sample, query and key; if there are
            labels and no loss that takes them.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        keras.utils.set_random_seed(0)
        inputs = keras.Input((6, 8))
        attention = keras.layers.MultiHeadAttention(num_heads=1, key_dim=8, name="attention")
        attended = attention(inputs, inputs)
        pooled = keras.layers.GlobalAveragePooling1D()
        uses = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))
        mixed = pooled(inputs) + 0.001 * pooled(attended)
        hardly = keras.Model(inputs, keras.layers.Dense(1)(mixed))

        x = np.random.default_rng(0).normal(size=(60, 6, 8))
        results = [
            explain.attention_controls(model, x, steps=5, verbose=0) for model in (uses, hardly)
        ]
        print([result["share"].sel(control="uniform").item() for result in results])
        #> [1.0, 0.0]
        ```
    """
    draws = positive_integer("draws", draws)
    steps = 0 if steps == 0 else positive_integer("steps", steps)
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be above 0. Received: tolerance={tolerance!r}")
    checked_level(level)
    check_table(model, x)
    check_aligned(x=x, y=y, groups=groups)
    rng = generator(seed, "attention_controls")
    chosen, table = sampled(x, _SAMPLES, rng)
    sample = in_arrays(table)
    if len(chosen) < 2:
        raise ValueError(f"`x` must hold at least 2 samples: one has no spread. Received: {len(chosen)}")
    samples = len(tree.flatten(x)[0])
    clusters = np.unique(clusters_of(samples, groups, block)[chosen], return_inverse=True)[1]
    batch_size = positive_integer("batch_size", batch_size_of(sample) if batch_size is None else batch_size)
    found = outputs_of(model, sample, task=task, target=target, batch_size=batch_size)
    loss, labels = _loss_and_labels(model, found, y, samples)
    runs = _runs(model, sample, found, layers, tolerance, loss, None if labels is None else labels[chosen])

    with_adversary = chosen_samples(len(chosen), _ADVERSARIAL_SAMPLES if steps else 0, rng)
    streams = rng.spawn(len(chosen))  # one for each sample, so that it does not matter how they are put into batches
    parts = _parts(len(chosen), with_adversary, batch_size)
    progress = progress_bar(len(parts), verbose)
    results, losses = np.full((3, 2, len(chosen)), np.nan), np.full((2, len(chosen)), np.nan)
    for rows, adversary in parts:
        batch = runs.batch(rows, [streams[row] for row in rows])
        results[:, :, rows] = batch.controls(draws, tolerance, steps if adversary else 0)
        if loss is not None:
            losses[:, rows] = batch.losses()
        progress.add(1)

    controls = ["uniform", "permuted", "adversarial"][: 3 if steps else 2]
    changes, distances = np.moveaxis(results[: len(controls)], 1, 0)
    variables: dict[str, Any] = {
        "change": (("control", "sample"), changes),
        "jsd": (("control", "sample"), distances),
        "median_change": ("control", np.nanmedian(changes, axis=1)),
        "mean_change": ("control", np.nanmean(changes, axis=1)),
        **_share_tests(changes, tolerance, clusters, level),
    }
    attributes: dict[str, Any] = {"layers": ", ".join(runs.edit.shapes), "task": found.task or "unknown"}
    attributes |= {"target": "all outputs" if target is None else describe_target(target), "change": runs.unit}
    attributes |= {"tolerance": tolerance, "smallest_share": _SHARE, "draws": draws, "steps": steps}
    attributes |= {"level": level, "seed": seed}
    if loss is not None:
        variables |= _loss_tests(losses, changes[0], tolerance, clusters, level, rng)
        attributes |= {"loss": loss_name(loss), "loss_value": losses[0].mean().item()}
    coordinates = {"control": controls, "sample": chosen, "bound": ["lower", "upper"]}
    return with_rows_of(table, xr.Dataset(variables, coordinates, attributes))


def _parts(samples: int, with_adversary: np.ndarray, batch_size: int) -> list[tuple[np.ndarray, bool]]:
    """The samples in batches, and whether the adversary is run on a batch."""
    others = np.setdiff1d(np.arange(samples), with_adversary)
    return [
        (rows[start : start + batch_size], adversary)
        for rows, adversary in ((with_adversary, True), (others, False))
        for start in range(0, len(rows), batch_size)
    ]


def _share_tests(changes: np.ndarray, tolerance: float, clusters: np.ndarray, level: float) -> dict[str, Any]:
    """Of each control, the share of rows that change, its interval and its tests."""
    shares, intervals, above, below = [], [], [], []
    for row in changes:
        ran = ~np.isnan(row)
        share = np.mean(row[ran] > tolerance)
        # Rows of one cluster count as one: as if they were copies of each other.
        sizes = np.bincount(clusters[ran])
        size = ran.sum() ** 2 / (sizes**2).sum()
        count = share * size
        beta = stats.beta
        bounds = beta.ppf(level / 2, count, size - count + 1), beta.ppf(1 - level / 2, count + 1, size - count)
        shares.append(share)
        intervals.append(np.where(np.isnan(bounds), [0, 1], bounds))
        above.append(np.nan_to_num(beta.cdf(_SHARE, count, size - count + 1), nan=1))
        below.append(np.nan_to_num(beta.sf(_SHARE, count + 1, size - count), nan=1))
    return {
        "share": ("control", shares),
        "interval": (("control", "bound"), intervals),
        "p_value": ("control", above),
        "p_opposite": ("control", below),
    }


def _loss_tests(
    losses: np.ndarray,
    changes: np.ndarray,
    tolerance: float,
    clusters: np.ndarray,
    level: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """How much larger the loss is with uniform attention, from (own and with it, sample) and changes of the output."""
    # The loss of a model that fits its data is near 0, where rounding of the outputs would count.
    increase = np.where(changes > tolerance, losses[1] - losses[0], 0)
    most = max(tolerance * abs(losses[0].mean()), np.finfo("float32").tiny)
    bounds, below = mean_interval(increase, clusters, level, rng, most)
    _, above = mean_interval(-increase, clusters, level, rng)
    # What few rows decide, a resampling of rows without them cannot show.
    unseen = (1 - _SHARE) ** (len(clusters) ** 2 / (np.bincount(clusters) ** 2).sum())
    return {
        "loss_increase": increase.mean(),
        "mean_interval": ("bound", bounds),
        "p_value_loss": above.item(),
        "p_opposite_loss": max(below.item(), unseen),
    }


def _loss_and_labels(model: Any, found: Outputs, y: Any, samples: int) -> tuple[Any, np.ndarray | None]:
    """The compiled loss of the output that is asked about, and the labels that it takes, if there are any."""
    if y is None:
        return None, None
    if found.part.name is not None and isinstance(y, dict):
        y = y[found.part.name]
    elif found.part.name is not None and isinstance(y, list):
        y = y[found.part.number]
    flat = tree.flatten(y)
    labels = np.asarray(flat[0] if isinstance(y, dict) and len(flat) == 1 else y)
    if labels.ndim == 0 or len(labels) != samples or labels.dtype.kind not in "biuf" or not np.isfinite(labels).all():
        raise ValueError(
            f"`y` must hold finite numbers, one label for each of the {samples} samples of `x`. Received: shape "
            f"{labels.shape}, dtype {labels.dtype}"
        )
    loss = resolve_loss(model, loss_of(model, found.part))
    labels = labels.reshape(samples, -1) * 1 if labels.ndim == 1 else labels * 1
    if labels.ndim == 2 and not found.part.indices:
        check_labels(loss, labels, found.values)
    return loss, labels


class _Runs(NamedTuple):
    """What is the same for all batches."""

    model: Any
    layers: Any
    edit: Editor
    x: Any  # the samples
    meaning: Outputs  # without values, so that it has a hash
    rounding: float  # of outputs
    scale: Any  # a tensor (column,): the unit of a change
    own_scores: np.ndarray  # of the outputs, on a linear scale: (sample, column)
    unit: str  # of a change
    loss: Any
    labels: np.ndarray | None

    def batch(self, rows: np.ndarray, streams: list[np.random.Generator]) -> "_Batch":
        x = tree.map_structure(lambda array: array[rows], self.x)
        captured = _captured(self.model, x, self.layers, len(rows))
        own = {name: scores.values.astype("float32") for name, scores in captured.items()}
        # Without a mask all keys are in view, also those whose weight underflows to 0.
        visible = {name: (weights > 0) | (captured[name].attrs["masks"] == "none") for name, weights in own.items()}
        inputs = next(batches_of(x, len(rows))[0])
        own_scores = ops.convert_to_tensor(self.own_scores[rows], "float32")
        labels = None if self.labels is None else self.labels[rows]
        return _Batch(self, inputs, own, visible, own_scores, labels, streams)


def _runs(
    model: Any, x: Any, found: Outputs, layers: Any, tolerance: float, loss: Any, labels: np.ndarray | None
) -> _Runs:
    rounding, meaning = rounding_of(model), found._replace(values=None)  # type: ignore[arg-type]
    values = ops.convert_to_tensor(found.values, "float32")
    own_scores = _backend.as_numpy(_asked_scores(values, meaning, rounding)).astype("float64")
    spread = spread_of(own_scores)
    # A change of an output that varies no more than this would be rounding.
    varies = tolerance * spread > rounding / 10 * np.abs(own_scores).max(axis=0)
    if not varies.any():
        raise NoSpreadError(
            "The model's output is the same for all samples of `x`, so there is no scale for a change. Give more "
            "samples, or others."
        )
    scale = ops.convert_to_tensor(np.where(varies, spread, np.inf), "float32")
    is_logit = found.probabilities or found.task in ("classification", "multilabel")
    unit = f"relative to the spread of the {'logits' if is_logit else 'output'}"
    edit = editor(model, next(batches_of(tree.map_structure(lambda array: array[:2], x), 2)[0]), layers)
    return _Runs(model, layers, edit, x, meaning, rounding, scale, own_scores, unit, loss, labels)


def _asked_scores(values: Any, meaning: Outputs, rounding: float) -> Any:
    """Of outputs (sample, output), those that are asked about, on a linear scale: (sample, column)."""
    column = meaning.part.column
    columns = slice(None) if column is None else slice(column, column + 1)
    return on_linear_scale(meaning, ops.cast(values, "float32"), rounding)[:, columns]


def _change(outputs: Any, own_scores: Any, scale: Any, meaning: Outputs, rounding: float) -> Any:
    """By how much outputs differ from those with the model's own scores: (sample,)."""
    scores = _asked_scores(matrix(outputs, meaning.part), meaning, rounding)
    return ops.max(ops.abs(scores - own_scores) / scale, axis=-1)


def _penalty(model: Any, outputs: Any, more: Any, tolerance: float, meaning: Outputs, rounding: float) -> Any:
    """What the adversary pays for changes."""
    weights, own_scores, scale = more
    return ops.sum(weights * ops.maximum(_change(outputs, own_scores, scale, meaning, rounding) - tolerance, 0))


def _captured(model: Any, x: Any, layers: Any, batch_size: int | None) -> dict[str, xr.DataArray]:
    captured = capture(model, x, layers=layers, batch_size=batch_size, verbose=0)
    for name, scores in captured.items():
        if scores.dims[0] != "sample" or scores.dims[-2:] != ("query", "key"):
            raise ValueError(
                f"The scores of layer {name!r} have the axes {scores.dims}: it is not clear which of these are sample, "
                "query and key. Leave it out with `layers=[...]`."
            )
    return captured


class _Batch(NamedTuple):
    """A batch, to be run with other scores than its own. A run gives how far outputs and scores change, (2, sample)."""

    runs: _Runs
    inputs: tuple
    own: dict[str, np.ndarray]  # scores (sample, head, query, key) of each layer
    visible: dict[str, np.ndarray]  # whether a query may attend to a key, in the same shapes
    own_scores: Any  # a tensor (sample, column)
    labels: np.ndarray | None
    streams: list[np.random.Generator]  # of random numbers, one for each sample

    def predict(self, scores: dict[str, np.ndarray]) -> Any:
        return self.runs.edit.predict(self.inputs, _replaced, scores)

    def compared(self, outputs: Any, scores: dict[str, np.ndarray]) -> np.ndarray:
        runs = self.runs
        change = _change(outputs, self.own_scores, runs.scale, runs.meaning, runs.rounding)
        return np.stack([_backend.as_numpy(change), _distance(self.own, scores)])

    def sums(self, name: str) -> np.ndarray:
        """Those of the rows, over the keys: 1, less what goes to an attention sink, or 0 without a key in view."""
        return self.own[name].sum(axis=-1, keepdims=True)

    def uniform(self) -> dict[str, np.ndarray]:
        return {
            name: visible * self.sums(name) / np.maximum(visible.sum(axis=-1, keepdims=True, dtype="float32"), 1)
            for name, visible in self.visible.items()
        }

    def losses(self) -> np.ndarray:
        """With the model's own scores and with uniform ones: (2, sample)."""
        uniform = self.uniform()
        outputs = [output_at(self.predict(scores), self.runs.meaning.part) for scores in (self.own, uniform)]
        return np.stack([loss_values(self.runs.loss, self.labels, one) for one in outputs])

    def controls(self, draws: int, tolerance: float, steps: int) -> np.ndarray:
        """The runs with uniform, permuted and adversarial scores: (control, 2, sample). NaN if there are no `steps`."""

        def run(scores):
            return self.compared(self.predict(scores), scores)

        uniform = run(self.uniform())
        permuted = [
            run({name: _permuted(scores, self.visible[name], self.streams) for name, scores in self.own.items()})
            for _ in range(draws)
        ]
        adversarial = np.full_like(uniform, np.nan)
        if steps:
            adversarial = self._adversary([uniform, *permuted], tolerance, steps)
        return np.stack([uniform, np.median(permuted, axis=0), adversarial])

    def _adversary(self, runs: list[np.ndarray], tolerance: float, steps: int) -> np.ndarray:
        """Of these runs and those of two ascents, for each sample the farthest that keeps its output: (2, sample)."""
        # An ascent starts near the model's own scores, where the output is right but the divergence has no slope, or
        # far away from them.
        starts: list[dict[str, np.ndarray]] = []
        for sign, least in ((1, 1e-6), (-1, 1e-2)):
            starts.append({})
            for name, visible in self.visible.items():
                noise = np.stack([stream.normal(size=visible.shape[1:]) for stream in self.streams])
                logits = sign * np.log(np.maximum(self.own[name], least)) + _NOISE * noise
                starts[-1][name] = np.where(visible, logits, _HIDDEN)
        farthest = np.zeros_like(runs[0])
        for run in [*runs, *(run for start in starts for run in self._ascent(start, tolerance, steps))]:
            better = (run[0] <= tolerance) & (run[1] > farthest[1])
            farthest[:, better] = run[:, better]
        return farthest

    def _ascent(self, logits: dict[str, np.ndarray], tolerance: float, steps: int) -> Iterator[np.ndarray]:
        """The runs on a gradient ascent from these logits to larger distances, changes of the output penalized."""
        moments = {name: (np.zeros_like(values), np.zeros_like(values)) for name, values in logits.items()}
        penalty = _penalty, tolerance, self.runs.meaning, self.runs.rounding
        penalty_weights = np.full(len(self.own_scores), 10.0)
        rows = _attending_rows(self.own)  # over which the distance is a mean
        for step in range(1, steps + 1):
            scores = {}
            for name, values in logits.items():
                scores[name] = (special.softmax(values, axis=-1) * self.sums(name)).astype("float32")
            more = penalty_weights.astype("float32"), self.own_scores, self.runs.scale
            gradients, outputs, _ = self.runs.edit.gradient(self.inputs, _replaced, scores, penalty, more)
            result = self.compared(outputs, scores)
            yield result
            penalty_weights *= np.where(result[0] > tolerance, 1.3, 0.9)
            for name, weights in scores.items():
                middle = (self.own[name] + weights) / 2
                divergence_slope = np.log2(np.maximum(weights, 1e-12) / np.maximum(middle, 1e-12)) / 2
                divergence_slope = divergence_slope / rows.reshape(-1, *[1] * (weights.ndim - 1))
                slope = _backend.as_numpy(gradients[name]) - divergence_slope
                of_rows = (weights * slope).sum(axis=-1, keepdims=True) / np.maximum(self.sums(name), 1e-12)
                slope = weights * (slope - of_rows)  # by the logits
                mean, square = moments[name]  # Adam's (Kingma & Ba 2015)
                mean += 0.1 * (slope - mean)
                square += 0.01 * (slope**2 - square)
                logits[name] -= _RATE * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-9)


def _replaced(name: str, scores: Any, given: Any) -> Any:
    # A query without a key in view has no other scores than its own.
    return ops.where(ops.any(given[name] != 0, axis=-1, keepdims=True), given[name], ops.cast(scores, "float32"))


def _permuted(scores: np.ndarray, visible: np.ndarray, streams: list[np.random.Generator]) -> np.ndarray:
    """The weights of each row, shuffled among the keys in its view."""
    places = np.arange(scores.shape[-1])
    drawn = np.stack([stream.random(scores.shape[1:]) for stream in streams])
    order = np.argsort(np.where(visible, drawn, 2), axis=-1)
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
