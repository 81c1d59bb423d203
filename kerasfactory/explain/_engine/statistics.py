"""Intervals and tests that several verbs use."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import special, stats

from kerasfactory._arguments import positive_integer

_RESAMPLES = 1999
_NORMAL_FROM = 2000  # clusters: with more, the studentized mean is normal to the precision of its resampling
_ORDERED = 0.001  # the error level at which samples are found to depend on those before them
_WEIGHTS = 2**20  # of resamples, at once
_STEPS = 60  # of Newton's method, at most; some ten are enough
_CENTER = 1e-4  # standard errors from the mean within which half of all sums lie below


def clusters_of(samples: int, groups: Any, block: int | None) -> np.ndarray:
    """The number of each sample's cluster, (sample,): what depends on each other stays together when it is resampled.

    `groups` are labels of the samples, as of patients or days; `block` cuts a series into runs of so many samples.
    Without either, each sample is its own cluster.
    """
    if groups is not None and block is not None:
        raise ValueError("`groups` and `block` both say which samples belong together. Leave one of them out.")
    if block is not None:
        return np.arange(samples) // positive_integer("block", block)
    if groups is None:
        return np.arange(samples)
    labels = np.asarray(groups)
    if labels.shape == (samples,) and any(label is None or label != label for label in labels.tolist()):
        raise ValueError(
            "`groups` has missing labels (None or NaN), which would count as one group. Give each of these samples a "
            "label of its own, or leave them out of `x`, `y` and `groups`."
        )
    if labels.shape != (samples,):
        raise ValueError(
            f"`groups` must hold one label for each of the {samples} samples of `x`, such as the patient it is from. "
            f"Received: groups of shape {labels.shape}"
        )
    _, first, number = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]  # in the order of their first samples, whatever the labels are


def mean_interval(
    values: np.ndarray, clusters: np.ndarray, level: float, rng: np.random.Generator, threshold: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    r"""The interval of the means over the last axis, (…, bound), and p-values of their being below the threshold, (…,).

    The interval is that of the studentized bootstrap (Efron & Tibshirani 1993, section 12.5) over the clusters: skewed
    values need it. From 2,000 clusters on it is the normal one. For fewer than 2 clusters it is NaN, and the p-value 1.
    """
    flat = values.reshape(-1, values.shape[-1])
    count = int(clusters.max()) + 1
    if count < 2:
        return np.full((*values.shape[:-1], 2), np.nan), np.ones(values.shape[:-1])
    mean = flat.mean(axis=1)
    sizes = np.bincount(clusters, minlength=count)
    # What a cluster adds to the sum of deviations from the mean: its mean over the clusters is 0.
    deviations = np.stack([np.bincount(clusters, row, minlength=count) for row in flat - mean[:, None]], axis=1)
    error = np.sqrt((deviations**2).sum(axis=0)) / values.shape[-1]
    if count >= _NORMAL_FROM:
        quantiles = np.repeat(stats.norm.ppf([[1 - level / 2], [level / 2]]), len(flat), axis=1)
        below = stats.norm.cdf((mean - threshold) / np.where(error > 0, error, 1))
    else:
        studentized = np.where(error > 0, _studentized(deviations, sizes, rng), 0)
        quantiles = np.nanquantile(studentized, [1 - level / 2, level / 2], axis=0)
        observed = (mean - threshold) / np.where(error > 0, error, 1)
        below = (1 + (studentized <= observed).sum(axis=0)) / (1 + len(studentized))
    below = np.where(error > 0, below, mean >= threshold)
    interval = np.stack([mean - quantiles[0] * error, mean - quantiles[1] * error], axis=-1)
    return interval.reshape(*values.shape[:-1], 2), np.asarray(below, "float64").reshape(values.shape[:-1])


def _studentized(deviations: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How far the mean of resampled clusters lies from that of all, in its own standard errors: (resample, …)."""
    count = len(sizes)
    parts, step = [], max(1, _WEIGHTS // count)
    for start in range(0, _RESAMPLES, step):
        drawn = rng.integers(count, size=(min(step, _RESAMPLES - start), count))
        offsets = np.arange(len(drawn))[:, None] * count
        weights = (
            np.bincount((drawn + offsets).reshape(-1), minlength=drawn.size).reshape(drawn.shape).astype("float64")
        )
        total = (weights @ sizes)[:, None]
        mean = weights @ deviations / total
        squares = weights @ deviations**2 - 2 * mean * (weights @ (deviations * sizes[:, None]))
        error = np.sqrt(np.maximum(squares + mean**2 * (weights @ sizes**2)[:, None], 0)) / total
        parts.append(np.divide(mean, error, out=np.full_like(mean, np.nan), where=error > 0))
    return np.concatenate(parts)


def sum_at_most_zero(values: np.ndarray) -> float:
    r"""The chance that a sum is at most 0 to which each term adds one of its values, all alike: (value, term).

    It is the saddlepoint approximation: with the cumulant generating function \(K\) of the sum, \(K'(t) = 0\),
    \(w = \operatorname{sgn}(t) \sqrt{-2 K(t)}\) and \(u = t \sqrt{K''(t)}\), it is \(\Phi(w + \log(u / w) / w)\)
    (Barndorff-Nielsen 1986, https://doi.org/10.1093/biomet/73.2.307; Robinson 1982,
    https://doi.org/10.1111/j.2517-6161.1982.tb01191.x, for permutations).
    """

    def cumulants(t):
        logits = t * values
        largest = logits.max(axis=0)
        weights = np.exp(logits - largest)
        total = weights.sum(axis=0)
        weights /= total
        mean = (weights * values).sum(axis=0)
        variance = (weights * values**2).sum() - (mean**2).sum()
        return (np.log(total / len(values)) + largest).sum(), mean.sum(), max(variance, 0.0)

    tilt, low, high = 0.0, -np.inf, np.inf
    log_mean, mean, variance = cumulants(tilt)
    unit = 1 / np.sqrt(variance)
    for _ in range(_STEPS):
        low, high = (low, tilt) if mean > 0 else (tilt, high)
        step = -mean / variance if variance > 0 else np.nan
        if not low < tilt + step < high:  # halfway to the bound, or on, if there is none yet
            step = (low + high) / 2 - tilt if np.isfinite(low + high) else np.sign(-mean) * (abs(tilt) + unit)
        if abs(step) < 1e-9 * unit:
            break
        tilt += step
        log_mean, mean, variance = cumulants(tilt)
    root, scaled = np.sign(tilt) * np.sqrt(max(-2 * log_mean, 0.0)), tilt * np.sqrt(variance)
    if abs(root) < _CENTER:
        return 0.5
    if not scaled:  # there is no sum below: all terms have their smallest values
        return float(np.exp(log_mean))
    return float(special.ndtr(root + np.log(scaled / root) / root))


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable,
    level: float,
    seed: int | np.random.Generator,
    resamples: int = 2000,
    batch: int = 100,
) -> np.ndarray:
    """The percentile interval of a statistic over the last axis, (…, bound); NaN if there is nothing to resample."""
    if values.size == 0 or values.shape[-1] < 2 or np.isnan(values).any():
        return np.full((*values.shape[:-1], 2), np.nan)
    result = stats.bootstrap(
        (values,),
        statistic,
        axis=-1,
        n_resamples=resamples,
        batch=batch,
        confidence_level=1 - level,
        method="percentile",
        rng=seed,
    )
    return np.stack(result.confidence_interval, axis=-1)


