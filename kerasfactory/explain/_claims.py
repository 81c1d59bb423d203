"""Whether what an attribution puts first tells the model something: a test of each feature on labeled data.

A claim is: the attribution ranks this feature high, and the feature tells the model something about the outcome that
the other features do not. It is tested by conditional removal. A feature's value is drawn anew, given the other
features, and the model's loss with the drawn values is set against that with the true ones (conditional permutation
importance, Strobl et al. 2008, https://doi.org/10.1186/1471-2105-9-307, tested as by conditional randomization,
Candès et al. 2018, https://arxiv.org/abs/1610.02351). A copy of another feature is thus drawn as it was, and removing
it changes nothing; a shortcut that does not hold in the data at hand makes nothing worse when it goes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import xarray as xr
from keras import ops
from scipy import stats

from kerasfactory._arguments import checked_level, generator, positive_integer
from kerasfactory.explain._engine.data import check_rows_finite, feature_array
from kerasfactory.explain._engine.outputs import checked_outputs, predictions
from kerasfactory.explain._faithfulness import _checked_attribution

_RESAMPLES = 1999
_FEWEST = 20  # samples: with fewer, neither a conditional distribution nor an interval is worth its name
_CELL = 25  # samples among which values are drawn
_LEVELS = 20  # distinct values up to which a column is drawn from its own values, and nothing between them
_KNOTS = (0.1, 0.3, 0.5, 0.7, 0.9)
_TERMS = 600  # of a regression
_LEVERAGE = 0.5  # the mean: parameters that a regression has in effect, in samples
_NUMBERS = 2**20  # resampled at a time
_RIDGES = np.logspace(-10, 0, 11)
_DETERMINED = 1e-5  # of a column's standard deviation: a residual as small as that is rounding


def feature_claims(
    model: keras.Model,
    x: Any,
    y: Any,
    attribution: Any,
    *,
    loss: Any = None,
    background: Any = None,
    draws: int = 5,
    margin: float = 0.01,
    level: float = 0.05,
    batch_size: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    r"""Tests for each feature of a table whether an attribution that ranks it high can be relied on.

    With the loss \(\ell\), the model \(f\) and \(K\) draws \(\tilde x_{ij}^{(k)}\) of feature \(j\) of sample \(i\)
    given the sample's other features \(x_{i,-j}\),

    $$
    d_{ij} = \frac{1}{K} \sum_k \ell\bigl(f(\tilde x_{ij}^{(k)}, x_{i,-j}), y_i\bigr) - \ell\bigl(f(x_i), y_i\bigr),
    \qquad \operatorname{effect}_j = \frac{1}{n} \sum_i d_{ij} .
    $$

    If feature \(j\) says nothing about the outcome that the others do not, a sample's own value and the \(K\) draws
    could change places. So the p-value comes from exchanging the own loss with one of the \(K + 1\), at random and in
    each sample by itself, and asking how often the mean is as small as it is. For one draw this is the sign-flip test.
    It needs no assumption on the shape of \(d_{ij}\), which is skewed, so that a t-test would not keep its level, and
    which for \(K > 1\) is not symmetric, so that sign flips and signed ranks would not.

    A draw is a regression of the feature on the others plus a residual from among samples with nearby fitted values.
    The regression is linear, or has piecewise-linear terms, or products too, with a ridge penalty, whichever has the
    smallest leave-one-out error, and may use up half of the data's degrees of freedom, so that no regression with many
    terms makes every feature look redundant. A column of few distinct values, or of integers, gets another sample's
    value instead.

    Where this misleads: categories are regressed as numbers, so a draw knows of the others only what moves that number;
    and what the others determine in a way that is not smooth, or with few samples, is taken for the feature's own.
    The draws are then off the data, and the model's loss there may be larger. Data that hold a shortcut support it.

    Args:
        model: A `keras.Model` with one input, (sample, feature), and one output.
        x: Held-out data, (sample, feature): an array. The model must not have been trained on them, and the samples are
            taken to be independent of each other.
        y: Labels in the form that the loss takes, one for each sample.
        attribution: (sample, feature), as from `attribute`.
        loss: What `model.compile` takes as `loss`: a name, a `keras.losses.Loss`, or a function of labels and outputs
            that gives one number a sample. The model's own if not given.
        background: Data to learn the features' distribution from, (row, feature), distributed as `x`. `x` if not given.
        level: Of the test, after Benjamini and Hochberg over all features, and 1 minus that of the intervals.
        margin: The largest effect that is none, as a share of the loss of the model's mean output, which knows nothing
            of a sample.
        draws: Draws for each sample. The model runs on `draws` times `x` for each feature.
        batch_size: Samples in a batch.
        seed: Of the draws, exchanges and bootstrap.

    Returns:
        xr.Dataset: Over `feature`, by the names in `attribution`, where it has them.

        - `attribution`: mean over the samples.
        - `effect`: in units of the loss; above 0 if the model does worse without the feature.
        - `interval` (feature, bound): of the effect, by bootstrap over samples; `lower` and `upper`.
        - `p_value`, one-sided, and `p_adjusted`, after Benjamini and Hochberg.
        - `verdict`: a claim is made where the attribution lies above the mean of all features, that is, above
          what `uniform` would give. It is `refuted` if the interval's upper bound is at most `margin` of the base loss,
          whatever the p-value: an effect of no size is none, however surely it is not 0. It is `supported` if
          `p_adjusted` is at most `level` and the interval lies above 0. All else is `undetermined`.

        A constant feature cannot be tested. Nor can any with fewer than 20 samples, or fewer than features: the effects
        are NaN, the p-values 1, and all claims `undetermined`.

        Attributes: `base_loss`, `loss` (of the model), `level`, `margin`, `draws`, `samples`, `seed`.

    Raises:
        ValueError: If `x` is no table, `y` is missing or does not fit, there is NaN anywhere, the model has no loss, or
            an argument is out of range.
    """
    checked_level(level)
    if not 0 <= margin < 1:
        raise ValueError(f"`margin` must be a number from 0 up to, but not including, 1. Received: margin={margin!r}")
    draws = positive_integer("draws", draws)
    x = _checked_table("x", x)
    shares = _checked_attribution(attribution, x).mean(axis=0)
    rows = x if background is None else _checked_table("background", background)
    if np.array_equal(rows, x):  # then the regression has seen the samples, and has to leave each out
        rows = x
    if rows.shape[1] != x.shape[1]:
        raise ValueError(f"`background` must have the columns of `x`, {x.shape[1]}. Received: {rows.shape[1]}")
    y = _checked_labels(y, len(x))
    loss_of = _loss(model, loss)

    outputs = checked_outputs(predictions(model, x, batch_size), "`x`")
    of_model = loss_of(y, outputs)
    base = float(loss_of(y, np.broadcast_to(outputs.mean(axis=0), outputs.shape)).mean())

    samples, features = x.shape
    testable = (x != x[0]).any(axis=0) & (rows != rows[0]).any(axis=0)
    if min(samples, len(rows)) < max(_FEWEST, features):
        testable[:] = False
    losses = np.tile(of_model, (features, 1 + draws, 1))  # own, then drawn
    rng = generator(seed, "feature_claims")
    for feature in np.flatnonzero(testable).tolist():
        drawn = _drawn(x, rows, feature, draws, rng)
        if drawn is not None:
            changed = np.tile(x, (draws, 1))
            changed[:, feature] = drawn.reshape(-1)
            outputs = checked_outputs(predictions(model, changed, batch_size), "`x` with a column drawn anew")
            losses[feature, 1:] = loss_of(np.concatenate([y] * draws), outputs).reshape(draws, samples)

    p_values = _exchanged(losses, level, rng)
    differences = (losses[:, 1:] - losses[:, :1]).mean(axis=1)
    effects = differences.mean(axis=1)
    intervals = np.full((features, 2), np.nan)
    if testable.any():
        of_all = stats.bootstrap(
            (differences[testable],),
            np.mean,
            axis=1,
            n_resamples=_RESAMPLES,
            batch=max(1, _NUMBERS // differences.size),
            confidence_level=1 - level,
            method="percentile",
            rng=rng,
        )
        intervals[testable] = np.stack(of_all.confidence_interval, axis=1)
    effects[~testable], p_values[~testable] = np.nan, 1
    adjusted = stats.false_discovery_control(p_values)

    claimed = shares > shares.mean() + 1e-6 * np.abs(shares).max()
    verdicts = np.full(features, "undetermined", dtype=object)
    verdicts[claimed & (adjusted <= level) & (intervals[:, 0] > 0)] = "supported"
    verdicts[claimed & (intervals[:, 1] <= margin * abs(base))] = "refuted"
    named = isinstance(attribution, xr.DataArray) and "feature" in attribution.coords
    return xr.Dataset(
        {
            "attribution": ("feature", shares),
            "effect": ("feature", effects),
            "interval": (("feature", "bound"), intervals),
            "p_value": ("feature", p_values),
            "p_adjusted": ("feature", adjusted),
            "verdict": ("feature", verdicts.astype(str)),
        },
        coords={
            "feature": attribution["feature"].values if named else np.arange(features),
            "bound": ["lower", "upper"],
        },
        attrs={
            "base_loss": base,
            "loss": float(of_model.mean()),
            "level": level,
            "margin": margin,
            "draws": draws,
            "samples": samples,
            "seed": seed,
        },
    )


def _checked_table(name: str, given: Any) -> np.ndarray:
    array = feature_array(name, given)
    if array.ndim != 2:
        raise ValueError(
            f"`{name}` must be a table, (sample, feature): claims about single features are tested for tables alone. "
            f"Received: shape {array.shape}"
        )
    check_rows_finite(array, f"`{name}`")
    return array


def _checked_labels(y: Any, samples: int) -> np.ndarray:
    if y is None:
        raise ValueError("Without labels, `y`, there is no telling what a feature says about the outcome. Give them.")
    labels = ops.convert_to_numpy(y) if ops.is_tensor(y) else np.asarray(y)
    if labels.ndim == 0 or len(labels) != samples or labels.dtype.kind not in "biuf" or not labels.size:
        raise ValueError(
            f"`y` must hold numbers, one label for each sample, {samples}. Received: shape {labels.shape}, dtype "
            f"{labels.dtype}"
        )
    labels = labels.reshape(samples, -1) * 1  # truth values are numbers to a loss
    check_rows_finite(labels, "`y`")
    return labels


def _loss(model: Any, loss: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of labels and outputs that gives the loss of each sample."""
    given = getattr(model, "loss", None) if loss is None else loss
    if given is None:
        raise ValueError("The model has no loss. Compile it with one, or give `loss`, as `model.compile` takes it.")
    function = keras.losses.get(given) if isinstance(given, str) else given
    name = getattr(function, "__name__", type(function).__name__)
    of_keras = type(function).__module__.startswith("keras") or getattr(function, "__module__", "").startswith("keras")
    if isinstance(function, keras.losses.Loss):
        function = function.call  # before the mean over samples
    if not callable(function):
        raise ValueError(
            "The loss must be one function, of one output: the name of a Keras loss, a `keras.losses.Loss`, or a "
            f"function of labels and outputs. Received: {given!r}"
        )

    def of_samples(y, outputs):
        if of_keras:
            _check_range(name, y, outputs)
        values = ops.convert_to_numpy(function(ops.convert_to_tensor(y), ops.convert_to_tensor(outputs)))
        if values.ndim == 0 or len(values) != len(y):
            raise ValueError(
                f"The loss must give a number for each sample, {len(y)} here. Received: shape {values.shape}"
            )
        values = values.reshape(len(y), -1).mean(axis=1, dtype="float64")
        if not np.isfinite(values).all():
            raise ValueError(f"The loss {name} is NaN or infinite. Look whether `y` and the outputs are what it takes.")
        return values

    return of_samples


