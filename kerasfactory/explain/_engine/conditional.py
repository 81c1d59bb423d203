"""Draws of columns of a table given its other columns, and a check whether such draws can be told from true values.

No way of drawing is right for every table: no test of conditional independence is valid for every distribution
(Shah & Peters 2020, https://doi.org/10.1214/19-AOS1857). What is drawn here is therefore checked.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats
from threadpoolctl import threadpool_limits

LEVELS = 20  # a column of at most so many distinct values takes another row's value, and nothing between them
_CELL = 25  # rows that are alike given the other columns, among which values or residuals are exchanged
_KNOTS = (0.1, 0.3, 0.5, 0.7, 0.9)
_LEAVES = (1, 5, 25)  # the smallest number of rows in a leaf of a decision tree
_DETERMINED = 0.1  # of the levels that chance gets wrong: with fewer errors the others determine a level
_TERMS = 600  # of a regression, at most
_LEVERAGE = 0.5  # the largest mean leverage: effective parameters of a regression per row
_RIDGES = np.logspace(-10, 0, 11)
_ATOM = 0.05  # of the rows: a value as frequent as that must come about again
_PREFERENCE = 0.9  # normal scores must do better than the columns' own units by that much
_SAME_SPREAD = 0.95  # of the variance of residuals' sizes: what leaves more unexplained is no finding
_TERMS_AT_ONCE = 2**22  # numbers: 32 MiB
_SELECTION = 2000  # rows on which a regression is chosen; all rows fit the one that is
_CHECKED = 1000  # pairs of a true and a drawn value by which the two may be told apart
_UNEXPLAINED = 0.02  # of the variance of a column: with less left, the others determine it
_LEANING = 0.2  # of the largest: the columns that count for that
_CERTAINTY = 0.01  # the error level at which draws are called off the data


class Regression(NamedTuple):
    """A column regressed on others, in its own unit or in normal scores."""

    fitted: np.ndarray  # (row,)
    residuals: np.ndarray  # (row,), in units of `scale`
    at: Callable[[np.ndarray], np.ndarray]  # the fitted values at other rows
    scale: Callable[[np.ndarray], np.ndarray]  # how far values lie from the fitted ones at other rows
    inverse: Callable[[np.ndarray], np.ndarray]  # from what was regressed to values of the column
    unexplained: float  # the leave-one-out error, as a share of the variance
    leaning: Callable[[], np.ndarray]  # (other,): how much each other column moves a linear fit


class Part(NamedTuple):
    """Of columns that are drawn together."""

    donors: np.ndarray  # (draw, sample): the rows whose residuals or values were taken
    fitted: np.ndarray  # (sample,): of their regression
    is_determined: bool  # nearly, by the columns that they were drawn from
    leaning: np.ndarray  # (column,) of the table: how much each counts for that


class Draws(NamedTuple):
    values: np.ndarray  # (draw, sample, column)
    donors: np.ndarray  # (draw, sample), of the first part
    fitted: np.ndarray  # (sample,), of the first part
    determined_by: list[int]  # the columns that nearly determine a single one


def normal_scores(column: np.ndarray) -> tuple[Callable, Callable]:
    """From values of a column to normal scores, by rank, and back. What is drawn stays in the range of the column."""
    values, counts = np.unique(column, return_counts=True)
    scores = special.ndtri((np.cumsum(counts) - (counts - 1) / 2) / (len(column) + 1))
    is_smooth = counts.max() <= _ATOM * len(column)
    borders = (scores[1:] + scores[:-1]) / 2

    def inverse(given):
        return np.interp(given, scores, values) if is_smooth else values[np.searchsorted(borders, given)]

    return lambda given: np.interp(given, values, scores), inverse


def regression(rows: np.ndarray, column: np.ndarray, rows_are_data: bool) -> Regression:
    """The ridge regression of a column on others, (row, other), with the smallest leave-one-out error.

    The terms are the other columns, then hinges, then products, each in their own units and in normal scores. It may
    spend at most half of the degrees of freedom, so that no regression with many terms makes every column look
    redundant.

    A residual must be to its fitted value what a sample's own value is to its fitted value. Otherwise draws would be
    more spread out than values are, and any removal would seem to do harm. If the data are new to the regression, these
    are the leave-one-out residuals. If the rows are the data, they are the ordinary residuals, which are not correlated
    with the fitted values.
    """
    to_scores, from_scores = normal_scores(column)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), _SELECTION)).astype(int)
    is_graded = is_level(column)
    best, smallest = None, np.inf
    transforms = [None if is_level(one) else normal_scores(one)[0] for one in rows.T]
    has_atom = np.unique(column, return_counts=True)[1].max() > _ATOM * len(column)
    for in_scores in (False, True):
        if has_atom and not is_graded and not in_scores:
            continue  # a fitted value plus a residual would hardly ever be the frequent value itself
        smallest *= _PREFERENCE if in_scores else 1.0
        target = to_scores(column) if in_scores and not is_graded else column
        own_scores = None if in_scores or is_graded else to_scores(target[chosen])
        for design in _designs(rows[chosen], transforms if in_scores else [None] * rows.shape[1]):
            for ridge, left_out in _ridge_fits(design(rows[chosen]), target[chosen]):
                error = left_out if own_scores is None else own_scores - to_scores(target[chosen] - left_out)
                if error @ error < smallest * (1 - 1e-9):
                    best, smallest = (in_scores, design, ridge, target), error @ error
    assert best is not None  # each of the linear terms spends at most half a degree of freedom at the largest ridge
    in_scores, design, ridge, target = best
    center, weights, fitted, leverage = _solved(design, rows, target, ridge, with_leverage=not rows_are_data)
    residuals = target - fitted
    if leverage is not None:
        residuals = residuals / np.maximum(1 - leverage, 1e-9)
        fitted = target - residuals
    total = column if is_graded else to_scores(column)
    low, high = column.min(), column.max()
    scale = _same_spread if is_graded else _scale(rows, residuals)
    return Regression(
        fitted,
        residuals / scale(rows),
        lambda given: target.mean() + (design(given) - center) @ weights,
        scale,
        from_scores if in_scores and not is_graded else lambda given: np.clip(given, low, high),
        smallest / len(chosen) / (total[chosen].var() or 1),
        lambda: _leaning(rows, transforms if in_scores else [None] * rows.shape[1], target),
    )


def _leaning(rows: np.ndarray, transforms: Sequence[Callable | None], target: np.ndarray) -> np.ndarray:
    """How much each column moves the linear fit, in standard deviations of that column."""
    result = np.zeros(rows.shape[1])
    varies = np.flatnonzero(rows.std(axis=0) > 0)
    if len(varies):
        result[varies] = np.abs(_solved(next(_designs(rows, transforms)), rows, target, 1e-8)[1])
    return result


def _same_spread(rows: np.ndarray) -> np.ndarray:
    return np.ones(len(rows))


def _scale(rows: np.ndarray, residuals: np.ndarray) -> Callable:
    """How the spread of residuals depends on the rows: a regression of their size; 1 if that finds nothing."""
    size = np.abs(residuals)
    if size.max() == 0:
        return _same_spread
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), _SELECTION)).astype(int)
    best, smallest = None, _SAME_SPREAD * size[chosen].var() * len(chosen)
    for terms in itertools.islice(_designs(rows[chosen], [None] * rows.shape[1]), 2):
        for ridge, left_out in _ridge_fits(terms(rows[chosen]), size[chosen]):
            if left_out @ left_out < smallest:
                best, smallest = (terms, ridge), left_out @ left_out
    if best is None:
        return _same_spread
    terms, ridge = best
    center, weights, _, _ = _solved(terms, rows, size, ridge)
    least, most = np.quantile(size, [0.1, 1])
    return lambda given: np.clip(size.mean() + (terms(given) - center) @ weights, least, most)


def is_level(column: np.ndarray) -> bool:
    return len(np.unique(column)) <= LEVELS


def _designs(rows: np.ndarray, transforms: Sequence[Callable | None]) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Functions from rows to the terms of a regression: linear, then also piecewise linear, then also products."""

    def transformed(table):
        columns = [one if f is None else f(one) for one, f in zip(table.T.astype("float64"), transforms, strict=True)]
        return np.column_stack(columns) if columns else np.zeros((len(table), 0))

    plain = transformed(rows)
    center, spread = plain.mean(axis=0), plain.std(axis=0)
    varies = np.flatnonzero(spread > 0)

    def linear(table):
        if not len(varies):  # all other columns are constant
            return np.zeros((len(table), 1))
        return (transformed(table)[:, varies] - center[varies]) / spread[varies]

    yield linear
    standard = linear(rows)
    most, count = min(_TERMS, len(rows) // 2), standard.shape[1]
    first, second = np.tril_indices(count, -1)
    hinged, knots = _hinges(standard, LEVELS)  # so that unordered categories have an effect each, if the rows allow it
    if count + len(knots) > most:
        hinged, knots = _hinges(standard, len(_KNOTS) + 2)

    def with_hinges(table):
        plain = linear(table)
        return np.column_stack([plain, np.maximum(plain[:, hinged] - knots, 0)])

    def with_products(table):
        terms = with_hinges(table)
        return np.column_stack([terms, terms[:, first] * terms[:, second]])

    if len(knots) and count + len(knots) <= most:
        yield with_hinges
        if len(first) and count + len(knots) + len(first) <= most:
            yield with_products


def _hinges(table: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of columns, each once for each of its knots, and the knots."""
    knots = []
    for column in table.T:
        distinct = np.unique(column)
        knots.append(distinct[1:-1] if len(distinct) <= levels else np.unique(np.quantile(column, _KNOTS)))
    return np.repeat(np.arange(len(knots)), list(map(len, knots))), np.concatenate(knots)


def _ridge_fits(terms: np.ndarray, target: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """For each penalty the leave-one-out residuals, (row,)."""
    terms, center = terms - terms.mean(axis=0), target.mean()
    # With the eigenvectors of the normal equations all penalties together cost one decomposition.
    values, vectors = np.linalg.eigh(terms.T @ terms)
    scores, values = terms @ vectors, np.maximum(values, 0)
    shrunk = 1 / (values[:, None] + _RIDGES * (values[-1] or 1.0))  # (term, penalty)
    leverages = 1 / len(terms) + scores**2 @ shrunk
    fits = center + scores @ ((scores.T @ (target - center))[:, None] * shrunk)
    for share, leverage, fitted in zip(_RIDGES, leverages.T, fits.T, strict=True):
        if leverage.mean() - 1 / len(terms) <= _LEVERAGE:
            yield share, (target - fitted) / np.maximum(1 - leverage, 1e-9)


def _solved(
    design: Callable, rows: np.ndarray, target: np.ndarray, share: float, with_leverage: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Centers and weights of terms, penalized as in `_ridge_fits`, the fitted values, and the leverage of each row.

    The terms are made for some rows at a time.
    """
    count = design(rows[:1]).shape[1]
    step = max(1, _TERMS_AT_ONCE // count)
    parts = [slice(start, start + step) for start in range(0, len(rows), step)]
    kept = design(rows) if len(parts) == 1 else None

    def terms(part):
        return design(rows[part]) if kept is None else kept

    center = sum(terms(part).sum(axis=0) for part in parts) / len(rows)
    moments, products = np.zeros((count, count)), np.zeros(count)
    for part in parts:
        centered = terms(part) - center
        moments += centered.T @ centered
        products += centered.T @ (target[part] - target.mean())
    values, vectors = np.linalg.eigh(moments)
    values = np.maximum(values, 0)
    ridge = share * (values[-1] if len(values) and values[-1] > 0 else 1.0)
    weights = vectors @ ((vectors.T @ products) / (values + ridge))
    fitted = np.concatenate([target.mean() + (terms(part) - center) @ weights for part in parts])
    if not with_leverage:
        return center, weights, fitted, None
    scaled = vectors / np.sqrt(values + ridge)
    leverage = [(((terms(part) - center) @ scaled) ** 2).sum(axis=1) for part in parts]
    return center, weights, fitted, 1 / len(rows) + np.concatenate(leverage)


# Two threads of BLAS take several times the time of one for matrices of some hundred columns.
_one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


class Sampler(NamedTuple):
    """What is needed to draw some columns of a table given all others."""

    x: np.ndarray  # (sample, column): the data
    rows: np.ndarray  # (row, column): what is learned from, maybe `x` itself
    clusters: np.ndarray  # (sample,): samples of one cluster depend on each other
    row_clusters: np.ndarray  # (row,)
    draws: int
    rng: np.random.Generator

    @_one_thread
    def drawn(self, columns: Sequence[int]) -> Draws:
        """Draws of the columns, one after the other: each given those outside and those drawn before."""
        values = np.repeat(self.x[None].astype("float64"), self.draws, axis=0)
        order = sorted(columns, key=lambda column: not is_level(self.rows[:, column]))
        given = [column for column in range(self.rows.shape[1]) if column not in columns]
        levels = [column for column in order if is_level(self.rows[:, column])]
        _, codes = np.unique(self.rows[:, levels], axis=0, return_inverse=True)
        parts = []
        if len(levels) > 1 and codes.max() < LEVELS:  # as one-hot columns are: together they are one category
            parts.append(self._part(values, given, levels, codes.reshape(-1)))
            given, order = given + levels, order[len(levels) :]
        for column in order:
            parts.append(self._part(values, given, [column], self.rows[:, column]))
            given = [*given, column]
        first = parts[0]
        leans = first.leaning >= _LEANING * max(first.leaning.max(), 1e-12)
        determined_by = np.flatnonzero(leans).tolist() if first.is_determined and len(columns) == 1 else []
        return Draws(values[:, :, columns], first.donors, first.fitted, determined_by)

    def _part(self, values: np.ndarray, given: list[int], columns: list[int], target: np.ndarray) -> Part:
        """Draws columns into `values`, (draw, sample, column): one, or several that have levels in common, `target`."""
        others, target = self.rows[:, given].astype("float64"), target.astype("float64")
        # What has not been drawn itself is the same in all draws.
        tables = values[:1] if (values[:, :, given] == values[:1, :, given]).all() else values
        tables = tables[:, :, given].reshape(-1, len(given))
        fit = regression(others, target, self.x is self.rows)
        fitted_at_x = fit.at(tables)
        labels = _cells(fit.fitted, fit.fitted), _cells(fit.fitted, fitted_at_x)
        is_determined, tree = fit.unexplained <= _UNEXPLAINED, None
        if is_level(target):
            tree, is_determined = _tree(others, target, len(columns) > 1)
            if tree is not None:
                labels = tree.apply(others), tree.apply(tables)
        leaning = np.zeros(self.x.shape[1])
        if is_determined:
            leaning[given] = fit.leaning() if tree is None else tree.feature_importances_
        at_x = np.broadcast_to(labels[1].reshape(-1, len(self.x)), values.shape[:2])
        fitted_at_x = fitted_at_x.reshape(-1, len(self.x))
        if len(np.unique(self.row_clusters)) == len(self.rows):
            donors = _members(labels[0], at_x, self.rng.random(at_x.shape))
            source = donors
        else:
            donors = self._cluster_donors(fit.fitted, fitted_at_x[0])
            source = _members(labels[0], at_x, _places(labels[0], target, self.rng)[donors], target)
        if is_level(target):
            values[:, :, columns] = self.rows[source][:, :, columns]
        else:
            scale = fit.scale(tables).reshape(-1, len(self.x))
            drawn = fit.inverse(fitted_at_x + scale * fit.residuals[donors])
            values[:, :, columns[0]] = np.floor(drawn + 0.5) if (target == np.floor(target)).all() else drawn
        return Part(donors, fitted_at_x[0], is_determined, leaning)

    def _cluster_donors(self, fitted: np.ndarray, fitted_at_x: np.ndarray) -> np.ndarray:
        """For each cluster another one with a like mean fitted value, row for row: (draw, sample)."""
        order = np.argsort(self.row_clusters, kind="stable")
        sizes = np.bincount(self.row_clusters)
        starts = np.cumsum(sizes) - sizes
        of_rows = np.bincount(self.row_clusters, fitted) / sizes
        of_x = np.bincount(self.clusters, fitted_at_x) / np.bincount(self.clusters)
        cells = np.broadcast_to(_cells(of_rows, of_x), (self.draws, len(of_x)))
        chosen = _members(_cells(of_rows, of_rows), cells, self.rng.random(cells.shape))[:, self.clusters]
        own_order = np.argsort(self.clusters, kind="stable")
        own_sizes = np.bincount(self.clusters)
        place = np.empty(len(self.x), int)
        place[own_order] = np.arange(len(self.x)) - np.repeat(np.cumsum(own_sizes) - own_sizes, own_sizes)
        return order[starts[chosen] + place % sizes[chosen]]


def _cells(fitted: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The rows in the order of their fitted values are cut into cells of equal size: the cells of other values."""
    count = max(1, len(fitted) // _CELL)
    return np.minimum(np.searchsorted(np.sort(fitted), at) * count // len(fitted), count - 1)


def _members(labels: np.ndarray, wanted: np.ndarray, places: np.ndarray, by: np.ndarray | None = None) -> np.ndarray:
    """For each wanted label a row that has it: the one at a place, from 0 to 1, in their order (that of `by`)."""
    order = np.argsort(labels, kind="stable") if by is None else np.lexsort((by, labels))
    labels = labels[order]
    first, last = np.searchsorted(labels, wanted), np.searchsorted(labels, wanted, "right")
    return order[first + (places * (last - first)).astype(int)]


def _places(labels: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where each row stands among those with its label, by its value: from 0 to 1, uniform."""
    order = np.lexsort((rng.random(len(values)), values, labels))
    first = np.searchsorted(labels[order], labels[order])
    last = np.searchsorted(labels[order], labels[order], "right")
    places = np.empty(len(values))
    places[order] = (np.arange(len(values)) - first + rng.random(len(values))) / (last - first)
    return places


def _tree(others: np.ndarray, target: np.ndarray, is_nominal: bool) -> tuple[Any, bool]:
    """A decision tree whose leaves say more of levels than the cells of their regression; whether it determines them.

    Which is better, and how small the leaves may be, is found on rows that neither has seen.
    """
    from sklearn.tree import DecisionTreeClassifier

    levels = np.unique(target, return_inverse=True)[1]
    if not others.shape[1] or 4 * (levels.max() + 1) > len(target):
        return None, False  # there is nothing to tell, or too little to learn it from
    trees = [DecisionTreeClassifier(min_samples_leaf=smallest, random_state=0) for smallest in _LEAVES]
    stump = DecisionTreeClassifier(min_samples_leaf=len(target), random_state=0)
    chosen = np.linspace(0, len(target) - 1, min(len(target), _SELECTION)).astype(int)
    first, second = chosen[::2], chosen[1::2]
    for tree in [*trees, stump]:
        tree.fit(others[first], levels[first])
    by_chance = _mismatch(np.zeros(len(second), int), levels[second])
    if (trees[0].predict(others[second]) != levels[second]).mean() <= _DETERMINED * by_chance:
        return trees[0].fit(others, levels), True  # a leaf may be a single row
    fit = regression(others[first], target[first], False)
    cells = None if is_nominal else _mismatch(_cells(fit.fitted, fit.at(others[second])), levels[second])
    found = [_mismatch(tree.apply(others[second]), levels[second]) for tree in [*trees[1:], stump]]
    if cells is not None and cells <= min(found):
        return None, False
    return [*trees[1:], stump][int(np.argmin(found))].fit(others, levels), False


def _mismatch(labels: np.ndarray, values: np.ndarray) -> float:
    """The share of others with the same label that have another value."""
    sizes = np.bincount(labels)[labels]
    pairs = np.unique(np.stack([labels, values]), axis=1, return_inverse=True)[1].reshape(-1)
    same = np.bincount(pairs)[pairs]
    return float(np.mean(np.where(sizes > 1, (sizes - same) / np.maximum(sizes - 1, 1), 1)))


def told_apart(sampler: Sampler, drawn: np.ndarray, columns: Sequence[int], fitted: np.ndarray | None) -> bool:
    """Whether a classifier finds the true values of columns beside those drawn, (sample, column), given the others.

    It learns from one half of the clusters and is tried on the other (a classifier two-sample test, Lopez-Paz & Oquab
    2017, https://arxiv.org/abs/1610.06545). The p-values are those of t-tests of how much more likely the
    classifier takes the true value to be true: both are exchangeable if the draws are right.
    """
    from sklearn.ensemble import ExtraTreesClassifier

    names = sampler.rng.permutation(np.unique(sampler.clusters))[: 2 * _CHECKED]
    chosen = np.flatnonzero(np.isin(sampler.clusters, names))
    halves = np.isin(sampler.clusters[chosen], names[::2])
    tables = np.stack([sampler.x[chosen].astype("float64")] * 2)
    tables[1][:, columns] = drawn[chosen]
    if fitted is not None:
        tables = np.concatenate([tables, tables[:, :, columns] - fitted[chosen, None]], axis=2)
    for half in (halves, ~halves):
        classifier = ExtraTreesClassifier(50, min_samples_leaf=5, max_features=None, random_state=0)
        classifier.fit(tables[:, half].reshape(-1, tables.shape[2]), np.repeat([1, 0], half.sum()))
        true, other = (classifier.predict_proba(table[~half])[:, 1] for table in tables)
        lead = np.bincount(np.unique(sampler.clusters[chosen[~half]], return_inverse=True)[1], true - other)
        # Bonferroni: each half is tested given the other.
        if lead.any() and 2 * stats.ttest_1samp(lead, 0, alternative="greater").pvalue <= _CERTAINTY:
            return True
    return False
