"""Intervals and tests that several verbs use."""

from collections.abc import Callable

import numpy as np
from scipy import stats


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
