"""Whether what an attribution ranks high tells the model something: a test of each feature on labeled data.

A claim says: the attribution ranks this feature high, and the feature tells the model something about the outcome that
the other features do not. It is tested by conditional removal. The feature's values are redrawn, given the other
features, and the model's loss with the redrawn values is compared with that with the true ones (conditional permutation
importance, Strobl et al. 2008, https://doi.org/10.1186/1471-2105-9-307, tested as by conditional randomization,
Candès et al. 2018, https://arxiv.org/abs/1610.02351). A copy of another feature keeps its values when it is redrawn, so
removing it changes nothing. A shortcut that does not hold in the data at hand makes nothing worse when it is removed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import xarray as xr
from keras import ops

from kerasfactory._arguments import checked_level, generator, hint_at_codes, positive_integer
from kerasfactory._warnings import warn
from kerasfactory.explain._engine.attention import reads_tokens
from kerasfactory.explain._engine.conditional import Draws, Sampler, told_apart
from kerasfactory.explain._engine.data import (
    check_rows_finite,
    input_arrays,
    like_samples_of,
    named_inputs,
    progress_bar,
)
from kerasfactory.explain._engine.features import Table, columns_of, features_of, match, sizes_of, table_of
from kerasfactory.explain._engine.outputs import (
    check_labels,
    checked_outputs,
    loss_values,
    predictions,
    resolve_loss,
)
from kerasfactory.explain._engine.skill import skill_of
from kerasfactory.explain._engine.statistics import (
    clusters_of,
    focused_bh,
    mean_interval,
    neighbors_are_alike,
    sum_at_most_zero,
)
from kerasfactory.explain._engine.tables import check_aligned, check_table
from kerasfactory.explain._engine.view import carried_view

_RESAMPLES = 1999
_MANY_CLUSTERS = 50  # that count as much as all: from there on a formula gives what their exchanges do
_LOOKED_AT = 1000  # differences, for whether these take few values
_ALIKE = 0.02  # of their standard deviation
_SMALLEST = 1e-12  # p-value: smaller ones say no more
_FEWEST = 20  # samples, or clusters of them: fewer give neither a conditional distribution nor an interval to rely on
_DEPENDENT = (
    "Neighboring samples have similar losses, so they depend on each other or are sorted. If they depend on each "
    "other, say which belong together, with `groups` or `block`. If they are only sorted, shuffle them."
)
_DOMINANT = 0.5  # of the loss of a constant: one sample with more decides the margin alone
_NAMED = 4  # features in the name of a group, at most
_MOST_ENTRIES = 256  # of a sample that is no row of a table: each takes a regression on all others
_MANY = (
    "A sample has {} entries, and values are drawn given all others for 256 at most: its ranking can be tested as a "
    "whole, with `faithfulness`."
)
_PADDED = "It is padding in some samples: no value can be drawn for it there."
_UNTESTED = "It cannot be tested, because it is constant or there are too few samples."
_DETERMINED = 1e-5  # of a column's standard deviation: smaller residuals are rounding


def feature_claims(
    model: keras.Model,
    x: Any,
    y: Any,
    attribution: Any,
    *,
    loss: Any = None,
    feature_mask: Any = None,
    special_tokens: Sequence[int] | Sequence[str] | None = None,
    background: Any = None,
    groups: Any = None,
    block: int | None = None,
    draws: int = 5,
    margin: float = 0.01,
    level: float = 0.05,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    seed: int = 0,
) -> xr.Dataset:
    r"""Tests for each feature of a table whether the model needs it, and whether an attribution ranks it high.

    With the loss \(\ell\), the model \(f\) and \(K\) draws \(\tilde x_{ij}^{(k)}\) of feature \(j\) of sample \(i\)
    given the sample's other features \(x_{i,-j}\),

    $$
    d_{ij} = \frac{1}{K} \sum_k \ell\bigl(f(\tilde x_{ij}^{(k)}, x_{i,-j}), y_i\bigr) - \ell\bigl(f(x_i), y_i\bigr),
    \qquad \operatorname{effect}_j = \frac{1}{n} \sum_i d_{ij} .
    $$

    The effect is what the feature tells the model that the other features do not, in the unit of the loss. If that is
    nothing, a sample's own value and the \(K\) draws are exchangeable. The p-value therefore comes from exchanging, at
    random and in each cluster of samples separately, the own loss with one of the \(K + 1\) losses. It is the share of
    such exchanges whose mean is at most the observed one, and it makes no assumption about the shape of \(d_{ij}\). If
    fewer than 50 clusters make up most of the variance, it is the share among 1,999 or more drawn exchanges. Otherwise
    it is the share among all of them, by a saddlepoint approximation (Robinson 1982, [*Saddlepoint Approximations for
    Permutation Tests*](https://doi.org/10.1111/j.2517-6161.1982.tb01191.x)).

    **What the verdicts assume:**

    - The model was not trained on `x`. If it was, every feature that it has learned by heart seems to matter.
    - Samples are independent, or `groups` or `block` says which are not. Then whole clusters are exchanged and
      resampled, and draws come from one other cluster. Samples that are exact copies are one cluster. If samples that
      follow each other have similar losses, and neither is given, all verdicts are `undetermined`.
    - The draws fit the other values of the sample. A draw is the prediction of a regression of the feature on the
      others, plus a residual of a sample with a nearby fitted value. The regression is linear, has piecewise-linear
      terms, or has products too, in the columns' own units or in normal scores, with a ridge penalty; the one with the
      smallest leave-one-out error is used. Integers are rounded, and nothing is drawn outside the range of the data. A
      column of at most 20 values takes that of another sample in the same leaf of a decision tree or with a nearby
      fitted value. Before a feature is called needed, a classifier tries to tell its draws from the true values. If it
      can, the verdict is `undetermined`. It cannot find every fault: no test of conditional independence is valid for
      all distributions (Shah & Peters 2020, [*The Hardness of Conditional Independence
      Testing*](https://doi.org/10.1214/19-AOS1857)). With a few hundred samples it misses these, and a feature that
      only repeats them may be called needed: codes of more than 20 values, such as postal codes, which are treated as
      numbers; waves, such as a daily cycle over a time stamp; and products of three columns.

    **Arrays with several axes, and several inputs**, are tables as well, with a column for each entry of a sample: the
    entries of a feature are drawn one after the other, given those of all other features and inputs. Nothing is assumed
    to be independent of anything else. This needs more samples than a sample has entries, and, if `x` is not a table,
    at most 256 entries. Otherwise every verdict is `undetermined`. So is that of a feature that is out of view in some
    samples, such as padding. Token ids raise an error, also as one of several inputs, because what is drawn for another
    input would have to fit the text.

    Columns that determine each other, such as one-hot columns and near-copies, leave nothing to draw one by one. They
    are noticed, and also tested together: the result has a row for the group, named `a + b`, or `a + b + c + 9 more`.
    The data cannot tell which of its members the model needs.

    Args:
        model: A `keras.Model` with one output.
        x: Held-out data, (sample, feature): an array, or a DataFrame of numbers. The model must not have been trained
            on them. Or an array with more axes, such as a series (sample, time, variable), or, with `feature_mask`, a
            dictionary or list of arrays: see above.
        y: Labels in the form that the loss takes, one for each sample.
        attribution: (sample, feature), as from `attribute`: a number for each column of `x`, or for each feature of
            `feature_mask`.
        loss: What `model.compile` takes as `loss` for one output: a name, a `keras.losses.Loss`, a function of labels
            and outputs that gives one number for each sample, or a list or dictionary of one of these. The loss that
            the model was compiled with, if not given.
        feature_mask: The number of the feature that each column of `x` belongs to, integers (column,) from 0; -1 for
            a column that is never removed. The columns of a feature are removed and claimed together. Each column is
            a feature of its own if not given. For arrays with more axes and for several inputs as for `faithfulness`.
        special_tokens: Names of keys of the attribution that stand for nothing in `x`, as for `faithfulness`.
        background: Data to learn the distribution of the features from, (row, feature), distributed as `x`. `x` itself
            if not given.
        groups: Labels of the samples, (sample,), such as the patients that they are from: samples of one group depend
            on each other.
        block: The length of runs of a series, in samples, that depend on each other. Not with `groups`.
        draws: How often values are drawn for each feature of each sample. For each feature the model runs on
            `draws` times as many samples as `x` has.
        margin: The largest effect that counts as none, as a share of the base loss: that of the constant output that is
            best for `y`.
        level: The error level of the tests, after the adjustment. The intervals cover \(1 - \text{level}\). Between 0
            and 0.5.
        batch_size: Samples in a batch, as for `capture`.
        verbose: As for `capture`. The steps are the features.
        seed: The seed of all that is drawn: values, exchanges and the bootstrap.

    Returns:
        xr.Dataset: Over `feature`, with the names in `attribution` if it has any, and then the groups that were found.
        `plot.features` draws it.

        - `member` (feature, column): whether the test removes a column of `x`. For other arrays, the columns are the
          entries of a sample, and those of several inputs are in the order of `keras.tree.flatten`.
        - `attribution`: the mean over the samples, the sum over the columns of a feature. Of an attribution with values
          above and below 0, that of the absolute values.
        - `claimed`: whether the attribution is above the mean of all features, which is what `uniform` would give. If
          the attribution has a number for each column, a feature of several columns is compared with the mean of a
          column times their number. A claim is made only then.
        - `effect`: in the unit of the loss; above 0 if the model does worse without the feature.
        - `interval` (feature, bound: `lower`, `upper`) of the effect: a studentized bootstrap over the samples, each
          with what it adds as a donor of values; from 2,000 clusters on a normal interval.
        - `p_value`, one-sided, that the model does no worse without the feature; `p_opposite`, that it does worse by
          more than the margin.
        - `p_adjusted`: of `p_value`, so that among the claims that are supported the expected share of false ones is at
          most `level` (Focused BH, Katsevich, Sabatti & Bogomolov 2023, [*Filtering the Rejection
          Set*](https://doi.org/10.1080/01621459.2021.1920958)). Features without a claim are a family of their own.
        - `verdict`, and the `reason` for it, a sentence:

            - `supported`: a claim is made, `p_adjusted` is at most `level`, and the interval lies above 0 and not
              below the margin.
            - `refuted`: a claim is made, and the model does no worse without the feature: the interval ends below the
              margin, and `p_opposite`, adjusted likewise, is at most `level`. Never if the model does no better than a
              constant or one sample makes up most of its loss, and never of one column of a group that may matter.
            - `needed, not claimed`: no claim is made, and the model does worse without the feature.
            - `undetermined`: everything else.

        A constant feature cannot be tested. With fewer than 20 samples or clusters, or fewer samples than features,
        none can. The effects are NaN then, the p-values 1, and the verdicts `undetermined`.

        The attributes are `loss` (of the model), `base_loss`, `largest_share` (of one sample or cluster in it), `skill`
        (1 minus the ratio of the losses; 0 is no better than a constant, 1 is perfect) and its `skill_interval`,
        `samples`, `clusters`, `copies` (exact copies of other samples), `level`, `margin`, `draws` and `seed`.

    Raises:
        ValueError: If `x`, `background` or `attribution` is not (sample, feature), or they do not fit each other, or
            there are fewer than 2 features; if `x` holds token ids, which are no columns of a table; if `feature_mask`
            or `groups` does not fit `x`; if `y` is missing, does not hold one label for each sample, or does not
            hold what the loss takes; if any of them holds NaN or infinite numbers; if the model has several outputs, or
            they are not finite; if there is no loss, there are several, or it does not give a finite number for each
            sample; or if another argument is out of range.

    Warns:
        UserWarning: If samples are exact copies of others, where chance does not make them so.

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
        shares = np.tile([0.4, 0.3, 0.3, 0.0], (200, 1))
        attribution = xr.DataArray(shares, names, ("sample", "feature"))

        claims = explain.feature_claims(model, x, y, attribution, verbose=0)
        for feature in claims["feature"].values:
            print(feature, "|", claims["verdict"].sel(feature=feature).item())
            #> age | supported
            #> weight in kg | undetermined
            #> weight in lb | undetermined
            #> shoe size | undetermined
            #> weight in kg + weight in lb | supported
        ```
    """
    checked_level(level)
    if not 0 <= margin < 1:
        raise ValueError(f"`margin` must be at least 0 and below 1. Received: margin={margin!r}")
    draws = positive_integer("draws", draws)
    rng = generator(seed, "feature_claims")
    check_table(model, x, background)
    check_aligned(x=x, attribution=attribution, y=y, groups=groups)
    given = input_arrays("x", x)
    table = table_of(given, features_of(given, feature_mask))
    x, rows = _checked_rows(table, given, background)
    units = _units(given, table, feature_mask, attribution, special_tokens)
    y = _checked_labels(y, len(x))
    clusters, copies = _clusters(x, y, groups, block)
    loss = resolve_loss(model, loss)
    _refuse_tokens(model, given)
    progress = progress_bar(len(units), verbose, "feature")

    outputs = checked_outputs(predictions(model, given, batch_size), "`x`")
    check_labels(loss, y, outputs)
    own_loss = loss_values(loss, y, outputs)
    skill = skill_of(loss, y, outputs, clusters, level, rng)

    def losses_of(values, columns):
        """The losses with the columns drawn, (draw, sample)."""
        changed = np.tile(x, (draws, 1))
        changed[:, columns] = values.reshape(-1, len(columns))
        outputs = checked_outputs(predictions(model, table.inputs(changed), batch_size), "`x` with columns drawn again")
        return loss_values(loss, np.tile(y, (draws, 1)), outputs).reshape(draws, len(x))

    row_clusters = clusters if rows is x else np.arange(len(rows))
    sampler = Sampler(x, rows, clusters, row_clusters, draws, rng)
    tested = []
    for unit in units:
        tested.append(_tested(unit, sampler, own_loss, losses_of))
        progress.add(1)
    if feature_mask is None:
        groups_found = _groups(tested)
        of_column = {column: len(units) + row for row, group in enumerate(groups_found) for column in group}
        tested = [test._replace(group=of_column.get(test.unit.columns[0])) for test in tested]
        tested += [_tested(_merged(group, units), sampler, own_loss, losses_of) for group in groups_found]

    no_margin = ""
    if not skill["skill_interval"][0] > 0:
        no_margin = (
            "The model is not shown to do better than a constant, so it has nothing to lose without the feature."
        )
    elif skill["largest_share"] > _DOMINANT:
        no_margin = (
            "One sample makes up most of the loss of a constant, and so it decides the margin. Look at that sample."
        )
    is_dependent = groups is None and block is None and neighbors_are_alike(own_loss)
    variables = _judged(tested, sampler, level, margin * abs(skill["base_loss"]), no_margin, is_dependent)
    names = [test.unit.name for test in tested]
    member = np.array([np.isin(np.arange(x.shape[1]), test.unit.columns) for test in tested])
    attributes = {**skill, "samples": len(x), "clusters": int(clusters.max()) + 1, "copies": copies}
    attributes |= {"level": level, "margin": margin, "draws": draws, "seed": seed}
    return xr.Dataset(
        {
            "member": (("feature", "column"), member),
            **{name: (("feature", "bound")[: values.ndim], values) for name, values in variables.items()},
        },
        {"feature": names, "bound": ["lower", "upper"]},
        attributes,
    )


def _checked_rows(table: Table, given: Any, background: Any) -> tuple[np.ndarray, np.ndarray]:
    """The data as a table, and the rows to learn their distribution from: the same array, if they are the same."""
    x = table.columns
    check_rows_finite(x, "`x`")
    if background is None:
        return x, x
    rows = columns_of(like_samples_of(given, "background", background))
    check_rows_finite(rows, "`background`")
    return x, x if np.array_equal(rows, x) else rows


def _refuse_tokens(model: Any, given: Any) -> None:
    if any(reads_tokens(model, array) for array in named_inputs(given).values()):
        raise ValueError(
            "`x` holds token ids: a position of a text is not a column of a table, so its values cannot be drawn from "
            "other rows. Test the ranking as a whole, with `explain.faithfulness`."
        )


class _Unit(NamedTuple):
    """One column, or several that are removed together."""

    name: Any
    columns: list[int]
    share: float  # of the attribution
    is_claimed: bool  # the attribution ranks it high
    untestable: str = ""  # why its values cannot be drawn, if so


class _Test(NamedTuple):
    unit: _Unit
    losses: np.ndarray | None  # (1 + draw, sample): with own values, then with those drawn; None if it cannot be tested
    drawn: Draws | None
    group: int | None = None  # the number of the test of the group that it belongs to


def _units(given: Any, table: Table, feature_mask: Any, attribution: Any, special_tokens: Any) -> list[_Unit]:
    """The features that are tested, with what the attribution says of them."""
    count, width = int(table.feature.max()) + 1, table.feature.size
    columns = [np.flatnonzero(table.feature == number).tolist() for number in range(count)]
    is_table = isinstance(given, np.ndarray) and given.shape == table.columns.shape
    by_column = (width,) if is_table and feature_mask is not None else ()
    matched = match(attribution, given, (count, *by_column), special_tokens)
    shares, is_by_unit = sizes_of(matched.values).mean(axis=0), len(matched.kept) == count
    names = np.asarray(getattr(matched.attribution, "coords", {}).get("feature", np.arange(matched.keys)))[matched.kept]
    in_view = carried_view(matched.attribution)
    in_view = np.ones(matched.values.shape, bool) if in_view is None else in_view[:, matched.kept]
    too_many = "" if is_table or width <= _MOST_ENTRIES else _MANY.format(width)
    units = []
    for number, of_unit in enumerate(columns):
        members = [number] if is_by_unit else of_unit
        name = names[members[0]] if len(members) == 1 else _joined(names[members])
        share, tolerance = float(shares[members].sum()), 1e-6 * np.abs(shares).max()
        seen = in_view[:, members].any(axis=1)
        untestable = too_many or (_PADDED if seen.any() and not seen.all() else "")
        is_claimed = share > len(members) * shares.mean() + tolerance
        units.append(_Unit(name, of_unit, share, is_claimed, untestable))
    return units


def _joined(names: Iterable[Any]) -> str:
    """The name of features that are tested together: no longer than it takes to know it from others."""
    names = [str(name) for name in names]
    return " + ".join(names if len(names) <= _NAMED else [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} more"])


def _clusters(x: np.ndarray, y: np.ndarray, groups: Any, block: Any) -> tuple[np.ndarray, int]:
    """The cluster of each sample, and how many samples are copies: these are one cluster, unless others are given."""
    clusters = clusters_of(len(x), groups, block)
    distinct, number = np.unique(np.column_stack([x, y]), axis=0, return_inverse=True)
    copies = len(x) - len(distinct)
    # Where no column has many values, different samples may be alike.
    is_chance = max(len(np.unique(column)) for column in distinct[:, : x.shape[1]].T) <= len(distinct) / 2
    if not copies or is_chance or groups is not None or block is not None:
        return clusters, copies
    warn(
        f"{copies} of {len(x)} samples are exact copies of others. Each counts once, together with its copies. If "
        "samples depend on each other in other ways too, say which belong together, with `groups`."
    )
    return number.reshape(-1), copies


def _tested(unit: _Unit, sampler: Sampler, own_loss: np.ndarray, losses_of: Callable) -> _Test:
    x, rows, columns = sampler.x, sampler.rows, unit.columns
    varies = all((table[:, columns] != table[0, columns]).any() for table in (x, rows))
    independent = min(int(of.max()) + 1 for of in (sampler.clusters, sampler.row_clusters))
    enough = independent >= _FEWEST and min(len(x), len(rows)) >= x.shape[1]
    if not varies or not enough or unit.untestable:
        return _Test(unit, None, None)
    drawn = sampler.drawn(columns)
    moved = np.abs(drawn.values - x[:, columns]).max(axis=(0, 1))
    if (moved < _DETERMINED * rows[:, columns].std(axis=0)).all():  # the rest is rounding
        return _Test(unit, np.tile(own_loss, (1 + sampler.draws, 1)), drawn)
    losses = np.concatenate([own_loss[None], losses_of(drawn.values.astype(x.dtype), columns)])
    return _Test(unit, losses, drawn._replace(values=drawn.values[:1]))  # the others are not needed any more


def _groups(tested: list[_Test]) -> list[list[int]]:
    """Columns that determine each other, nearly: each column with those that it is determined by."""
    leader = list(range(len(tested)))

    def of(column):
        while leader[column] != column:
            column = leader[column]
        return column

    for number, test in enumerate(tested):
        for other in test.drawn.determined_by if test.drawn else []:
            leader[of(other)] = of(number)
    members: dict[int, list[int]] = {}
    for number in range(len(tested)):
        members.setdefault(of(number), []).append(number)
    return [group for group in members.values() if 1 < len(group) < len(tested)]


def _merged(group: list[int], units: list[_Unit]) -> _Unit:
    of_group = [units[number] for number in group]
    shares, claimed = [unit.share for unit in of_group], [unit.is_claimed for unit in of_group]
    name = _joined(unit.name for unit in of_group)
    while any(name == str(unit.name) for unit in units):
        name += " (together)"
    return _Unit(name, sorted(group), sum(shares), any(claimed))


def _checked_labels(y: Any, samples: int) -> np.ndarray:
    if y is None:
        raise ValueError("Give labels, `y`: without them it cannot be measured what a feature says about the outcome.")
    labels = ops.convert_to_numpy(y) if ops.is_tensor(y) else np.asarray(y)
    if labels.ndim == 0 or len(labels) != samples or labels.dtype.kind not in "biuf" or not labels.size:
        raise ValueError(
            f"`y` must hold numbers, one label for each sample, {samples}.{hint_at_codes(labels)} Received: shape "
            f"{labels.shape}, dtype {labels.dtype}"
        )
    labels = labels.reshape(samples, -1) * 1  # truth values are numbers to a loss
    check_rows_finite(labels, "`y`")
    return labels


def _judged(
    tested: list[_Test], sampler: Sampler, level: float, margin: float, no_margin: str, is_dependent: bool
) -> dict[str, np.ndarray]:
    """What was found of each feature, and the verdicts."""
    count = len(tested)
    testable = np.array([test.losses is not None for test in tested])
    found: dict[str, np.ndarray] = {
        "attribution": np.array([test.unit.share for test in tested]),
        "effect": np.full(count, np.nan),
        "interval": np.full((count, 2), np.nan),
        "p_value": np.ones(count),
        "p_opposite": np.ones(count),
    }
    if testable.any():
        losses = np.stack([test.losses for test in tested if test.losses is not None])
        found["effect"][testable] = (losses[:, 1:] - losses[:, :1]).mean(axis=(1, 2))
        found["p_value"][testable] = _exchanged(losses, sampler.clusters, 2 * count / level, sampler.rng)
        donors = [test.drawn.donors for test in tested if test.drawn is not None]
        interval, below = mean_interval(*_influences(losses, donors, sampler), level, sampler.rng, margin)
        found["interval"][testable], found["p_opposite"][testable] = interval, below
    claimed = found["claimed"] = np.array([test.unit.is_claimed for test in tested])
    adjusted = focused_bh(found["p_value"], claimed)
    found["p_adjusted"] = np.where(claimed, adjusted, focused_bh(found["p_value"], ~claimed))
    negligible = (focused_bh(found["p_opposite"], claimed) <= level) & (found["interval"][:, 1] <= margin)
    needed = (found["p_adjusted"] <= level) & (found["interval"][:, 0] > 0) & ~(found["interval"][:, 1] <= margin)
    in_order = sorted(range(count), key=lambda number: tested[number].group is not None)  # groups before their members
    both = [("", "")] * count
    for number in in_order:
        test = tested[number]
        of_group = ("", "") if test.group is None else (str(tested[test.group].unit.name), both[test.group][0])
        is_off = needed[number] and _is_off_data(test, sampler)
        both[number] = _verdict(test, needed[number], negligible[number], is_off, of_group, no_margin)
    if is_dependent:
        both = [("undetermined", _DEPENDENT)] * count
    found["verdict"], found["reason"] = (np.array([pair[part] for pair in both]) for part in (0, 1))
    return found


def _is_off_data(test: _Test, sampler: Sampler) -> bool:
    assert test.drawn is not None  # of what is needed
    columns, fitted = test.unit.columns, test.drawn.fitted if len(test.unit.columns) == 1 else None
    return told_apart(sampler, test.drawn.values[0], columns, fitted)


def _verdict(
    test: _Test, is_needed: bool, is_negligible: bool, is_off_data: bool, of_group: tuple[str, str], no_margin: str
) -> tuple[str, str]:
    """The verdict on one feature, and the reason for it; its group, if it has one, has a name and a verdict."""
    group, verdict_of_group = of_group
    if test.drawn is None:
        return "undetermined", test.unit.untestable or _UNTESTED
    if is_off_data:
        return (
            "undetermined",
            "The drawn values do not look like the data: a classifier can tell them from the real ones.",
        )
    if is_needed and test.unit.is_claimed:
        return "supported", "The model does worse when the feature is resampled, given the other features."
    if is_needed:
        return "needed, not claimed", "The model does worse without it, although its attribution is not above the mean."
    if not test.unit.is_claimed:
        return "undetermined", "Its attribution is not above the mean, so nothing is claimed about it."
    if group and verdict_of_group != "refuted":
        return "undetermined", f"It is part of “{group}”, and the data cannot tell which of these the model needs."
    if test.drawn.determined_by and not group:
        return "undetermined", "The other features nearly determine it, so the data cannot tell what it adds."
    if is_negligible and no_margin:
        return "undetermined", no_margin
    if is_negligible:
        return "refuted", "The model does no worse without it: the loss rises by less than the margin."
    return "undetermined", "The data do not decide whether the loss rises by more than the margin."


def _exchanged(losses: np.ndarray, clusters: np.ndarray, fewest: float, rng: np.random.Generator) -> np.ndarray:
    """The p-values of losses, (feature, own and then drawn, sample), from exchanging them within clusters."""
    count = int(clusters.max()) + 1
    resamples = max(_RESAMPLES, int(np.ceil(fewest)))  # so that one feature alone can be significant
    p_values = np.ones(len(losses))
    for number, of_feature in enumerate(losses):
        differences = of_feature - of_feature[0]
        if count < len(clusters):
            differences = np.stack([np.bincount(clusters, row, count) for row in differences])
        variances = differences.var(axis=0)
        differences = differences[:, variances > 0]
        are_many = variances.sum() ** 2 >= _MANY_CLUSTERS * (variances**2).sum()
        if differences.size and are_many and _are_various(differences[differences != 0][:_LOOKED_AT]):
            p_values[number] = max(sum_at_most_zero(differences), _SMALLEST)
        elif differences.size:  # a formula is no good for few terms, or few values: the exchanges themselves
            rounding, place = 1e-12 * np.abs(of_feature[0].sum()), np.arange(differences.shape[1])
            drawn = (rng.integers(len(differences), size=len(place)) for _ in range(resamples))
            at_most_own = sum(differences[rows, place].sum() <= rounding for rows in drawn)
            p_values[number] = (1 + at_most_own) / (1 + resamples)
    return p_values


def _are_various(values: np.ndarray) -> bool:
    """Whether they are many, also if those are taken for one that differ by little of their spread."""
    return len(np.unique(np.round(values / (_ALIKE * (values.std() or 1))))) > _MANY_CLUSTERS


def _influences(losses: np.ndarray, donors: list[np.ndarray], sampler: Sampler) -> tuple[np.ndarray, np.ndarray]:
    """Values (feature, value) whose means are the effects and whose spread is theirs, and the clusters of the values.

    An effect depends on the samples and on the rows that donate: both are a sample of what could have been drawn. What
    a row adds to an effect in either part is one value, or two if the rows are not the data.
    """
    differences = losses[:, 1:] - losses[:, :1]
    draws, samples = differences.shape[1:]
    effect = differences.mean(axis=(1, 2))
    centered = differences - effect[:, None, None]
    own = centered.mean(axis=1)
    rows, clusters = len(sampler.rows), sampler.clusters
    donated = np.stack(
        [np.bincount(of.reshape(-1), one.reshape(-1), rows) for of, one in zip(donors, centered, strict=True)]
    )
    if sampler.x is sampler.rows:
        return effect[:, None] + own + donated / draws, clusters
    both = np.concatenate([own / samples, donated / (draws * samples)], axis=1) * (samples + rows)
    return effect[:, None] + both, np.concatenate([clusters, sampler.row_clusters + clusters.max() + 1])
