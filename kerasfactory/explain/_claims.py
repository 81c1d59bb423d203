"""Whether what an attribution ranks high tells the model something: a test of each feature on labeled data.

A claim says: the attribution ranks this feature high, and the feature tells the model something about the outcome that
the other features do not. It is tested by conditional removal. The feature's values are redrawn, given the other
features, and the model's loss with the redrawn values is compared with that with the true ones (conditional permutation
importance, Strobl et al. 2008, https://doi.org/10.1186/1471-2105-9-307, tested as by conditional randomization,
Candès et al. 2018, https://arxiv.org/abs/1610.02351). A copy of another feature keeps its values when it is redrawn, so
removing it changes nothing. A shortcut that does not hold in the data at hand makes nothing worse when it is removed.
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import xarray as xr
from keras import ops
from scipy import stats

from kerasfactory._arguments import checked_level, generator, positive_integer
from kerasfactory.explain._engine.data import check_rows_finite, checked_attribution, feature_array, progress_bar
from kerasfactory.explain._engine.outputs import check_labels, checked_outputs, loss_values, predictions, resolve_loss
from kerasfactory.explain._engine.statistics import bootstrap_interval

_RESAMPLES = 1999
_FEWEST = 20  # samples: fewer give neither a conditional distribution nor an interval to rely on
_CELL = 25  # samples with nearby fitted values, among which residuals are drawn
_LEVELS = 20  # a column of at most so many distinct values is drawn from its own values, and nothing between them
_KNOTS = (0.1, 0.3, 0.5, 0.7, 0.9)
_TERMS = 600  # of a regression, at most
_LEVERAGE = 0.5  # the largest mean leverage: effective parameters of a regression per sample
_NUMBERS = 2**20  # resampled at a time
_RIDGES = np.logspace(-10, 0, 11)
_DETERMINED = 1e-5  # of a column's standard deviation: smaller residuals are rounding


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
    verbose: int | str = "auto",
    seed: int = 0,
) -> xr.Dataset:
    r"""Tests for each feature of a table whether an attribution that ranks it high can be relied on.

    With the loss \(\ell\), the model \(f\) and \(K\) draws \(\tilde x_{ij}^{(k)}\) of feature \(j\) of sample \(i\)
    given the sample's other features \(x_{i,-j}\),

    $$
    d_{ij} = \frac{1}{K} \sum_k \ell\bigl(f(\tilde x_{ij}^{(k)}, x_{i,-j}), y_i\bigr) - \ell\bigl(f(x_i), y_i\bigr),
    \qquad \operatorname{effect}_j = \frac{1}{n} \sum_i d_{ij} .
    $$

    If feature \(j\) says nothing about the outcome that the others do not, a sample's own value and the \(K\) draws are
    exchangeable. The p-value therefore comes from exchanging, at random and in each sample separately, the own loss
    with one of the \(K + 1\) losses: it is the share of such exchanges whose mean is at most the observed one. For one
    draw this is the sign-flip test. It makes no assumption on the shape of \(d_{ij}\), which is skewed, so that a
    t-test would not keep its level. For \(K > 1\) it is not symmetric, so sign flips and signed ranks would not either.

    A draw is the prediction of a regression of the feature on the others, plus a residual from a sample with a nearby
    fitted value. The regression is linear, has piecewise-linear terms, or has products too, with a ridge penalty. The
    one with the smallest leave-one-out error is used. It may spend at most half of the data's degrees of freedom, so
    that no regression with many terms makes every feature look redundant. A column of few distinct values, or of
    integers, gets another sample's value instead.

    Where this misleads: categories are regressed as numbers, so a draw knows only what moves that number. What the
    other features determine in a way that is not smooth, or that few samples do not show, is taken for the feature's
    own. The draws then lie off the data, and the model's loss there may be larger. Data that contain a shortcut support
    the claim about it.

    Args:
        model: A `keras.Model` with one input, (sample, feature), and one output.
        x: Held-out data, (sample, feature): an array. The model must not have been trained on them, and the samples are
            taken to be independent of each other.
        y: Labels in the form that the loss takes, one for each sample.
        attribution: (sample, feature), as from `attribute`.
        loss: What `model.compile` takes as `loss` for one output: a name, a `keras.losses.Loss`, a function of labels
            and outputs that gives one number for each sample, or a list or dictionary of one of these. The loss that
            the model was compiled with, if not given.
        background: Data to learn the distribution of the features from, (row, feature), distributed as `x`. `x` itself
            if not given.
        draws: How often values are drawn for each feature of each sample. For each feature the model runs on
            `draws` times as many samples as `x` has.
        margin: The largest effect that counts as none, as a share of the base loss: that of the model's mean output,
            which says nothing about a sample.
        level: The error level of the test, after the adjustment by Benjamini and Hochberg for all features. The
            intervals cover \(1 - \text{level}\). Between 0 and 0.5.
        batch_size: Samples in a batch; as many as make 16,384 positions, at most 1,024, if not given.
        verbose: As for `capture`. The steps are the features.
        seed: The seed of all that is drawn: values, exchanges and the bootstrap.

    Returns:
        xr.Dataset: Over `feature`, with the names in `attribution` if it has any. `plot.features` draws it.

        - `attribution`: the mean over the samples.
        - `effect`: in the unit of the loss; above 0 if the model does worse without the feature.
        - `interval` (feature, bound: `lower`, `upper`) of the effect: a percentile bootstrap over the samples.
        - `p_value`, one-sided, and `p_adjusted`, after Benjamini and Hochberg.
        - `verdict`: a claim is made where the attribution lies above the mean of all features, that is, above
          what `uniform` would give. It is `refuted` if the interval's upper bound is at most `margin` of the base loss,
          whatever the p-value: a negligible effect stays negligible, however certain it is that it is not 0. It is
          `supported` if `p_adjusted` is at most `level` and the interval lies above 0. Everything else is
          `undetermined`.

        A constant feature cannot be tested. With fewer than 20 samples, or fewer samples than features, none can. The
        effects are NaN then, the p-values 1, and the verdicts `undetermined`.

        The attributes are `base_loss`, `loss` (of the model), `level`, `margin`, `draws`, `samples` and `seed`.

    Raises:
        ValueError: If `x`, `background` or `attribution` is not (sample, feature), or they do not fit each other, or
            there are fewer than 2 features; if `y` is missing, does not hold one label for each sample, or does not
            hold what the loss takes; if any of them holds NaN or infinite numbers; if the model has several outputs, or
            they are not finite; if there is no loss, there are several, or it does not give a finite number for each
            sample; or if another argument is out of range.

    Example:
        ```python
        import keras
        import numpy as np
        import xarray as xr

        from kerasfactory import explain

        rng = np.random.default_rng(0)
        x = rng.normal(size=(200, 4))
        x[:, 2] = x[:, 1]  # a copy
        weights = np.array([1.0, 0.5, 0.5, 0.0])
        y = x @ weights + rng.normal(size=200)

        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, use_bias=False)])
        model.set_weights([weights[:, None]])
        model.compile(loss="mse")
        names = {"feature": ["age", "weight in kg", "weight in lb", "shoe size"]}
        attribution = xr.DataArray(np.tile([0.4, 0.3, 0.3, 0.0], (200, 1)), names, ("sample", "feature"))

        claims = explain.feature_claims(model, x, y, attribution, verbose=0)
        print(claims["verdict"].values.tolist())
        #> ['supported', 'refuted', 'refuted', 'undetermined']
        ```
    """
    checked_level(level)
    if not 0 <= margin < 1:
        raise ValueError(f"`margin` must be a number from 0 up to, but not including, 1. Received: margin={margin!r}")
    draws = positive_integer("draws", draws)
    rng = generator(seed, "feature_claims")
    x = _checked_table("x", x)
    shares = checked_attribution(attribution, x).mean(axis=0)
    rows = x if background is None else _checked_table("background", background)
    if rows.shape[1] != x.shape[1]:
        raise ValueError(f"`background` must have the columns of `x`, {x.shape[1]}. Received: {rows.shape[1]}")
    if np.array_equal(rows, x):
        rows = x  # so that `_regressed` knows that the regression has seen the samples
    samples, features = x.shape
    y = _checked_labels(y, samples)
    loss = resolve_loss(model, loss)
    progress = progress_bar(features, verbose, "feature")

    outputs = checked_outputs(predictions(model, x, batch_size), "`x`")
    check_labels(loss, y, outputs)
    own_loss = loss_values(loss, y, outputs)
    base_loss = float(loss_values(loss, y, np.broadcast_to(outputs.mean(axis=0), outputs.shape)).mean())

    testable = (x != x[0]).any(axis=0) & (rows != rows[0]).any(axis=0)
    testable &= min(samples, len(rows)) >= max(_FEWEST, features)
    losses = np.tile(own_loss, (features, 1 + draws, 1))  # with a sample's own value, then with those drawn
    for feature in range(features):
        drawn = _drawn(x, rows, feature, draws, rng) if testable[feature] else None
        if drawn is not None:
            changed = np.tile(x, (draws, 1))
            changed[:, feature] = drawn.reshape(-1)
            outputs = checked_outputs(predictions(model, changed, batch_size), "`x` with a column redrawn")
            losses[feature, 1:] = loss_values(loss, np.tile(y, (draws, 1)), outputs).reshape(draws, samples)
        progress.add(1)

    tests = _tests(losses, testable, level, rng)
    lower, upper = tests["interval"].T
    claimed = shares > shares.mean() + 1e-6 * np.abs(shares).max()
    verdicts = np.full(features, "undetermined", dtype=object)
    verdicts[claimed & (tests["p_adjusted"] <= level) & (lower > 0)] = "supported"
    verdicts[claimed & (upper <= margin * abs(base_loss))] = "refuted"
    variables = {"attribution": shares, **tests, "verdict": verdicts.astype(str)}
    names = np.asarray(getattr(attribution, "coords", {}).get("feature", np.arange(features)))
    attributes = {"base_loss": base_loss, "loss": float(own_loss.mean()), "samples": samples}
    return xr.Dataset(
        {name: (("feature", "bound")[: values.ndim], values) for name, values in variables.items()},
        {"feature": names, "bound": ["lower", "upper"]},
        attributes | {"level": level, "margin": margin, "draws": draws, "seed": seed},
    )


def _checked_table(name: str, given: Any) -> np.ndarray:
    array = feature_array(name, given)
    if array.ndim != 2:
        raise ValueError(
            f"`{name}` must be a table, (sample, feature): only the features of tables are tested. "
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


def _tests(losses: np.ndarray, testable: np.ndarray, level: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Effect, interval and p-values of each feature, from losses (feature, own and then drawn, sample)."""
    features, alternatives, samples = losses.shape
    own = losses[:, 0].mean(axis=1)
    resamples = max(_RESAMPLES, int(np.ceil(2 * features / level)))  # so that one feature alone can be significant
    # (sample and alternative, feature): what is taken together lies together in memory.
    rows = np.ascontiguousarray(losses.transpose(2, 1, 0)).reshape(-1, features)
    starts = np.arange(samples) * alternatives
    at_most_own = np.zeros(features, int)
    for _ in range(resamples):
        mean = rows.take(starts + rng.integers(alternatives, size=samples), axis=0).mean(axis=0)
        at_most_own += mean <= own + 1e-12 * np.abs(own)
    p_values = np.where(testable, (1 + at_most_own) / (1 + resamples), 1)

    differences = (losses[:, 1:] - losses[:, :1]).mean(axis=1)
    intervals = np.full((features, 2), np.nan)
    at_once = max(1, _NUMBERS // differences.size)
    intervals[testable] = bootstrap_interval(differences[testable], np.mean, level, rng, _RESAMPLES, at_once)
    return {
        "effect": np.where(testable, differences.mean(axis=1), np.nan),
        "interval": intervals,
        "p_value": p_values,
        "p_adjusted": stats.false_discovery_control(p_values),
    }


def _drawn(x: np.ndarray, rows: np.ndarray, feature: int, draws: int, rng: np.random.Generator) -> np.ndarray | None:
    """Draws (draw, sample) of a column of `x` given the others, as in `rows`; `None` if the others determine it."""
    column = rows[:, feature].astype("float64")
    fitted, residuals, fitted_at_x = _regressed(rows, x, feature)
    if max(residuals.std(), (x[:, feature] - fitted_at_x).std()) < _DETERMINED * column.std():
        return None
    # The rows in the order of their fitted values are cut into cells of equal size; donors come from a sample's cell.
    order = np.argsort(fitted, kind="stable")
    cells = max(1, len(rows) // _CELL)
    cell = np.minimum(np.searchsorted(fitted[order], fitted_at_x) * cells // len(rows), cells - 1)
    first, last = -(-cell * len(rows) // cells), -(-(cell + 1) * len(rows) // cells)
    donors = order[rng.integers(first, last, size=(draws, len(x)))]
    is_discrete = (column == np.floor(column)).all() or len(np.unique(column)) <= _LEVELS
    return (column[donors] if is_discrete else fitted_at_x + residuals[donors]).astype(x.dtype)


def _regressed(rows: np.ndarray, x: np.ndarray, feature: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The regression of a column of `rows` on the others: fitted values, residuals, and the fitted values at `x`.

    A residual must be to its fitted value what a sample's own value is to the fitted value at `x`. Otherwise draws
    would be more spread out than values are, and any removal would seem to do harm. If `x` is new to the regression,
    these are the leave-one-out residuals. If `x` is `rows`, they are the ordinary residuals, which are not correlated
    with the fitted values.
    """
    column = rows[:, feature].astype("float64")
    target = column - column.mean()
    best, smallest = None, np.inf
    for terms, terms_at_x in _designs(np.delete(rows, feature, axis=1), np.delete(x, feature, axis=1)):
        mean = terms.mean(axis=0)
        terms, terms_at_x = terms - mean, terms_at_x - mean
        # With the eigenvectors of the normal equations all penalties together cost one decomposition.
        values, vectors = np.linalg.eigh(terms.T @ terms)
        scores, values = terms @ vectors, np.maximum(values, 0)
        squares = scores**2
        for ridge in _RIDGES * (values[-1] or 1.0):
            weights = scores.T @ target / (values + ridge)
            leverage = 1 / len(rows) + squares @ (1 / (values + ridge))
            fitted = scores @ weights
            left_out = (target - fitted) / np.maximum(1 - leverage, 1e-9)
            if left_out @ left_out < smallest and leverage.mean() - 1 / len(rows) <= _LEVERAGE:
                smallest = left_out @ left_out
                if x is rows:
                    best = (column.mean() + fitted, target - fitted, column.mean() + fitted)
                else:
                    best = (column - left_out, left_out, column.mean() + terms_at_x @ (vectors @ weights))
    assert best is not None  # each of the linear terms spends at most half a degree of freedom at the largest ridge
    return best


def _designs(rows: np.ndarray, x: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Terms at `rows` and `x`: linear, then also piecewise linear, then also products; as many as the rows allow."""
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
