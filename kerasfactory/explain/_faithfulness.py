"""Whether the features that an attribution puts first are those that a model uses: a test that it could fail."""

import difflib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import xarray as xr
from keras import tree
from scipy import ndimage

from kerasfactory._arguments import checked_level, generator, positive_integer
from kerasfactory._warnings import warn
from kerasfactory.explain._engine.attention import reads_tokens
from kerasfactory.explain._engine.data import (
    input_arrays,
    like_samples_of,
    named_inputs,
    progress_bar,
    rows_of,
    samples_in,
)
from kerasfactory.explain._engine.features import Features, Matched, features_of, match, sizes_of
from kerasfactory.explain._engine.labels import with_rows_of
from kerasfactory.explain._engine.outputs import Outputs, checked_outputs, describe_target, outputs_of, predictions
from kerasfactory.explain._engine.statistics import clusters_of, mean_interval
from kerasfactory.explain._engine.tables import check_aligned, check_table
from kerasfactory.explain._engine.view import (
    background_view,
    carried_view,
    names_of,
    relabeled_rankings,
    reworded_rankings,
    special_keys,
    view_of,
)

_CELLS = 2**22  # numbers in a block of changed inputs: 16 MiB
_DONORS = 3  # rows of the background for each sample
_LOOKS = (
    30,
    60,
    120,
    240,
    500,
)  # samples that a draw of the null is compared in: more only if those before leave it open
_APART = 3  # standard errors of a mean difference that is far from 0
_RANKS = 2**24  # truth values in a block of relabeled rankings: 16 MiB
_ROUNDING = 1e-6  # of the largest output: one that varies less does not vary
_COMPARED = 40  # features; sets of more are hardly ever drawn twice
_KINDS = ("comprehensiveness", "sufficiency")
_REMOVALS = ("marginal", "mean", "blur", "mask")


