"""Intervals and tests that several verbs use."""

from collections.abc import Callable

import numpy as np
from scipy import stats

_RESAMPLES = 2000


def bootstrap_interval(values: np.ndarray, statistic: Callable, level: float, seed: int) -> np.ndarray:
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


def sign_tests(values: np.ndarray, threshold: float) -> tuple[float, float]:
    """The exact p-values of the median being above the threshold, and of its not being so."""
    above = int((values > threshold).sum())
    greater, less = (stats.binomtest(above, len(values), alternative=side).pvalue for side in ("greater", "less"))
    return float(greater), float(less)