def sign_tests(values: np.ndarray, threshold: float) -> tuple[float, float]:
    """The exact p-values of the median being above the threshold, and of its not being so."""
    above = int((values > threshold).sum())
    greater, less = (stats.binomtest(above, len(values), alternative=side).pvalue for side in ("greater", "less"))
    return float(greater), float(less)


def focused_bh(p_values: np.ndarray, in_focus: np.ndarray) -> np.ndarray:
    r"""P-values adjusted so that the expected share of false ones among the rejections in focus is kept.

    With all \(m\) p-values that are tested,
    \(\tilde p_j = \min_{t \ge p_j} m t / \#\{i \text{ in focus}: p_i \le t\}\) (Focused BH, Katsevich, Sabatti &
    Bogomolov 2023, https://doi.org/10.1080/01621459.2021.1920958). It is 1 for what is not in focus.
    """
    adjusted = np.ones(len(p_values))
    focus = np.flatnonzero(in_focus)
    focus = focus[np.argsort(p_values[focus], kind="stable")]
    bounds = len(p_values) * p_values[focus] / np.arange(1, len(focus) + 1)
    adjusted[focus] = np.minimum(np.minimum.accumulate(bounds[::-1])[::-1], 1)
    return adjusted


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values adjusted so that the chance of any false rejection is kept, whatever their dependence (Holm 1979)."""
    order = np.argsort(p_values)
    steps = np.arange(len(order), 0, -1) * p_values[order]
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def neighbors_are_alike(values: np.ndarray) -> bool:
    """Whether values that follow each other are closer than those of independent samples would be: (sample,).

    By the correlation of ranks with those of the next value (Wald & Wolfowitz 1943,
    https://doi.org/10.1214/aoms/1177731358), at a level of 0.001.
    """
    ranks = stats.rankdata(values)
    if len(values) < 3 or not ranks.std():
        return False
    return bool(np.corrcoef(ranks[1:], ranks[:-1])[0, 1] * np.sqrt(len(values)) > stats.norm.isf(_ORDERED))
