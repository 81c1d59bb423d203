"""Whether an attribution comes from what a model has learned, and whether models trained alike agree on it."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import xarray as xr
from keras import ops

from kerasfactory import _backend
from kerasfactory._arguments import checked_level, generator, positive_integer
from kerasfactory.explain._attribution import attribute
from kerasfactory.explain._engine.attention import all_layers, find_attention, float_scores
from kerasfactory.explain._engine.data import check_rows_finite, progress_bar, sampled
from kerasfactory.explain._engine.observe import observe
from kerasfactory.explain._engine.statistics import bootstrap_interval, clusters_of, sign_tests
from kerasfactory.explain._engine.tables import in_arrays
from kerasfactory.explain._engine.view import carried_view, relabeling, view_of

_SAMPLES = 256
_RELABELINGS = 100
_RESAMPLES = 1000
_ROUNDING = 1e-6  # smaller distances between shares are rounding


def parameter_randomization(
    model: keras.Model,
    x: Any,
    *,
    method: str | Callable[[keras.Model, Any], Any] = "attention",
    task: str | None = None,
    target: int | str | tuple[int | str, ...] | None = None,
    query: int | str | None = None,
    layers: str | Sequence[str] | None = None,
    parameters: str = "attention",
    feature_names: Sequence[str] | None = None,
    special_tokens: Sequence[int] | Sequence[str] | None = None,
    draws: int = 20,
    tolerance: float = 0.5,
    level: float = 0.05,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    seed: int = 0,
) -> xr.Dataset:
    r"""Measures how much of an attribution is left after the learned weights are shuffled.

    An attribution that stays the same without the learned weights shows the architecture or the data, not the model
    (Adebayo et al. 2018, [*Sanity Checks for Saliency Maps*](https://arxiv.org/abs/1810.03292)). That paper initializes
    the weights again. Here the entries of each array of weights are shuffled. The distribution of its values stays, and
    so does how sharp attention can be. What the weights have learned is lost.

    With the shares \(a_{sf} = |\text{attribution}_{sf}| / \sum_f |\text{attribution}_{sf}|\) of the trained model, over
    the features in view of the sample, and the shares \(b_r\) after shuffle \(r\), the distance is the total variation,
    averaged over the \(S\) samples,

    $$
    d(a, b) = \frac{1}{S} \sum_s \frac{1}{2} \sum_f |a_{sf} - b_{sf}| , \qquad
    \operatorname{kept}_r = 1 - \frac{d(a, b_r)}{\operatorname{mean}_\pi d(a, \pi b_r)} .
    $$

    The null distribution consists of \(\pi b_r\), attributions of the same shape that know nothing: those of the
    shuffled model with its features relabeled at random, in the same way for all samples. If features are out of view,
    such as padding, a feature gets the value of the first one in view that repeated relabeling leads to. What is kept
    is 1 if the attribution does not change, and 0 if it is no nearer to the original than a relabeled one. It may be
    below 0.

    Passing is no evidence that an attribution is faithful: the attribution of a model that was never trained passes.
    Failing is evidence that it is not about the model. A mask hides keys whatever the weights are, so features out of
    view do not count.

    Args:
        model: A `keras.Model`, as for `attribute`. It keeps its weights.
        x: Arrays, as `model.predict` takes them. Up to 256 samples are used, drawn at random.
        method: The attribution: a method of `attribute`, or a function of a model and samples that returns one,
            (sample, feature). It is called with the same model, in a `keras.StatelessScope` with other values.
        task: What the outputs mean, as for `attribute`, if `method` is one of its methods.
        target: The output, as for `attribute`, if `method` is one of its methods.
        query: The position or name of one query, as for `attribute`.
        layers: Names of the layers, as for `attribute`, if `method` is one of its methods.
        parameters: Which weights are shuffled: those of all `"attention"` layers, or `"all"` of the model. The weights
            of an attention in any other layer than Keras' own are those of that layer, or, if it has none, as
            `keras.layers.Attention`, of the smallest layer around it that has some.
        feature_names: Names of the features, as for `attribute`.
        special_tokens: What stands for no feature, as for `attribute`: it is out of view. Masks are in the coordinate
            `in_view` of what `method` returns, or else read from the model if `x` is one array with the features along
            axis 1.
        draws: How often shuffled weights are drawn.
        tolerance: The share that may be kept, between 0 and 1.
        level: The error level: the interval covers \(1 - \text{level}\). Between 0 and 0.5.
        batch_size: Samples in a batch, as for `capture`, if `method` is one of those of `attribute`.
        verbose: As for `capture`. The steps are the draws.
        seed: The seed of all that is drawn: samples, shuffled weights, relabelings and the bootstrap.

    Returns:
        xr.Dataset: With these variables, without unit, all from 0 to 1 but for `kept`.

        - `distance` (draw) and `null` (draw, relabeling): of the shuffled model's attribution, and of its
          relabelings.
        - `kept` (draw), its median over the draws, `median_kept`, and the `interval` (bound: `lower`, `upper`) of the
          median, a percentile bootstrap over the draws. NaN if the attribution is the same for all features, because
          there is nothing to keep.
        - `p_value`: of the exact sign test that the median is at most the `tolerance`; and `p_opposite`, that it is
          above. 1 if there is nothing to keep.

        The attributes are `method`, `parameters`, `samples`, `draws`, `tolerance`, `level` and `seed`.

    Raises:
        ValueError: As `attribute`; if `x` is not an array, or an argument is out of range; if the function `method`
            returns something that is not (sample, feature), or holds NaN, or has another shape with other weights; if
            `parameters` is `"attention"`, and the model has none that can be seen, or only one around which no layer
            but the model itself has weights.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        keras.utils.set_random_seed(0)
        inputs = keras.Input((6, 8))
        attention = keras.layers.MultiHeadAttention(num_heads=1, key_dim=8, name="attention")
        attended = attention(inputs, inputs)
        pooled = keras.layers.GlobalAveragePooling1D()(attended)
        model = keras.Model(inputs, keras.layers.Dense(1)(pooled))
        x = np.random.default_rng(0).normal(size=(100, 6, 8))

        result = explain.parameter_randomization(model, x, verbose=0)
        print(result["median_kept"].item() < 0.5, result["p_value"].item() < 0.05)
        #> True True

        size = explain.parameter_randomization(
            model, x, method=lambda model, x: np.abs(x).sum(axis=2), verbose=0
        )
        print(size["median_kept"].item())  # it depends on the data alone
        #> 1.0
        ```
    """
    if parameters not in ("attention", "all"):
        raise ValueError(f'`parameters` must be "attention" or "all". Received: parameters={parameters!r}')
    if not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must be a number between 0 and 1. Received: tolerance={tolerance!r}")
    checked_level(level)
    draws = positive_integer("draws", draws)
    rng = generator(seed, "parameter_randomization")
    chosen, x = sampled(x, _SAMPLES, rng)
    batch_size = None if batch_size is None else positive_integer("batch_size", batch_size)

    def attributed():
        if callable(method):
            return method(model, in_arrays(x))
        running: dict[str, Any] = {"batch_size": batch_size, "verbose": 0, "seed": seed}
        running |= {"task": task, "target": target, "query": query, "layers": layers}
        running |= {"feature_names": feature_names, "special_tokens": special_tokens}
        return attribute(model, x, method=method, **running)

    trained_attribution = attributed()
    in_view = _checked_view(trained_attribution, model, x, special_tokens, batch_size)
    own = _shares(trained_attribution, in_view)
    owners = _owners(model, in_arrays(x), batch_size) if parameters == "attention" else [model]
    variables = {id(variable): variable for owner in owners for variable in owner.weights}.values()  # each once
    trained = [(variable, _backend.as_numpy(ops.convert_to_tensor(variable))) for variable in variables]
    distance, null = np.empty(draws), np.empty((draws, _RELABELINGS))
    progress = progress_bar(draws, verbose, "draw")
    for draw in range(draws):
        with keras.StatelessScope([(variable, _shuffled(variable, values, rng)) for variable, values in trained]):
            other = attributed()
        distance[draw], null[draw] = _distances(own, other, in_view, rng)
        progress.add(1)

    by_chance = null.mean(axis=1)
    kept = np.where(by_chance > _ROUNDING, 1 - distance / np.maximum(by_chance, _ROUNDING), np.nan)
    p_opposite, p_value = (1.0, 1.0) if np.isnan(kept).any() else sign_tests(kept, tolerance)
    name = getattr(method, "__name__", "function") if callable(method) else method
    return xr.Dataset(
        {
            "distance": ("draw", distance),
            "null": (("draw", "relabeling"), null),
            "kept": ("draw", kept),
            "median_kept": np.median(kept),
            "interval": ("bound", bootstrap_interval(kept, np.median, level, seed)),
            "p_value": p_value,
            "p_opposite": p_opposite,
        },
        {"bound": ["lower", "upper"]},
        {"method": name, "parameters": parameters, "samples": len(chosen)}
        | {"draws": draws, "tolerance": tolerance, "level": level, "seed": seed},
    )


def _owners(model: keras.Model, x: Any, batch_size: int | None) -> list[Any]:
    """The layers whose weights make the attention of a model."""
    of_keras = list(find_attention(model).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about what cannot be read
        try:
            found = next(observe(model, x, None, batch_size, 0, float_scores, only_scores=True)).found
        except ValueError:
            if not of_keras:
                raise
            return of_keras
    with_weights = [layer for layer in all_layers(model) if layer is not model and layer.weights]
    owners = []
    for name, call in found.items():
        around = [layer for layer in with_weights if any(call.layer is inner for inner in all_layers(layer))]
        if not around:
            raise ValueError(
                f"No layer around the attention {name!r} has weights, except the model itself. Shuffle all of its "
                "weights, with "
                '`parameters="all"`.'
            )
        owners.append(min(around, key=lambda layer: len(all_layers(layer))))
    return owners + of_keras


def _shuffled(variable: Any, values: np.ndarray, rng: np.random.Generator) -> Any:
    return ops.convert_to_tensor(rng.permutation(values.reshape(-1)).reshape(values.shape), dtype=variable.dtype)


def _checked_view(attribution: Any, model: keras.Model, x: Any, special_tokens: Any, batch_size: Any) -> np.ndarray:
    """Which features are in view, (sample, feature)."""
    values = _values(attribution)
    shape = getattr(x, "shape", ())[:2]
    if shape == values.shape:
        return view_of(attribution, model, x, values.shape[1], special_tokens, batch_size)
    in_view = carried_view(attribution)
    return np.ones(values.shape, bool) if in_view is None else in_view


def _distances(
    own: np.ndarray, attribution: Any, in_view: np.ndarray, rng: np.random.Generator
) -> tuple[float, list[float]]:
    """The distance of an attribution from shares, and those after relabeling its features."""
    values = _values(attribution)
    if values.shape != own.shape:
        raise ValueError(
            "`method(model, x)` must return an attribution of one shape, whatever the weights. Received shapes: "
            f"{own.shape} and {values.shape}"
        )
    other = _shares(values, in_view)
    labels = (relabeling(rng.permutation(own.shape[1]), in_view) for _ in range(_RELABELINGS))
    relabeled = (np.take_along_axis(other, label, axis=1) for label in labels)
    distance, *null = (np.abs(own - shares).sum(axis=1).mean() / 2 for shares in (other, *relabeled))
    return distance, null


def seed_agreement(
    attributions: Sequence[Any],
    *,
    groups: Any = None,
    block: int | None = None,
    top_k: int | None = None,
    draws: int = 1000,
    level: float = 0.05,
    seed: int = 0,
) -> xr.Dataset:
    r"""Tests whether models that differ only in the seed of their training rank the same features first.

    The attributions are of the same samples by several models. Each is turned into shares of the features in view of
    the sample, \(a_{sf} = |\text{attribution}_{sf}| / \sum_f |\text{attribution}_{sf}|\). Where \(n_s\) features are in
    view, a share of \(1 / n_s\) is the uniform one: features are compared by the mean of \(a_{sf}\, n_s / \bar n\) over
    the samples in which they are in view, with the mean \(\bar n\) of \(n_s\). If all features are always in view, that
    is the mean share. With \(T_i\), the \(k\) features with the largest mean in model \(i\) of \(M\),

    $$
    \operatorname{overlap} = \frac{2}{M (M - 1)} \sum_{i < j} \frac{|T_i \cap T_j|}{k} .
    $$

    The null distribution is the overlap of as many rankings drawn at random. If features are out of view, such as
    padding, the means of rarely seen features vary more, and models that know nothing agree on them. Then the null is
    the overlap after the features of each model were relabeled at random, within the view of each sample: a feature
    gets the value of the first one in view that repeated relabeling leads to. Rankings are compared by what they put
    first, as a reader compares them. A rank correlation over all features would reward agreement on the order of what
    does not matter.

    Agreement is no evidence of faithfulness: models may agree on a wrong answer. If models disagree, do not draw
    conclusions about the task from the map of one of them (Wiegreffe & Pinter 2019, [*Attention is not not
    Explanation*](https://arxiv.org/abs/1908.04626), section 3.3, and D'Amour et al. 2022, [*Underspecification Presents
    Challenges for Credibility in Modern Machine Learning*](https://arxiv.org/abs/2011.03395)).

    Args:
        attributions: Those of at least 2 models, (sample, feature) each, as from `attribute`. What is out of view is
            said by their coordinate `in_view`. In arrays without it, a feature is out of view of a sample if it is
            exactly 0 in all of them.
        groups: Labels of samples that belong together, (sample,), such as patients: the bootstrap draws these.
        block: For a series: the length of the runs of samples that the bootstrap draws. Not with `groups`.
        top_k: How many features to compare, at least 1 and fewer than are ever in view; a quarter of these if not
            given.
        draws: How often the null distribution is drawn from.
        level: The error level: the interval covers \(1 - \text{level}\). Between 0 and 0.5.
        seed: The seed of all that is drawn: rankings, the order among equals and the bootstrap.

    Returns:
        xr.Dataset: With these variables, all from 0 to 1, without unit.

        - `mean`, `spread` (feature): of the models' means as above, and their standard deviation over the models. NaN
          for a feature that is never in view.
        - `overlap`, and its `interval` (bound: `lower`, `upper`): a percentile bootstrap over the samples, `groups` or
          blocks. The models stay as they are in it; NaN for a single one of these.
        - `null` (draw), and one-sided p-values: `p_value` that models agree more than by chance,
          \((1 + \#\{\text{null} \ge \text{overlap}\}) / (1 + \text{draws})\), and `p_opposite` that they agree less.
          Few features or models cannot give a small one: two models and three features, of which one is compared,
          agree by chance in a third of all cases.

        The attributes are `models`, `top_k`, `chance` (the mean of `null`), `draws`, `level` and `seed`.

    Raises:
        ValueError: If there are fewer than 2 attributions, or they are not of the same samples and features, or hold
            NaN; if an argument is out of range.

    Example:
        ```python
        import numpy as np

        from kerasfactory import explain

        rng = np.random.default_rng(0)
        task = np.arange(12.0)  # what the models have in common
        alike = [task + rng.normal(size=(100, 12)) for _ in range(4)]
        result = explain.seed_agreement(alike)
        print(result["overlap"].item(), result["p_value"].item() < 0.05)
        #> 1.0 True

        apart = [rng.permutation(task) + rng.normal(size=(100, 12)) for _ in range(4)]
        print(explain.seed_agreement(apart)["p_value"].item() < 0.05)
        #> False
        ```
    """
    if len(attributions) < 2:
        raise ValueError(
            f"`attributions` must hold the attributions of at least 2 models. Received: {len(attributions)}"
        )
    shapes = {np.shape(attribution) for attribution in attributions}
    coordinates = [getattr(attribution, "coords", {}).get("feature") for attribution in attributions]
    names = [coordinate.values.tolist() for coordinate in coordinates if coordinate is not None]
    if len(shapes) > 1 or any(other != names[0] for other in names):
        raise ValueError(
            "`attributions` must have the same samples and features. Received: "
            + (f"shapes {sorted(shapes)}" if len(shapes) > 1 else f"features {names}")
        )
    checked_level(level)
    draws = positive_integer("draws", draws)
    in_view = _common_view(attributions)
    seen = int(in_view.any(axis=0).sum())
    count = max(1, seen // 4) if top_k is None else positive_integer("top_k", top_k)
    if count >= seen:
        raise ValueError(f"`top_k` must be smaller than the number of features, {seen}. Received: top_k={top_k!r}")
    sizes = in_view.sum(axis=1, keepdims=True)
    shares = np.stack([_shares(attribution, in_view) for attribution in attributions]) * (sizes / sizes.mean())
    models, samples, _ = shares.shape
    clusters = clusters_of(samples, groups, block)
    rng = generator(seed, "seed_agreement")

    def overlap(scores):
        """Of (…, model, feature), NaN if never in view. Among equals, up to rounding, chance decides."""
        scores = np.where(np.isnan(scores), -np.inf, np.round(scores, 12))
        ranks = np.argsort(np.lexsort((rng.random(scores.shape), -scores)))
        is_first = (ranks < count).astype(float)
        common = np.einsum("...if,...jf->...ij", is_first, is_first)[..., *np.triu_indices(models, 1)]
        return common.mean(axis=-1) / count

    means = _mean_where(shares.sum(axis=1), in_view.sum(axis=0))
    observed = float(overlap(means))
    null = overlap(_null_scores(shares, in_view, draws, rng))
    interval = np.full(2, np.nan)
    number = int(clusters.max()) + 1
    if number > 1:
        # Not `scipy.stats.bootstrap`: with resamples as weights of the samples, products of matrices do for all models.
        weights = rng.multinomial(number, np.full(number, 1 / number), _RESAMPLES)[:, clusters]
        resampled = _mean_where(weights @ shares, weights @ in_view)
        interval = np.quantile(overlap(resampled.swapaxes(0, 1)), [level / 2, 1 - level / 2])
    return xr.Dataset(
        {
            "mean": ("feature", means.mean(axis=0)),
            "spread": ("feature", means.std(axis=0, ddof=1)),
            "overlap": observed,
            "interval": ("bound", interval),
            "null": ("draw", null),
            "p_value": (1 + np.sum(null >= observed - 1e-9)) / (1 + draws),
            "p_opposite": (1 + np.sum(null <= observed + 1e-9)) / (1 + draws),
        },
        ({"feature": names[0]} if names else {}) | {"bound": ["lower", "upper"]},
        {"models": models, "top_k": count, "chance": float(null.mean()), "draws": draws, "level": level, "seed": seed},
    )


def _common_view(attributions: Sequence[Any]) -> np.ndarray:
    """Which features are in view of all models, (sample, feature)."""
    values = [_values(attribution) for attribution in attributions]
    carried = [view for view in map(carried_view, attributions) if view is not None]
    in_view = np.all(carried, axis=0) if carried else np.any(values, axis=0)
    return in_view if in_view.any() else np.ones_like(in_view)


def _null_scores(shares: np.ndarray, in_view: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """What models are compared by if they know nothing, (draw, model, feature), of shares (model, sample, feature)."""
    models, _, features = shares.shape
    if in_view.all():
        return rng.random((draws, models, features))
    views, number = np.unique(in_view, axis=0, return_inverse=True)  # samples with one view are relabeled alike
    sums = np.zeros((models, *views.shape))
    for of_model, summed in zip(shares, sums, strict=True):
        np.add.at(summed, number.reshape(-1), of_model)
    scores = np.empty((draws, models, features))
    for draw, model in np.ndindex(draws, models):
        labels = relabeling(rng.permutation(features), views)
        scores[draw, model] = np.take_along_axis(sums[model], labels, axis=1).sum(axis=0)
    return _mean_where(scores, in_view.sum(axis=0))


def _mean_where(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums divided by counts; NaN where nothing is counted."""
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _values(attribution: Any) -> np.ndarray:
    """The absolute values of an attribution, (sample, feature)."""
    if isinstance(attribution, xr.DataArray) and set(attribution.dims) == {"sample", "feature"}:
        attribution = attribution.transpose("sample", "feature")
    attribution = _backend.as_numpy(attribution) if ops.is_tensor(attribution) else attribution
    values = np.abs(np.asarray(attribution, "float64"))
    if values.ndim != 2:
        raise ValueError(f"An attribution must be (sample, feature). Received: shape {values.shape}")
    check_rows_finite(values, "An attribution")
    return values


def _shares(attribution: Any, in_view: np.ndarray) -> np.ndarray:
    """Absolute values that sum to 1 over what is in view of each sample; uniform where all are 0."""
    values = np.where(in_view, _values(attribution), 0)
    sums = values.sum(axis=1, keepdims=True)
    uniform = in_view / np.maximum(in_view.sum(axis=1, keepdims=True), 1)
    return np.where(sums > 0, values / np.where(sums > 0, sums, 1), uniform)