def faithfulness(
    model: keras.Model,
    x: Any,
    attribution: Any,
    *,
    y: Any = None,
    task: str | None = None,
    target: int | str | tuple[int | str, ...] | None = None,
    feature_mask: Any = None,
    special_tokens: Sequence[int] | Sequence[str] | None = None,
    removal: str = "marginal",
    mask_value: float | None = None,
    background: Any = None,
    groups: Any = None,
    block: int | None = None,
    fractions: Sequence[float] = (0.1, 0.2, 0.5),
    draws: int = 200,
    level: float = 0.05,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    seed: int = 0,
) -> xr.Dataset:
    r"""Tests whether a model's output depends on the features that an attribution ranks first.

    For each sample \(x\), the \(k\) features with the largest attribution, the set \(T_k\), are removed, and then all
    the others. With the model's output \(f\) (DeYoung et al. 2020, [*ERASER: A Benchmark to Evaluate Rationalized NLP
    Models*](https://arxiv.org/abs/1911.03429), section 4),

    $$
    \operatorname{comprehensiveness}_k = f(x) - f(x \setminus T_k), \qquad
    \operatorname{sufficiency}_k = f(x) - f(T_k) ,
    $$

    \(k\) being a fraction of the \(n\) features in view of the sample, rounded: \(\min(\max(1, \lfloor \text{fraction}
    \cdot n + ½ \rfloor), n - 1)\), and \(n\) for the fraction 1. AOPC (area over the perturbation curve) is the mean
    over the fractions, and over the samples. A faithful attribution has a large comprehensiveness and a sufficiency
    near 0. With fine `fractions`, such as `numpy.linspace(0.05, 1, 20)`, the two are the curves known as deletion and
    insertion, subtracted from \(f(x)\).

    A feature is in view if the coordinate `in_view` of the attribution says so, as that of `attribute` does. In an
    array without that coordinate, a feature is in view if any query of any attention layer attends to it. All features
    are in view if the model has no masks, or no attention over as many keys. `special_tokens` are not in view. Features
    out of view, such as padding, are never changed and never counted. Samples with fewer than 2 features in view are
    left out.

    What \(f\) is depends on what the outputs mean, which the compiled loss or `task` says:

    - For a classification, it is the output of the class that the model predicts for the sample, or of the one that
      `target` or `y` names. If two classes have one output, it is taken as in `attribute`.
    - If \(f\) is one output that is not one of several classes, such as that of a regression, it may go up or down, and
      the differences are taken as absolute values. Then noise does not cancel, and only the comparison with the null
      distribution is informative. An attribution with values above and below 0, such as SHAP values, is ranked by its
      absolute values then.
    - For other models, `target` names one of several outputs. Without it, all count: the change is the mean over the
      outputs of the absolute differences, each divided by that output's standard deviation over the samples, and the
      mean over the rows of the background that are drawn. An output that does not vary counts as unchanged.

    By itself an AOPC says little, because removing any features moves an output. The null distribution is the AOPC
    comprehensiveness of attributions that know nothing about the features and are otherwise like the given one: in each
    draw, the features of the attribution are relabeled at random, in the same way for all samples. If features are out
    of view of a sample, its ranking is first completed by them, with their ranks in other samples that have more in
    view. Then all features are relabeled, and those in view are ranked again. So a ranking that is the same for all
    samples stays the same for all samples. This is on the safe side for attributions that differ by sample: with much
    padding, those that know nothing have a p-value of 0.05 or less in fewer than 5% of cases. The p-value is
    one-sided,

    $$
    p = \frac{1 + \#\{\text{null} \ge \text{observed}\}}{1 + \text{draws}} .
    $$

    Sufficiency is tested on the same relabelings. It should be small, so its p-value counts the draws at or below the
    observed one. The opposite p-values count the other side: a small one says that the attribution does worse than
    attributions that know nothing.

    In texts, a ranking may know nothing and still put the same words first in all of them: a few words at random, which
    may be those that decide. So if a model reads token ids, the test is made twice: with positions relabeled, and with
    words relabeled, which get each other's mean rank. The larger p-values count.

    Relabeling each sample by itself would be the wrong comparison. Many attributions rank the features alike in all
    samples, and a single ranking drawn blindly beats the average of many in half of all cases. This has a price: a
    ranking that is the same for all samples is one guess among the possible rankings, however many samples there are.
    With 3 features its p-value stays around 1/6 or above, faithful or not.

    A removed feature keeps its place and gets another value. The model may never have seen such an input (Hooker et al.
    2019, [*A Benchmark for Interpretability Methods in Deep Neural Networks*](https://arxiv.org/abs/1806.10758)), so a
    large change can come from the unusual input and not from the feature. If a feature has a copy, removing either of
    the two may change nothing: then even a faithful attribution to one of them has comprehensiveness 0. Try more than
    one `removal`.

    Args:
        model: A `keras.Model`. If it has a dictionary or list of several outputs, `target` says which is meant.
        x: An array, or a DataFrame of numbers, with the features along axis 1: `(sample, feature)`, `(sample, position,
            channel)`, or token ids, `(sample, position)`. With `feature_mask`, an array of any shape, or, for a
            model with several inputs, a dictionary or list of arrays.
        attribution: `(sample, feature)`, as `attribute` returns it, or any array. The largest come first, with regard
            to the sign, or without it where changes of the output are absolute and both signs occur; among equals,
            chance decides.
        y: The class of each sample, `(sample,)`, integers from 0: \(f\) is its output. Not with `target`.
        task: What the outputs mean: `"classification"` (one of several classes), `"multilabel"` or `"regression"`. The
            compiled loss says so if it is one of Keras and this is not given. If neither does, the outputs are numbers
            of which nothing is known.
        target: The number of the output that is \(f\). For a dictionary or list of several outputs a key, or a tuple
            that starts with it; for outputs of more axes a tuple of numbers, such as (step, quantile).
        feature_mask: Which feature each entry of a sample belongs to: integers shaped like one sample, from 0 without a
            gap, or -1 for what is never removed. It makes features of the patches of a picture
            (`explain.patches(height, width, size)`), of the variables of a series (`numpy.broadcast_to(
            numpy.arange(variables), (times, variables))`) or of both. The last axes may be missing: (height, width) is
            for all channels. For several inputs it is a dictionary or list like `x`, whose numbers continue from one
            input to the next; -1 alone leaves an input as it is. Feature k is the k-th key of the attribution that is
            not special. Without it, features are the entries of axis 1, and pictures and several inputs raise an error.
            With it, the attribution says what is in view; if it does not, everything is in view.
        special_tokens: Keys that stand for no feature, such as class, separator and padding tokens: token ids, if `x`
            holds integers, or names of features in the coordinate `feature` of the attribution. What the attribution
            says, if not given. If the attribution has more keys than there are features, those that are named here
            stand for nothing in `x`, as a class token of the model's own, and are left out.
        removal: The value that a removed feature gets. `"marginal"`: what it is in a random row of `background`; all
            features removed from a sample come from one row, and the output is the mean over three rows. Where a
            feature is out of view of that row, its value is that of another row in which it is in view; if it is in
            none, another value in view of the row. `"mean"`: its mean over the rows of `background` in which it is in
            view; not for token ids or categories. `"blur"`: its own, from the same picture, blurred by a Gaussian whose
            standard deviation is the side of a square as large as a feature. `"mask"`: `mask_value`, for models that
            are trained to ignore it.
        mask_value: For `removal="mask"`; 0 if not given.
        background: Samples like `x`, to draw from; `x` itself if not given. What is in view of them is read from the
            model, unless the attribution says that there are no masks.
        groups: Labels of samples that depend on each other, (sample,), such as patients. The intervals are those of the
            mean over such groups drawn again. The tests do not need them: they compare rankings on the same samples.
        block: For a series: the length of the runs of samples that the intervals draw again. Not with `groups`.
        fractions: Shares of the features in view, each above 0 and at most 1. They come back sorted, without
            repetition.
        draws: How often relabeled features are drawn, for the null distributions.
        level: The error level: the interval covers \(1 - \text{level}\). Between 0 and 0.5.
        batch_size: Samples in a batch, as for `capture`.
        verbose: As for `capture`. The steps are the draws.
        seed: The seed of all that is drawn. The same seed gives the same result.

    Returns:
        xr.Dataset: With these variables.

        - `comprehensiveness`, `sufficiency` (sample, fraction), in the unit of the output, NaN for a sample that is
          left out. The coordinate `removed` is the number \(k\) of features: (fraction), or (sample, fraction) where
          samples differ.
        - `aopc_comprehensiveness`, `aopc_sufficiency`: their means, one number each.
        - `null` (draw), `p_value`, `p_opposite`: the test of comprehensiveness. It uses at most 500 samples, drawn at
          random, and one row of `background` for each, because it takes up to 2 × draws × fractions × samples
          predictions. Each draw is compared with the attribution in the same samples: in 30 at first, then in 60, 120,
          240 and 500, until their mean difference is more than three standard errors. If more than `level` of the
          draws lie on either side by then, the test has failed, and goes no further. A set of features that is drawn
          more than once is predicted once. `observed` in the attributes is the AOPC comprehensiveness of the
          attribution in all of these samples and rows, and `null` is that plus the mean differences.
        - `null_sufficiency` (draw), `p_value_sufficiency`, `p_opposite_sufficiency`: the test of sufficiency, with
          `observed_sufficiency` in the attributes.
        - `interval`, `interval_sufficiency` (bound: `lower`, `upper`) of `aopc_comprehensiveness` and
          `aopc_sufficiency`: a studentized bootstrap (Efron & Tibshirani 1993, *An Introduction to the Bootstrap*,
          section 12.5) over the samples, `groups` or blocks. The model, the attribution and the background stay as they
          are in it. NaN for a single one of these.

        The attributes hold `removal`, `mask_value` if it was used, `background`, `background_rows` (drawn for each
        sample), `change` (`"signed"`, `"absolute"`, or `"absolute, relative to the standard deviation"` of all
        outputs), `task` (or `"unknown"`), `target`, `draws`, `null_samples` (the most that a draw was compared in),
        `observed`, `observed_sufficiency`, `level` and `seed`.

    Raises:
        ValueError: If the attribution does not fit `x`, or holds NaN; if there are fewer than 2 features, or no sample
            has 2 in view; if `mask_value` is given for another removal; if `special_tokens` are not found; if an
            argument is out of range or unknown; if `background` has other features than `x`, or none in view, or `x`
            has one sample and no background to draw from; if the model has other outputs, or they are NaN.

    Warns:
        UserWarning: If samples are left out because they have fewer than 2 features in view.

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
    check_table(model, x, background)
    check_aligned(x=x, attribution=attribution, y=y, groups=groups)
    table, x = x, input_arrays("x", x)
    features = features_of(x, feature_mask)
    matched = match(attribution, x, (features.total,), special_tokens)
    importance = matched.values
    shares = _checked_fractions(fractions)
    draws = positive_integer("draws", draws)
    level = checked_level(level)
    samples = len(importance)
    clusters = clusters_of(samples, groups, block)
    rng = generator(seed, "faithfulness")
    rows, background_used = _background(model, x, features, removal, background, mask_value)
    in_view, rows_in_view = _views(matched, model, x, rows, special_tokens, feature_mask, batch_size)
    ranked = _rankable(in_view)
    donors = _donors(rows, rows_in_view, in_view, features, removal, rng)
    donor = rng.integers(samples_in(donors), size=(_DONORS if samples_in(donors) > 1 else 1, samples))
    donor = np.arange(samples)[np.newaxis] if removal == "blur" else donor

    progress = progress_bar(draws + 1, verbose, "draw")
    changes, own, output_used = _change_function(model, x, features, donors, y, task, target, batch_size, removal)
    if output_used["change"] != "signed":
        importance = sizes_of(importance)
    ranks = np.argsort(np.lexsort((rng.random(importance.shape), np.where(in_view, -importance, np.inf))))
    counts = _counts(shares, in_view)
    both = np.full((2, len(counts), samples), np.nan)
    sets = _removed_sets(ranks[ranked], counts[:, ranked], in_view[ranked])
    both[..., ranked] = changes(sets.reshape(-1, *sets.shape[2:]), ranked, donor).reshape(2, len(counts), -1)
    progress.update(1)

    chosen = rng.permutation(ranked)[: _LOOKS[-1]]
    null_of = (chosen, ranks[chosen], counts[:, chosen], in_view[chosen])
    # A draw that puts the same features first counts as equal, whatever its rounding.
    rounding = 1e-6 * np.abs(own).max()
    nulls = _nulls(ranks[chosen], in_view[chosen], _words(model, x, features, chosen))
    tests = [_against_chance(changes, *null_of, donor[0], draws, of, rounding, level, rng, progress) for of in nulls]
    observed, null, null_samples, (at_least, at_most) = _least_favorable(tests)
    results: dict[str, Any] = {"p_value_sufficiency": at_most[1], "p_opposite_sufficiency": at_least[1]}
    results |= {"p_value": at_least[0], "p_opposite": at_most[0]}
    changed = both.take(ranked, axis=2)
    intervals, _ = mean_interval(changed.mean(axis=1), np.unique(clusters[ranked], return_inverse=True)[1], level, rng)
    for number, (name, suffix) in enumerate(zip(_KINDS, ("", "_sufficiency"), strict=True)):
        results[name] = (("sample", "fraction"), both[number].T)
        results[f"aopc_{name}"] = changed[number].mean()
        results[f"null{suffix}"] = ("draw", null[number])
        results[f"interval{suffix}"] = ("bound", intervals[number])
    alike = (counts[:, ranked] == counts[:, ranked[:1]]).all()
    removed = ("fraction", counts[:, ranked[0]]) if alike else (("sample", "fraction"), counts.T)
    coordinates = {"sample": np.arange(samples), "fraction": shares, "removed": removed}
    attributes = {"removal": removal} | ({"mask_value": mask_value or 0} if removal == "mask" else {})
    attributes |= {"background": background_used, "background_rows": len(donor), **output_used, "draws": draws}
    attributes |= {"null_samples": null_samples, "observed": observed[0].item()}
    attributes |= {"observed_sufficiency": observed[1].item(), "level": level, "seed": seed}
    return with_rows_of(table, xr.Dataset(results, coordinates | {"bound": ["lower", "upper"]}, attributes))


def _views(
    matched: Matched, model: keras.Model, x: Any, rows: Any, special_tokens: Any, feature_mask: Any, batch_size: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Which features are in view of the samples, and of the rows of the background, each (sample, feature).

    With a `feature_mask`, keys of the model's attention are features only if the attribution is made of them.
    """
    attribution, keys = matched.attribution, matched.keys
    if feature_mask is not None and carried_view(attribution) is None:
        special = special_keys(special_tokens, x, keys, names_of(attribution))[:, matched.kept]
        views = [
            np.broadcast_to(~special, (samples, len(matched.kept))) for samples in (samples_in(x), samples_in(rows))
        ]
        return views[0], views[1]
    in_view = view_of(attribution, model, x, keys, special_tokens, batch_size)[:, matched.kept]
    if rows is x:
        return in_view, in_view
    rows_in_view = background_view(attribution, model, rows, keys, special_tokens, batch_size)
    return in_view, rows_in_view[:, matched.kept]