def _check_range(name: str, y: np.ndarray, outputs: np.ndarray) -> None:
    """Whether the labels are such as the loss takes: for others, Keras gives numbers too."""
    sparse = "sparse" in name.lower()
    if y.shape[1] != (1 if sparse else outputs.shape[1]):
        raise ValueError(
            f"For the loss {name} and a model with {outputs.shape[1]} outputs, `y` must hold "
            f"{1 if sparse else outputs.shape[1]} numbers for each sample. Received: {y.shape[1]}"
        )
    if "crossentropy" in name.lower():
        largest = outputs.shape[1] - 1 if sparse else 1
        if y.min() < 0 or y.max() > largest or (sparse and (y != np.floor(y)).any()):
            raise ValueError(
                f"For the loss {name}, `y` must hold {'integers' if sparse else 'numbers'} from 0 to {largest}. "
                f"Received: from {y.min()} to {y.max()}"
            )


def _exchanged(losses: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """The p-value of each feature: how often its mean loss is as small, if own and drawn values change places."""
    features, alternatives, samples = losses.shape
    resamples = max(_RESAMPLES, int(np.ceil(2 * features / level)))  # so that one feature alone can be significant
    own = losses[:, 0].mean(axis=1)
    rows = np.ascontiguousarray(losses.transpose(2, 1, 0)).reshape(-1, features)  # what is taken lies together
    starts = np.arange(samples) * alternatives
    as_small = np.zeros(features, int)
    for _ in range(resamples):
        mean = rows.take(starts + rng.integers(alternatives, size=samples), axis=0).mean(axis=0)
        as_small += mean <= own + 1e-12 * np.abs(own)
    return (1 + as_small) / (1 + resamples)


def _drawn(x: np.ndarray, rows: np.ndarray, feature: int, draws: int, rng: np.random.Generator) -> np.ndarray | None:
    """Draws (draw, sample) of a column of `x` given the others, as in `rows`; `None` if the others determine it."""
    column = rows[:, feature].astype("float64")
    location, residual, at_x = _regressed(rows, x, feature)
    if max(residual.std(), (x[:, feature] - at_x).std()) < _DETERMINED * column.std():
        return None
    order = np.argsort(location, kind="stable")
    count = max(1, len(rows) // _CELL)
    cell = np.minimum(np.searchsorted(location[order], at_x) * count // len(rows), count - 1)
    first, last = -(-cell * len(rows) // count), -(-(cell + 1) * len(rows) // count)
    donors = order[rng.integers(first, last, size=(draws, len(x)))]
    whole = (column == np.floor(column)).all() or len(np.unique(column)) <= _LEVELS
    return (column[donors] if whole else at_x + residual[donors]).astype(x.dtype)


def _regressed(rows: np.ndarray, x: np.ndarray, feature: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A column of `rows` by the others: fitted values, residuals, and the fitted values at `x`.

    Residuals must be to the fitted values as a sample's own value is to its own fitted value, or draws would be more
    spread out than values are, and any removal would seem to do harm. Of new samples these are leave-one-out; of the
    samples of the regression itself they are its own, which are not correlated with what is fitted.
    """
    column = rows[:, feature].astype("float64")
    best, smallest = None, np.inf
    for terms, terms_at_x in _designs(np.delete(rows, feature, axis=1), np.delete(x, feature, axis=1)):
        mean, target = terms.mean(axis=0), column - column.mean()
        terms, terms_at_x = terms - mean, terms_at_x - mean
        # By the eigenvectors of the normal equations all penalties cost one decomposition.
        values, vectors = np.linalg.eigh(terms.T @ terms)
        scores, values = terms @ vectors, np.maximum(values, 0)
        squares = scores**2
        for ridge in _RIDGES * (values[-1] or 1.0):
            weights = scores.T @ target / (values + ridge)
            leverage = 1 / len(rows) + squares @ (1 / (values + ridge))
            fitted = scores @ weights
            error = (target - fitted) / np.maximum(1 - leverage, 1e-9)
            if error @ error < smallest and leverage.mean() - 1 / len(rows) <= _LEVERAGE:
                smallest = error @ error
                if x is rows:
                    best = (column.mean() + fitted, target - fitted, column.mean() + fitted)
                else:
                    best = (column - error, error, column.mean() + terms_at_x @ (vectors @ weights))
    assert best is not None  # the largest ridge uses up half of a linear regression, which has fewer terms than samples
    return best


def _designs(rows: np.ndarray, x: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Terms of regressions at `rows` and `x`: linear, piecewise linear, with products; as many as there is data for."""
    spread = rows.std(axis=0, dtype="float64")
    rows, x = ((table[:, spread > 0] - rows[:, spread > 0].mean(axis=0)) / spread[spread > 0] for table in (rows, x))
    rows, x = rows.astype("float64"), x.astype("float64")
    if not rows.shape[1]:  # all other columns are constant
        rows, x = np.zeros((len(rows), 1)), np.zeros((len(x), 1))
    yield rows, x
    hinges = []
    for number, column in enumerate(rows.T):
        distinct = np.unique(column)
        knots = distinct[1:-1] if len(distinct) <= len(_KNOTS) + 2 else np.unique(np.quantile(column, _KNOTS))
        hinges += [(number, knot) for knot in knots]
    pairs = [(one, other) for one in range(rows.shape[1]) for other in range(one)]
    terms = [rows, x]
    for more in (
        [lambda table, n=number, k=knot: np.maximum(table[:, n] - k, 0) for number, knot in hinges],
        [lambda table, a=one, b=other: table[:, a] * table[:, b] for one, other in pairs],
    ):
        if more and terms[0].shape[1] + len(more) <= min(_TERMS, len(rows) // 2):
            terms = [
                np.column_stack([part, *(term(table) for term in more)])
                for part, table in zip(terms, (rows, x), strict=True)
            ]
            yield terms[0], terms[1]
