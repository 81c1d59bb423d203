"""Whether an attribution comes from what a model has learned, and whether models trained alike agree on it."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import xarray as xr
from keras import ops
from scipy import stats

from kerasfactory import _backend
from kerasfactory._arguments import positive_integer
from kerasfactory.explain._observe import find_attention
from kerasfactory.explain._outputs import _without_nan


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


def _is_named(attribution: Any) -> bool:
    return isinstance(attribution, xr.DataArray) and "feature" in attribution.coords


def _shares(attribution: Any) -> np.ndarray:
    values = np.abs(np.asarray(attribution, "float64"))
    if values.ndim != 2:
        raise ValueError(f"An attribution must be (sample, feature). Received: shape {values.shape}")
    _without_nan(values, "An attribution")
    sums = values.sum(axis=1, keepdims=True)
    return np.where(sums > 0, values / np.where(sums > 0, sums, 1), 1 / values.shape[1])