def _rankable(in_view: np.ndarray) -> np.ndarray:
    """The numbers of the samples with something to rank."""
    ranked = np.flatnonzero(in_view.sum(axis=1) >= 2)
    left_out = len(in_view) - len(ranked)
    if not len(ranked):
        raise ValueError(
            f"None of the {len(in_view)} samples has 2 features in view: there is nothing to rank. Check the masks of "
            "the model, and `special_tokens`."
        )
    if left_out:
        warn(
            f"{left_out} of {len(in_view)} samples have fewer than 2 features in view: there is nothing to rank in "
            "them. They are NaN in the result, and no mean or test includes them."
        )
    return ranked


def _counts(shares: np.ndarray, in_view: np.ndarray) -> np.ndarray:
    """How many features are removed first, (fraction, sample): of those in view, and not all unless asked for."""
    sizes = in_view.sum(axis=1)
    counts = np.maximum(1, np.floor(shares[:, np.newaxis] * sizes + 0.5).astype(int))
    return np.where(shares[:, np.newaxis] < 1, np.minimum(counts, sizes - 1), sizes)


def _change_function(
    model: keras.Model,
    x: Any,
    features: Features,
    donors: Any,
    y: Any,
    task: str | None,
    target: Any,
    batch_size: int | None,
    removal: str,
) -> tuple[Callable[..., np.ndarray], np.ndarray, dict[str, Any]]:
    """A function that says by how much outputs fall without features, the outputs with all of them, and attributes."""
    found = outputs_of(model, x, task=task, target=target, batch_size=batch_size)
    columns, target_used = _columns(found, y, target)
    several = found.values.shape[1] > 1 and (y is not None or found.task == "classification")
    own, absolute = found.values, not several and found.middle is None
    if columns is None:
        spread = own.std(axis=0)
        scale = np.where(spread > _ROUNDING * np.abs(own).max(axis=0), spread, np.inf)
    else:
        own = own[np.arange(len(own)), columns]
    # Where the first of two classes is predicted, their one output falls as that of the class rises.
    sign = np.ones(len(own)) if found.middle is None else np.where(own < found.middle, -1, 1)

    def outputs_without(removed, of, donor):
        """The outputs of the samples `of`, (set, sample), with (set, sample, feature) from a row of `donors` each.

        How far they lie from their own, if all outputs count.
        """
        result = np.empty(removed.shape[0] * removed.shape[1])
        sample = np.tile(np.arange(len(of)), len(removed))
        removed = removed.reshape(len(result), -1)
        first, copies = _distinct(removed, sample)
        predicted = np.empty(len(first))
        step = max(1, _CELLS // sum(array[0].size for array in tree.flatten(x)))
        for start in range(0, len(first), step):
            part = first[start : start + step]
            number = of[sample[part]]
            others = rows_of(donors, donor[sample[part]])
            changed = features.replaced(rows_of(x, number), removed[part], others)
            outputs = predictions(model, changed, batch_size, target)
            outputs = checked_outputs(outputs, f'`x` with features removed by "{removal}"')
            if columns is None:
                predicted[start : start + step] = np.mean(np.abs(outputs - own[number]) / scale, axis=1)
            else:
                predicted[start : start + step] = outputs[np.arange(len(part)), columns[number]]
        return predicted[copies].reshape(-1, len(of))

    def changes(removed, of, rows):
        """By how much the outputs of the samples `of` fall, (set, sample), without (set, sample, feature)."""
        without = np.mean([outputs_without(removed, of, donor[of]) for donor in rows], axis=0)
        if columns is None:
            return without
        return np.abs(own[of] - without) if absolute else sign[of] * (own[of] - without)

    change = "absolute" if absolute else "signed"
    if columns is None:
        change = "absolute, relative to the standard deviation"
    return changes, own, {"change": change, "task": found.task or "unknown", "target": target_used}


def _removed_sets(ranks: np.ndarray, counts: np.ndarray, in_view: np.ndarray) -> np.ndarray:
    """Which features go for comprehensiveness, and for sufficiency: (kind, fraction, …, sample, feature).

    Of `ranks` (…, sample, feature), from 0, with what is out of view last, and `counts` (fraction, sample).
    """
    first = np.stack([ranks < count[:, np.newaxis] for count in counts])
    return np.stack([first, ~first & in_view])


def _distinct(removed: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of rows that differ, and which of these each row is like: small sets come again and again."""
    features = removed.shape[1]
    if features > _COMPARED:
        return np.arange(len(removed)), np.arange(len(removed))
    codes = removed @ (1 << np.arange(features)) + (sample << features)
    _, first, copies = np.unique(codes, return_index=True, return_inverse=True)
    return first, copies


def _words(model: keras.Model, x: Any, features: Features, chosen: np.ndarray) -> np.ndarray | None:
    """What stands in each feature of some samples, (sample, feature): the id of a word, or a number of its own."""
    words = np.tile(-1 - np.arange(features.total), (len(chosen), 1))
    for mask, array in zip(tree.flatten(features.masks), tree.flatten(x), strict=True):
        if reads_tokens(model, array):
            places = np.flatnonzero(np.broadcast_to(mask, array.shape[1:]) >= 0)
            words[:, mask[places]] = array[chosen][:, places]
    return words if (words >= 0).any() else None


def _nulls(ranks: np.ndarray, in_view: np.ndarray, words: np.ndarray | None) -> list[Callable]:
    """The ways to know nothing: by place, and in texts also by word."""
    by_place = functools.partial(relabeled_rankings, ranks, in_view)
    return [by_place] if words is None else [by_place, functools.partial(reworded_rankings, ranks, in_view, words)]


def _least_favorable(tests: list[tuple]) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Of tests against several nulls: the largest p-values, and what was observed and drawn where that is."""
    p_values = np.stack([test[3] for test in tests])  # (null, side, kind)
    chosen = [int(p_values[:, kind, kind].argmax()) for kind in (0, 1)]  # comprehensiveness is large, sufficiency small
    observed, null = (np.stack([tests[of][part][kind] for kind, of in enumerate(chosen)]) for part in (0, 1))
    return observed, null, max(test[2] for test in tests), p_values.max(axis=0)


def _against_chance(
    changes: Callable[..., np.ndarray],
    chosen: np.ndarray,
    ranks: np.ndarray,
    counts: np.ndarray,
    in_view: np.ndarray,
    donor: np.ndarray,
    draws: int,
    relabeled: Callable[[np.random.Generator], Iterator[np.ndarray]],
    rounding: float,
    level: float,
    rng: np.random.Generator,
    progress: Any,
) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """AOPC comprehensiveness and sufficiency of the ranks, (kind,), and of the same with features relabeled.

    Also the number of samples that it took, and the p-values of being as large and as small, (side, kind). Each draw is
    compared with the ranks in the same samples. It gets more of them until the mean difference is far from 0, and none
    if the test plainly fails. Who wins a comparison does not depend on which of the two is the draw. So nothing but the
    error of decisions is between these p-values and those from all samples.
    """

    def of_samples(kind, rankings, part):
        """AOPC in each sample of a part, (ranking, sample), of (ranking, sample, feature)."""
        removed = _removed_sets(rankings, counts[:, part], in_view[part])[kind]
        # One row for each sample will do: its chance is the same in the observed and in the null.
        found = changes(removed.reshape(-1, *rankings.shape[1:]), chosen[part], donor[np.newaxis])
        return found.reshape(len(counts), *rankings.shape[:2]).mean(axis=0)

    own = np.concatenate([of_samples(kind, ranks[np.newaxis], slice(None)) for kind in (0, 1)])
    relabelings = int(rng.integers(2**32))  # the same at each look
    looks = [0, *(size for size in _LOOKS if size < len(chosen)), len(chosen)]
    at_once = max(1, _RANKS // (2 * len(counts) * ranks.size))
    sums, squares, seen = np.zeros((2, draws)), np.zeros((2, draws)), np.zeros((2, draws), int)
    undecided = np.ones((2, draws), bool)
    for start, stop in itertools.pairwise(looks):
        part, rankings = slice(start, stop), relabeled(np.random.default_rng(relabelings))
        for first in range(0, draws, at_once):
            some = np.stack([ranking[part] for ranking in itertools.islice(rankings, min(at_once, draws - first))])
            for kind in np.flatnonzero(undecided[:, first : first + at_once].any(axis=1)):
                wanted = np.flatnonzero(undecided[kind, first : first + at_once])
                apart = of_samples(kind, some[wanted], part) - own[kind, part]
                sums[kind, first + wanted] += apart.sum(axis=1)
                squares[kind, first + wanted] += (apart**2).sum(axis=1)
                seen[kind, first + wanted] = stop
            progress.update(1 + int((start * draws + (stop - start) * (first + len(some))) / looks[-1]))
        difference = sums / seen
        error = np.sqrt(np.maximum(squares / seen - difference**2, 0) / seen)
        undecided &= np.abs(difference) <= _APART * error + rounding
        sides = np.stack([difference > 0, difference < 0]) & ~undecided
        undecided[(sides.mean(axis=-1) > level).all(axis=0)] = False  # many draws on both sides
        if not undecided.any():
            break
    progress.update(1 + draws)
    observed = own.mean(axis=1)
    extreme = np.stack([difference >= -rounding, difference <= rounding]).sum(axis=-1)
    return observed, observed[:, np.newaxis] + difference, stop, (1 + extreme) / (1 + draws)


def _checked_fractions(fractions: Sequence[float]) -> np.ndarray:
    values = np.unique(np.asarray(fractions, "float64"))
    if values.size == 0 or not ((values > 0) & (values <= 1)).all():
        raise ValueError(f"`fractions` must be above 0 and at most 1. Received: fractions={fractions!r}")
    return values


def _background(
    model: Any, x: Any, features: Features, removal: Any, background: Any, mask_value: float | None
) -> tuple[Any, str]:
    """The rows that removed features take their values from, and what to say of them."""
    if removal not in _REMOVALS:
        near = difflib.get_close_matches(str(removal), _REMOVALS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"`removal` must be one of {', '.join(map(repr, _REMOVALS))}. {hint}Received: removal={removal!r}"
        )
    if removal in ("mask", "blur") and background is not None:
        raise ValueError(f'`background` is not used with `removal="{removal}"`. Leave one of them out.')
    if removal == "mask":
        value = mask_value or 0
        masked = zip(tree.flatten(x), tree.flatten(features.masks), strict=True)
        if any((mask >= 0).any() and array.dtype.type(value) != value for array, mask in masked):
            raise ValueError(
                "`mask_value` must be a whole number for an `x` of integers, such as the id of a mask token. Received: "
                f"mask_value={mask_value!r}"
            )
        one = tree.map_structure(lambda array: np.full((1, *array.shape[1:]), value, array.dtype), x)
        check_table(model, one)
        return one, "none"
    if mask_value is not None:
        raise ValueError(
            f'`mask_value` is used only with `removal="mask"`. Set that, or leave `mask_value` out. Received: '
            f"mask_value={mask_value!r}, removal={removal!r}"
        )
    if removal == "blur":
        return x, "none"
    if background is None and samples_in(x) < 2:
        raise ValueError(
            f'`x` holds one sample: there is nothing else to take values from for `removal="{removal}"`. Give a '
            '`background`, such as training data, or `removal="mask"`.'
        )
    rows = x if background is None else like_samples_of(x, "background", background)
    for name, mask in named_inputs(features.masks).items():
        dtype = named_inputs(x)[name].dtype
        if removal == "mean" and dtype.kind != "f" and (mask >= 0).any():
            raise ValueError(
                f'`removal="mean"` needs numbers that have a mean; those of `x{f"[{name!r}]" if name else ""}` are of '
                f'dtype {dtype}, as token ids are. Use "marginal" or "mask", or convert them to floats.'
            )
    return rows, f"{'x' if background is None else 'given'}, {samples_in(rows)} samples"


def _donors(
    rows: Any,
    rows_in_view: np.ndarray,
    in_view: np.ndarray,
    features: Features,
    removal: str,
    rng: np.random.Generator,
) -> Any:
    """What removed features take their values from: nothing out of view in `rows` gets into view of a sample."""
    if removal == "mask":
        return rows
    if removal == "blur":
        return tree.map_structure(_blurred, rows, features.masks)
    if not rows_in_view.any():
        raise ValueError(
            "No feature is in view in any sample of `background`: there is nothing to take values from. Check the "
            "masks of the model, and `special_tokens`."
        )
    donors = rows
    for feature in np.flatnonzero(in_view.any(axis=0) & ~rows_in_view.all(axis=0)):
        missing, given = np.flatnonzero(~rows_in_view[:, feature]), np.flatnonzero(rows_in_view[:, feature])
        if len(given):
            source = np.stack([rng.choice(given, len(missing)), np.full(len(missing), feature)])
        else:  # in view in no row: any value in view, of the same row if it has one
            own = [np.flatnonzero(seen) for seen in rows_in_view]
            some = np.argwhere(rows_in_view)
            picked = [(row, rng.choice(own[row])) if len(own[row]) else tuple(rng.choice(some)) for row in missing]
            source = np.transpose(picked)
        donors = tree.map_structure(np.copy, donors) if donors is rows else donors
        _copy_features(donors, missing, int(feature), rows, source, features)
    if removal == "marginal":
        return donors
    seen = features.by_entry(np.where(rows_in_view.any(axis=0), rows_in_view, True), True)
    return tree.map_structure(
        lambda array, seen: array.mean(axis=0, keepdims=True, dtype="float64", where=seen).astype(array.dtype),
        donors,
        seen,
    )


def _blurred(pictures: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if (mask < 0).all():
        return pictures
    if pictures.ndim < 4 or pictures.dtype.kind != "f":
        raise ValueError(
            '`removal="blur"` is for pictures, arrays of floats (sample, height, width, channel). Use "marginal" or '
            f'"mean" for all else. Received: {pictures.dtype} of shape {pictures.shape}'
        )
    places = np.broadcast_to(mask, pictures.shape[1:])[..., 0]
    side = ((places >= 0).sum() / len(np.unique(places[places >= 0]))) ** (1 / places.ndim)
    return ndimage.gaussian_filter(pictures, (0, *[side] * places.ndim, 0))


def _copy_features(
    donors: Any, missing: np.ndarray, feature: int, rows: Any, source: np.ndarray, features: Features
) -> None:
    """Puts into a feature of the rows `missing` of `donors` what `source`, (row, feature) of each, has in `rows`."""
    own = features.entries(feature, rows)
    for other in np.unique(source[1]):
        chosen, places = source[1] == other, features.entries(other, rows)
        if list(map(_size, places)) != list(map(_size, own)):
            raise ValueError(
                f"Feature {feature} is in view in no sample of `background`, and feature {other} has other entries. "
                "Give a `background` in which it is in view."
            )
        for array, row, at, of in zip(tree.flatten(donors), tree.flatten(rows), own, places, strict=True):
            if at is not None and of is not None:
                array[(missing[chosen, np.newaxis], *at)] = row[(source[0, chosen, np.newaxis], *of)]


def _size(place: tuple[np.ndarray, ...] | None) -> int:
    return 0 if place is None else len(place[0]) if place else 1


def _columns(found: Outputs, y: Any, target: Any) -> tuple[np.ndarray | None, str | int]:
    """The number of the output that is asked about, for each sample (`None`: all of them), and what to say of it."""
    samples, count = found.values.shape
    if y is not None and target is not None:
        raise ValueError("`y` and `target` both say which output is meant. Leave one of them out.")
    if y is None:
        of_target = describe_target(target)
        if found.part.column is not None:
            return np.full(samples, found.part.column), of_target
        if count == 1 and found.middle is None:
            return np.zeros(samples, int), "the output" if target is None else of_target
        if found.task == "classification":
            return found.values.argmax(axis=1), "predicted class" if target is None else f"{of_target}, predicted class"
        return None, "all outputs" if target is None else f"{of_target}, all outputs"
    classes = np.asarray(y)
    whole = classes.shape == (samples,) and classes.dtype.kind in "biuf" and (classes == np.floor(classes)).all()
    if not whole or count == 1 or classes.min() < 0 or classes.max() >= count:
        raise ValueError(
            f"`y` must be the class of each sample, {samples} integers from 0 to {count - 1}, of a model with several "
            f"outputs"
            f"{'; this one has one, leave `y` out' if count == 1 else ''}. Received: y of shape {classes.shape}"
        )
    return classes.astype(int), "y"
