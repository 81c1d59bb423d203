"""Whether an attribution, or attention itself, says what a model uses: tests that it could fail."""

import difflib
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import xarray as xr
from keras import ops, tree
from scipy import special, stats

from kerasfactory import _backend
from kerasfactory._arguments import positive_integer
from kerasfactory.explain._capture import capture
from kerasfactory.explain._edit import Editor, editor
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
    find_attention,
    progress_bar,
)

_CELLS = 2**22  # numbers in a block of changed inputs: 16 MiB
_DONORS = 3  # rows of the background for each sample
_NULL_SAMPLES = 500
_ROWS = 2**14  # to predict at once
_CONTROL_SAMPLES = 256
_RESAMPLES = 2000
_HIDDEN = -1e9  # the logit of a key out of view

# Of the adversary's ascent, which keeps the best that it passes: it need not converge.
_RATE, _NOISE = 0.3, 0.5


def faithfulness(
    model: keras.Model,
    x: Any,
    attribution: Any,
    y: Any = None,
    target: int | None = None,
    removal: str = "marginal",
    background: Any = None,
    mask_value: float = 0,
    fractions: Sequence[float] = (0.1, 0.2, 0.5),
    draws: int = 200,
    level: float = 0.05,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    seed: int = 0,
) -> xr.Dataset:
    r"""Whether the features that an attribution puts first are those that the output depends on.

    For each sample \(x\), the \(k\) features with the largest attribution, the set \(T_k\), are removed, and then all
    the others. With the model's output \(f\) (DeYoung et al. 2020, [*ERASER: A Benchmark to Evaluate Rationalized NLP
    Models*](https://arxiv.org/abs/1911.03429), section 4),

    $$
    \operatorname{comprehensiveness}_k = f(x) - f(x \setminus T_k), \qquad
    \operatorname{sufficiency}_k = f(x) - f(T_k) ,
    $$

    \(k\) being a fraction of the features, rounded, and at least 1. AOPC (area over the perturbation curve) is the mean
    over the fractions, and over the samples. A faithful attribution has a large comprehensiveness and a sufficiency
    near 0. With fine `fractions`, such as `numpy.linspace(0.05, 1, 20)`, the two are the curves known as deletion and
    insertion, subtracted from \(f(x)\).

    \(f\) is the output for the class that the model predicts for the sample, or for the one that `target` or `y` names.
    If the model has one output, which may go up or down, the differences are taken as absolute values: noise does not
    cancel, and only the comparison with the null distribution tells something.

    By itself an AOPC tells little: removing any features moves an output. The null distribution is the AOPC
    comprehensiveness of attributions that know nothing of the features and are like the given one in all else: in each
    draw the features of the attribution are relabelled, at random, in the same way for all samples. The p-value is
    one-sided,

    $$
    p = \frac{1 + \#\{\text{null} \ge \text{observed}\}}{1 + \text{draws}} .
    $$

    Relabelling each sample by itself would be the wrong comparison. Many attributions rank the features alike in all
    samples, and a single ranking drawn blindly beats the average of many in half of all cases. This has a price: a
    ranking that is the same for all samples is one guess among the possible rankings, however many samples there are.
    With 3 features its p-value stays around 1/6 or above, faithful or not.

    A removed feature keeps its place and gets another value. The model may never have seen such an input
    (Hooker et al. 2019, [*A Benchmark for Interpretability Methods in Deep Neural
    Networks*](https://arxiv.org/abs/1806.10758)), so a large change can be the model's surprise and not the
    feature's merit. And of two copies of a feature each can be removed without a change: a faithful attribution to
    either has comprehensiveness 0 then. Try more than one `removal`.

    Args:
        model: A `keras.Model` with one output for each sample, or several, of shape `(sample,)` or `(sample, output)`.
        x: An array with the features along axis 1: `(sample, feature)`, `(sample, position, channel)`, or token ids,
            `(sample, position)`.
        attribution: `(sample, feature)`, as `attribute` returns it, or any array. The largest come first, with regard
            to the sign; among equals, chance decides.
        y: The class of each sample, `(sample,)`, integers from 0: \(f\) is its output. Not with `target`.
        target: The number of the output that is \(f\).
        removal: The value that a removed feature gets. `"marginal"`: what it is in a random row of `background`; all
            features removed from a sample come from one row, and the output is the mean over three rows. `"mean"`:
            its mean in `background`; not for token ids or categories. `"mask"`: `mask_value`, for models that are
            trained to ignore it.
        background: Samples like `x`, to draw from; `x` itself if not given.
        mask_value: For `removal="mask"`.
        fractions: Of the features, each above 0 and at most 1. They come back sorted, without repetition.
        draws: Of the null distribution.
        level: The interval covers \(1 - \text{level}\); between 0 and 1.
        batch_size: Samples in a batch; as many as make 16,384 positions, at most 1,024, if not given.
        verbose: As for `capture`. The steps are the draws.
        seed: Of all that is drawn. The same seed gives the same result.

    Returns:
        xr.Dataset: With these variables.

        - `comprehensiveness`, `sufficiency` (sample, fraction), in the unit of the output. The coordinate `removed`
          (fraction) is the number \(k\) of features.
        - `aopc_comprehensiveness`, `aopc_sufficiency`: their means, one number each.
        - `null` (draw), `p_value`: as above. They need draws × fractions × samples predictions, and are therefore
          taken from 500 samples, drawn at random, if there are more, and with one row of `background` for each.
          `observed` in the attributes is the AOPC comprehensiveness of the attribution in the same samples and rows.
        - `interval` (bound: `lower`, `upper`) of `aopc_comprehensiveness`: a percentile bootstrap over the samples. The
          model, the attribution and the background stay as they are in it. NaN for a single sample.

        The attributes say `removal`, `mask_value` if it was used, `background`, `background_rows` (drawn for each
        sample), `change` (`"signed"` or `"absolute"`), `target`, `draws`, `null_samples`, `observed`, `level` and
        `seed`.

    Raises:
        ValueError: If the attribution does not fit `x`, or holds NaN; if there are fewer than 2 features; if an
            argument is out of range or unknown; if `background` has other features than `x`, or `x` has one sample and
            no background to draw from; if the model has other outputs, or they are NaN.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        weights = np.array([5, -4, 3, -2, 1, 0, 0, 0])
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
        model.set_weights([weights[:, None], np.zeros(1)])

        x = np.random.default_rng(0).normal(size=(200, 8))
        good = explain.faithfulness(model, x, np.abs(weights * x), verbose=0)
        bad = explain.faithfulness(model, x, -np.abs(weights * x), verbose=0)

        print(good["p_value"].item() < 0.05, bad["p_value"].item() < 0.05)
        #> True False
        ```
    """
    x = _table("x", x)
    importance = _checked_attribution(attribution, x)
    shares = _checked_fractions(fractions)
    draws = positive_integer("draws", draws)
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1. Received: level={level!r}")
    samples, features = importance.shape
    rng = np.random.default_rng(seed)
    donors, said_of_background = _donors(x, removal, background, mask_value)
    rows = rng.integers(len(donors), size=(_DONORS if len(donors) > 1 else 1, samples))

    progress = progress_bar(draws + 1, verbose, "draw")
    outputs = _finite(predictions(model, x, batch_size), "`x`")
    columns, said_of_target = _columns(outputs, y, target)
    own = outputs[np.arange(samples), columns]
    absolute = outputs.shape[1] == 1

    def changes(removed, of, rows):
        """By how much the outputs of the samples `of` fall, (set, sample), without (set, sample, feature)."""
        result = np.empty(removed.shape[:2])
        step = max(1, _CELLS // (x[0].size * len(removed) * len(rows)))
        for start in range(0, len(of), step):
            part = of[start : start + step]
            where = removed[:, None, start : start + step].reshape(
                len(removed), 1, len(part), features, *[1] * (x.ndim - 2)
            )
            changed = np.where(where, donors[rows[:, part]], x[part]).reshape(-1, *x.shape[1:])
            changed_outputs = _finite(
                predictions(model, changed, batch_size), f'`x` with features removed by "{removal}"'
            )
            changed_outputs = changed_outputs.reshape(len(removed), len(rows), len(part), -1)
            without = changed_outputs[:, :, np.arange(len(part)), columns[part]].mean(axis=1)
            result[:, start : start + step] = own[part] - without
        return np.abs(result) if absolute else result

    ranks = np.argsort(np.lexsort((rng.random(importance.shape), -importance)))
    counts = np.maximum(1, np.floor(shares * features + 0.5).astype(int))
    sets = [ranks < count for count in counts] + [ranks >= count for count in counts]
    comprehensiveness, sufficiency = np.split(changes(np.stack(sets), np.arange(samples), rows), 2)
    progress.update(1)

    chosen = _some(samples, _NULL_SAMPLES, rng)
    # One row for each sample will do: its chance is the same in the observed and in the null.
    observed = float(changes(np.stack(sets[: len(counts)])[:, chosen], chosen, rows[:1]).mean())
    null = np.empty(draws)
    at_once = max(1, _ROWS // (len(counts) * len(chosen)))
    for start in range(0, draws, at_once):
        stop = min(start + at_once, draws)
        relabelled = [ranks[chosen][:, rng.permutation(features)] for _ in range(start, stop)]
        removed = np.stack([of_draw < count for of_draw in relabelled for count in counts])
        null[start:stop] = changes(removed, chosen, rows[:1]).reshape(stop - start, -1).mean(axis=1)
        progress.update(stop + 1)

    # A draw that puts the same features first is to count as such, whatever its rounding.
    rounding = 1e-6 * np.abs(own).max()
    attributes = {"removal": removal} | ({"mask_value": mask_value} if removal == "mask" else {})
    attributes |= {
        "background": said_of_background,
        "background_rows": len(rows),
        "change": "absolute" if absolute else "signed",
        "target": said_of_target,
        "draws": draws,
        "null_samples": len(chosen),
        "observed": observed,
        "level": level,
        "seed": seed,
    }
    dims = ("sample", "fraction")
    return xr.Dataset(
        {
            "comprehensiveness": (dims, comprehensiveness.T),
            "sufficiency": (dims, sufficiency.T),
            "aopc_comprehensiveness": comprehensiveness.mean(),
            "aopc_sufficiency": sufficiency.mean(),
            "null": ("draw", null),
            "p_value": (1 + np.sum(null >= observed - rounding)) / (1 + draws),
            "interval": ("bound", _interval(comprehensiveness.mean(axis=0), np.mean, level, seed)),
        },
        {
            "sample": np.arange(samples),
            "fraction": shares,
            "removed": ("fraction", counts),
            "bound": ["lower", "upper"],
        },
        attributes,
    )


def attention_controls(
    model: keras.Model,
    x: Any,
    target: int | None = None,
    layers: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    verbose: int | str = 0,
    seed: int = 0,
    draws: int = 5,
    tolerance: float = 0.02,
    steps: int = 30,
    level: float = 0.05,
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
    queries that nothing is read from are free.

    The distance of scores is the Jensen–Shannon divergence to the base 2, from 0 to 1, the mean over queries, heads and
    layers. The change of an output is the total variation distance for probabilities (half the sum of absolute
    differences; the absolute difference for a single one, or for a `target`), else the largest absolute difference,
    relative to the standard deviation of that output over the samples. Where masks are in force, the keys in view are
    those with a weight above 0.

    It takes up to 256 samples of the arrays `x`, drawn at random.

    Returns:
        xr.Dataset: Over `control` (`uniform`, `permuted`, `adversarial`): `change`, `jsd` (control, sample),
            `median_change` (control), and its bootstrap `interval` (control, bound: `lower`, `upper`). For the
            adversary, `change` is at most `tolerance`, and `jsd` is what it reached.
    """
    draws, steps = positive_integer("draws", draws), positive_integer("steps", steps)
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be above 0. Received: tolerance={tolerance!r}")
    if not isinstance(x, dict | list | tuple) and not hasattr(x, "__array__"):
        raise ValueError(
            f"`x` must be an array, or a dictionary or list of arrays. Received: x of type {type(x).__name__}"
        )
    samples = len(tree.flatten(x)[0])
    if samples < 2:
        raise ValueError(f"`x` must hold at least 2 samples: one has no spread. Received: {samples}")
    rng = np.random.default_rng(seed)
    chosen = _some(samples, _CONTROL_SAMPLES, rng)
    x = tree.map_structure(lambda array: np.asarray(array)[chosen], x)
    batch_size = batch_size_of(x, 1024) if batch_size is None else batch_size

    outputs = _finite(predictions(model, x, batch_size), "`x`")
    columns = list(range(outputs.shape[1])) if target is None else [_checked_target(target, outputs.shape[1])]
    distance, said_of_change = _change_of(outputs, columns)

    def change(outputs_of_batch, own):
        flat = ops.reshape(ops.cast(outputs_of_batch, "float32"), (-1, outputs.shape[1]))
        return distance(ops.take(flat, columns, axis=1), own)

    def penalty(outputs_of_batch, more):
        weights, own = more
        return ops.sum(weights * ops.maximum(change(outputs_of_batch, own) - tolerance, 0))

    captured = capture(model, x, layers, batch_size=batch_size, verbose=0)
    for name, scores in captured.items():
        if scores.dims[0] != "sample" or scores.dims[-2:] != ("query", "key"):
            raise ValueError(
                f"The scores of layer {name!r} have the axes {scores.dims}: they cannot be told apart by sample, "
                f"query and key. "
                "Leave it out with `layers=[...]`."
            )

    batches, expected = _batches(x, batch_size)
    progress = progress_bar(expected, verbose)
    edit: Editor | None = None
    of_batches, start = [], 0
    for number, batch in enumerate(batches, start=1):
        edit = edit or editor(model, batch, layers)
        stop = start + _size(batch)
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
    dims = ("control", "sample")
    return xr.Dataset(
        {
            "change": (dims, changes),
            "jsd": (dims, distances),
            "median_change": ("control", np.median(changes, axis=1)),
            "interval": (("control", "bound"), [_interval(row, np.median, level, seed) for row in changes]),
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


def randomised_parameters(
    model: keras.Model,
    x: Any,
    attribution: Any,
    attribute: Callable[[keras.Model, Any], Any],
    weights: str = "attention",
    draws: int = 10,
    level: float = 0.05,
    seed: int = 0,
) -> xr.Dataset:
    r"""How far an attribution moves when what the model has learned is taken out of it.

    An attribution that stays where it is without the learned weights shows the architecture or the data, not the model
    (Adebayo et al. 2018, [*Sanity Checks for Saliency Maps*](https://arxiv.org/abs/1810.03292)). There, weights are
    initialised anew. Here the entries of each array of weights are shuffled: the distribution of its values stays, and
    with it how sharp attention can be; what they have learned goes.

    Attributions are compared as shares, \(|a_f| / \sum |a|\), by their total variation distance, half the sum of
    absolute differences, from 0 to 1. Beside it stands how far the trained model's own attributions of two random
    halves of the samples lie apart: a distance that is no larger says nothing.

    `attribute(model, x)` is called with the same model in a `keras.StatelessScope` with other values, and returns an
    attribution of the form of `attribution`; the model keeps its weights. `weights` says which are shuffled: those of
    all `"attention"` layers, or `"all"`.

    Returns:
        xr.Dataset: `distance` (draw), between the mean attributions over the samples; `mean_distance`, and its
            `interval` (bound) over the draws by
        Student's t, NaN for one draw; `sample_distance` (draw), the mean of the samples' own distances; `halves`
        (draw).
    """
    if weights not in ("attention", "all"):
        raise ValueError(f'`weights` must be "attention" or "all". Received: weights={weights!r}')
    draws = positive_integer("draws", draws)
    rng = np.random.default_rng(seed)
    own = _shares(attribution)
    layers = list(find_attention(model).values()) if weights == "attention" else [model]
    variables = list({id(weight): weight for layer in layers for weight in layer.weights}.values())
    distance, sample_distance, halves = np.empty((3, draws))
    for draw in range(draws):
        values = []
        for variable in variables:
            trained = _backend.as_numpy(ops.convert_to_tensor(variable))
            shuffled = rng.permutation(trained.reshape(-1)).reshape(trained.shape)
            values.append((variable, ops.convert_to_tensor(shuffled, dtype=variable.dtype)))
        with keras.StatelessScope(values):
            other = _shares(attribute(model, x))
        if other.shape != own.shape:
            raise ValueError(
                "`attribute(model, x)` must return an attribution of the shape of `attribution`. Received shapes: "
                f"{other.shape} and {own.shape}"
            )
        distance[draw] = np.abs(own.mean(axis=0) - other.mean(axis=0)).sum() / 2
        sample_distance[draw] = np.abs(own - other).sum(axis=1).mean() / 2
        half = rng.permutation(len(own))
        one, two = own[half[: len(own) // 2]], own[half[len(own) // 2 :]]
        halves[draw] = np.abs(one.mean(axis=0) - two.mean(axis=0)).sum() / 2 if len(own) > 1 else np.nan
    mean, error = distance.mean(), distance.std(ddof=1) / np.sqrt(draws) if draws > 1 else np.nan
    reach = stats.t.ppf(1 - level / 2, draws - 1) * error if draws > 1 else np.nan
    return xr.Dataset(
        {
            "distance": ("draw", distance),
            "sample_distance": ("draw", sample_distance),
            "halves": ("draw", halves),
            "mean_distance": mean,
            "interval": ("bound", [mean - reach, mean + reach]),
        },
        {"bound": ["lower", "upper"]},
        {"weights": weights, "draws": draws, "level": level, "seed": seed},
    )


def seed_agreement(
    attributions: Sequence[Any], top_k: int | None = None, draws: int = 1000, seed: int = 0
) -> xr.Dataset:
    r"""Whether models that differ only in their seed attribute the same `x` to the same features.

    Each attribution (sample, feature) is turned into shares, \(|a_f| / \sum |a|\), and averaged over the samples.
    `overlap` is the part of the `top_k` features (a quarter of all if not given, at least 1) that two models have in
    common, the mean over all pairs of models. The null distribution is that of as many random rankings.

    Returns:
        xr.Dataset: `mean`, `spread` (feature), the mean share and its standard deviation over the models; `overlap`,
            from 0 to 1; `null` (draw) and
        the one-sided `p_value`. Models may agree on what is wrong: agreement is no evidence of faithfulness.
    """
    if len(attributions) < 2:
        raise ValueError(f"`attributions` must hold those of at least 2 models. Received: {len(attributions)}")
    shapes = {np.shape(attribution) for attribution in attributions}
    names = [attribution.coords["feature"].values.tolist() for attribution in attributions if _is_named(attribution)]
    if len(shapes) > 1 or any(other != names[0] for other in names):
        raise ValueError(
            "`attributions` must be of the same samples and features. Received: "
            + (f"shapes {sorted(shapes)}" if len(shapes) > 1 else f"features {names}")
        )
    means = np.stack([_shares(attribution).mean(axis=0) for attribution in attributions])
    models, features = means.shape
    draws = positive_integer("draws", draws)
    count = max(1, features // 4) if top_k is None else positive_integer("top_k", top_k)
    if count >= features:
        raise ValueError(f"`top_k` must be smaller than the number of features, {features}. Received: top_k={top_k!r}")
    rng = np.random.default_rng(seed)

    def overlap(scores):
        """Of (…, model, feature), chance deciding among equals."""
        ranks = np.argsort(np.lexsort((rng.random(scores.shape), -scores)))
        chosen = (ranks < count).astype(float)
        common = np.einsum("...if,...jf->...ij", chosen, chosen)[..., *np.triu_indices(models, 1)]
        return common.mean(axis=-1) / count

    observed = float(overlap(means))
    null = overlap(rng.random((draws, models, features)))
    return xr.Dataset(
        {
            "mean": ("feature", means.mean(axis=0)),
            "spread": ("feature", means.std(axis=0, ddof=1)),
            "overlap": observed,
            "null": ("draw", null),
            "p_value": (1 + np.sum(null >= observed - 1e-9)) / (1 + draws),
        },
        {"feature": names[0]} if names else {},
        {"models": models, "top_k": count, "draws": draws, "seed": seed},
    )


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
                "that you "
                "ask about, as with `keras.Model(model.input, model.output[:, 0])`. Received outputs of shapes: "
                f"{[array.shape for array in arrays]}"
            )
        parts.append(arrays[0].reshape(len(arrays[0]), -1).astype("float64"))
    return np.concatenate(parts)


def _some(samples: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    """The numbers of all samples, or of some."""
    return np.arange(samples) if samples <= limit else np.sort(rng.choice(samples, limit, replace=False))


def _interval(values: np.ndarray, statistic: Callable, level: float, seed: int) -> np.ndarray:
    if len(values) < 2:
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


def _checked_attribution(attribution: Any, x: np.ndarray) -> np.ndarray:
    if isinstance(attribution, xr.DataArray) and set(attribution.dims) == {"sample", "feature"}:
        attribution = attribution.transpose("sample", "feature")
    values = np.asarray(attribution)
    if values.shape != x.shape[:2]:
        raise ValueError(
            f"`attribution` must have a number for each sample and feature, {x.shape[:2]} as in `x`; "
            "`numpy.broadcast_to(values, x.shape[:2])` makes it of one number for each feature. Received: "
            f"attribution of shape {values.shape}, x of shape {x.shape}"
        )
    if values.shape[1] < 2:
        raise ValueError("`x` has one feature: there is nothing to rank. Give at least 2.")
    _without_nan(values, "`attribution`")
    return values.astype("float64")


def _without_nan(values: np.ndarray, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} is NaN or infinite in {len(bad)} of {len(values)} samples, the first of them number {bad[0]}. "
            f"Leave "
            "them out, or find out why."
        )


def _finite(outputs: np.ndarray, name: str) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(bad):
        raise ValueError(
            f"The model's output is NaN or infinite for {len(bad)} of {len(outputs)} rows of {name}. Look for NaN in "
            f"`x` and in "
            "`background`, and for values that the model does not know, as the mean of categories."
        )
    return outputs


def _checked_fractions(fractions: Sequence[float]) -> np.ndarray:
    values = np.unique(np.asarray(fractions, "float64"))
    if values.size == 0 or not ((values > 0) & (values <= 1)).all():
        raise ValueError(f"`fractions` must lie above 0 and at most at 1. Received: fractions={fractions!r}")
    return values


_REMOVALS = ("marginal", "mean", "mask")


def _donors(x: np.ndarray, removal: Any, background: Any, mask_value: float) -> tuple[np.ndarray, str]:
    """Rows that removed features take their values from, and what to say of them."""
    if removal not in _REMOVALS:
        near = difflib.get_close_matches(str(removal), _REMOVALS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"`removal` must be one of {', '.join(map(repr, _REMOVALS))}. {hint}Received: removal={removal!r}"
        )
    if removal == "mask":
        if background is not None:
            raise ValueError('`background` is not used with `removal="mask"`. Leave one of them out.')
        return np.full((1, *x.shape[1:]), mask_value, x.dtype), "none"
    if background is None and len(x) < 2:
        raise ValueError(
            f'`x` holds one sample: there is nothing else to take values from for `removal="{removal}"`. Give a '
            f"`background`, "
            'such as training data, or `removal="mask"`.'
        )
    rows = x if background is None else _table("background", background)
    if rows.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"`background` must hold samples like those of `x`. Received: background of shape {rows.shape}, x of "
            f"shape {x.shape}"
        )
    said = f"{'x' if background is None else 'given'}, {len(rows)} samples"
    if removal == "marginal":
        return rows, said
    if x.dtype.kind != "f":
        raise ValueError(
            f'`removal="mean"` needs numbers that have a mean; those of `x` are of dtype {x.dtype}, as token ids are. '
            f"Use "
            '"marginal" or "mask", or convert `x` to floats.'
        )
    return rows.mean(axis=0, keepdims=True, dtype="float64").astype(x.dtype), said


def _checked_target(target: Any, outputs: int) -> int:
    if isinstance(target, bool) or not isinstance(target, int | np.integer) or not 0 <= target < outputs:
        raise ValueError(
            f"`target` must be the number of an output, from 0 to {outputs - 1}. Received: target={target!r}"
        )
    return int(target)


def _columns(outputs: np.ndarray, y: Any, target: Any) -> tuple[np.ndarray, str | int]:
    """The number of the output that is asked about, for each sample, and what to say of it."""
    samples, count = outputs.shape
    if y is not None and target is not None:
        raise ValueError("`y` and `target` both say which output is meant. Leave one of them out.")
    if target is not None:
        number = _checked_target(target, count)
        return np.full(samples, number), number
    if y is None:
        return outputs.argmax(axis=1), "the output" if count == 1 else "predicted class"
    classes = np.asarray(y)
    whole = classes.shape == (samples,) and classes.dtype.kind in "biuf" and (classes == np.floor(classes)).all()
    if not whole or count == 1 or classes.min() < 0 or classes.max() >= count:
        raise ValueError(
            f"`y` must be the class of each sample, {samples} integers from 0 to {count - 1}, of a model with several "
            f"outputs"
            f"{'; this one has one, leave `y` out' if count == 1 else ''}. Received: y of shape {classes.shape}"
        )
    return classes.astype(int), "y"


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


def _is_named(attribution: Any) -> bool:
    return isinstance(attribution, xr.DataArray) and "feature" in attribution.coords


def _shares(attribution: Any) -> np.ndarray:
    values = np.abs(np.asarray(attribution, "float64"))
    if values.ndim != 2:
        raise ValueError(f"An attribution must be (sample, feature). Received: shape {values.shape}")
    _without_nan(values, "An attribution")
    sums = values.sum(axis=1, keepdims=True)
    return np.where(sums > 0, values / np.where(sums > 0, sums, 1), 1 / values.shape[1])
