"""Whether the features that an attribution puts first are those that a model uses: a test that it could fail."""

import difflib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import xarray as xr

from kerasfactory._arguments import generator, positive_integer
from kerasfactory.explain._engine.data import checked_attribution, chosen_samples, feature_array, progress_bar
from kerasfactory.explain._engine.outputs import checked_outputs, checked_target, predictions
from kerasfactory.explain._engine.statistics import bootstrap_interval

_CELLS = 2**22  # numbers in a block of changed inputs: 16 MiB
_DONORS = 3  # rows of the background for each sample
_NULL_SAMPLES = 500
_ROWS = 2**14  # to predict at once
_REMOVALS = ("marginal", "mean", "mask")


def faithfulness(
    model: keras.Model,
    x: Any,
    attribution: Any,
    *,
    y: Any = None,
    target: int | None = None,
    removal: str = "marginal",
    mask_value: float = 0,
    background: Any = None,
    fractions: Sequence[float] = (0.1, 0.2, 0.5),
    draws: int = 200,
    level: float = 0.05,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    seed: int = 0,
) -> xr.Dataset:
    r"""Whether the features that an attribution puts first are those that the output depends on.

    For each sample \(x\), the \(k\) features with the largest attribution, the set \(T_k\), are removed, and then all
    the others. With the model's output \(f\) (DeYoung et al. 2020, [*ERASER: A Benchmark to Evaluate Rationalized NLP
    Models*](https://arxiv.org/abs/1911.03429), section 4),

    $$
    \operatorname{comprehensiveness}_k = f(x) - f(x \setminus T_k), \qquad
    \operatorname{sufficiency}_k = f(x) - f(T_k) ,
    $$

    \(k\) being a fraction of the features, rounded, and at least 1. AOPC (area over the perturbation curve) is the mean
    over the fractions, and over the samples. A faithful attribution has a large comprehensiveness and a sufficiency
    near 0. With fine `fractions`, such as `numpy.linspace(0.05, 1, 20)`, the two are the curves known as deletion and
    insertion, subtracted from \(f(x)\).

    \(f\) is the output for the class that the model predicts for the sample, or for the one that `target` or `y` names.
    If the model has one output, which may go up or down, the differences are taken as absolute values: noise does not
    cancel, and only the comparison with the null distribution tells something.

    By itself an AOPC tells little: removing any features moves an output. The null distribution is the AOPC
    comprehensiveness of attributions that know nothing of the features and are like the given one in all else: in each
    draw the features of the attribution are relabeled, at random, in the same way for all samples. The p-value is
    one-sided,

    $$
    p = \frac{1 + \#\{\text{null} \ge \text{observed}\}}{1 + \text{draws}} .
    $$

    Relabeling each sample by itself would be the wrong comparison. Many attributions rank the features alike in all
    samples, and a single ranking drawn blindly beats the average of many in half of all cases. This has a price: a
    ranking that is the same for all samples is one guess among the possible rankings, however many samples there are.
    With 3 features its p-value stays around 1/6 or above, faithful or not.

    A removed feature keeps its place and gets another value. The model may never have seen such an input
    (Hooker et al. 2019, [*A Benchmark for Interpretability Methods in Deep Neural
    Networks*](https://arxiv.org/abs/1806.10758)), so a large change can be the model's surprise and not the
    feature's merit. And of two copies of a feature each can be removed without a change: a faithful attribution to
    either has comprehensiveness 0 then. Try more than one `removal`.

    Args:
        model: A `keras.Model` with one output for each sample, or several, of shape `(sample,)` or `(sample, output)`.
        x: An array with the features along axis 1: `(sample, feature)`, `(sample, position, channel)`, or token ids,
            `(sample, position)`.
        attribution: `(sample, feature)`, as `attribute` returns it, or any array. The largest come first, with regard
            to the sign; among equals, chance decides.
        y: The class of each sample, `(sample,)`, integers from 0: \(f\) is its output. Not with `target`.
        target: The number of the output that is \(f\).
        removal: The value that a removed feature gets. `"marginal"`: what it is in a random row of `background`; all
            features removed from a sample come from one row, and the output is the mean over three rows. `"mean"`:
            its mean in `background`; not for token ids or categories. `"mask"`: `mask_value`, for models that are
            trained to ignore it.
        background: Samples like `x`, to draw from; `x` itself if not given.
        mask_value: For `removal="mask"`.
        fractions: Of the features, each above 0 and at most 1. They come back sorted, without repetition.
        draws: Of the null distribution.
        level: The interval covers \(1 - \text{level}\); between 0 and 1.
        batch_size: Samples in a batch; as many as make 16,384 positions, at most 1,024, if not given.
        verbose: As for `capture`. The steps are the draws.
        seed: Of all that is drawn. The same seed gives the same result.

    Returns:
        xr.Dataset: With these variables.

        - `comprehensiveness`, `sufficiency` (sample, fraction), in the unit of the output. The coordinate `removed`
          (fraction) is the number \(k\) of features.
        - `aopc_comprehensiveness`, `aopc_sufficiency`: their means, one number each.
        - `null` (draw), `p_value`: as above. They need draws × fractions × samples predictions, and are therefore
          taken from 500 samples, drawn at random, if there are more, and with one row of `background` for each.
          `observed` in the attributes is the AOPC comprehensiveness of the attribution in the same samples and rows.
        - `interval` (bound: `lower`, `upper`) of `aopc_comprehensiveness`: a percentile bootstrap over the samples. The
          model, the attribution and the background stay as they are in it. NaN for a single sample.

        The attributes say `removal`, `mask_value` if it was used, `background`, `background_rows` (drawn for each
        sample), `change` (`"signed"` or `"absolute"`), `target`, `draws`, `null_samples`, `observed`, `level` and
        `seed`.

    Raises:
        ValueError: If the attribution does not fit `x`, or holds NaN; if there are fewer than 2 features; if an
            argument is out of range or unknown; if `background` has other features than `x`, or `x` has one sample and
            no background to draw from; if the model has other outputs, or they are NaN.

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
    x = feature_array("x", x)
    importance = checked_attribution(attribution, x)
    shares = _checked_fractions(fractions)
    draws = positive_integer("draws", draws)
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1. Received: level={level!r}")
    samples, features = importance.shape
    rng = generator(seed, "faithfulness")
    donors, said_of_background = _donors(x, removal, background, mask_value)
    rows = rng.integers(len(donors), size=(_DONORS if len(donors) > 1 else 1, samples))

    progress = progress_bar(draws + 1, verbose, "draw")
    outputs = checked_outputs(predictions(model, x, batch_size), "`x`")
    columns, said_of_target = _columns(outputs, y, target)
    own = outputs[np.arange(samples), columns]
    absolute = outputs.shape[1] == 1

    def changes(removed, of, rows):
        """By how much the outputs of the samples `of` fall, (set, sample), without (set, sample, feature)."""
        result = np.empty(removed.shape[:2])
        step = max(1, _CELLS // (x[0].size * len(removed) * len(rows)))
        for start in range(0, len(of), step):
            part = of[start : start + step]
            where = removed[:, None, start : start + step].reshape(
                len(removed), 1, len(part), features, *[1] * (x.ndim - 2)
            )
            changed = np.where(where, donors[rows[:, part]], x[part]).reshape(-1, *x.shape[1:])
            changed_outputs = checked_outputs(
                predictions(model, changed, batch_size), f'`x` with features removed by "{removal}"'
            )
            changed_outputs = changed_outputs.reshape(len(removed), len(rows), len(part), -1)
            without = changed_outputs[:, :, np.arange(len(part)), columns[part]].mean(axis=1)
            result[:, start : start + step] = own[part] - without
        return np.abs(result) if absolute else result

    ranks = np.argsort(np.lexsort((rng.random(importance.shape), -importance)))
    counts = np.maximum(1, np.floor(shares * features + 0.5).astype(int))
    sets = [ranks < count for count in counts] + [ranks >= count for count in counts]
    comprehensiveness, sufficiency = np.split(changes(np.stack(sets), np.arange(samples), rows), 2)
    progress.update(1)

    chosen = chosen_samples(samples, _NULL_SAMPLES, rng)
    # One row for each sample will do: its chance is the same in the observed and in the null.
    observed = float(changes(np.stack(sets[: len(counts)])[:, chosen], chosen, rows[:1]).mean())
    null = np.empty(draws)
    at_once = max(1, _ROWS // (len(counts) * len(chosen)))
    for start in range(0, draws, at_once):
        stop = min(start + at_once, draws)
        relabeled = [ranks[chosen][:, rng.permutation(features)] for _ in range(start, stop)]
        removed = np.stack([of_draw < count for of_draw in relabeled for count in counts])
        null[start:stop] = changes(removed, chosen, rows[:1]).reshape(stop - start, -1).mean(axis=1)
        progress.update(stop + 1)

    # A draw that puts the same features first is to count as such, whatever its rounding.
    rounding = 1e-6 * np.abs(own).max()
    attributes = {"removal": removal} | ({"mask_value": mask_value} if removal == "mask" else {})
    attributes |= {
        "background": said_of_background,
        "background_rows": len(rows),
        "change": "absolute" if absolute else "signed",
        "target": said_of_target,
        "draws": draws,
        "null_samples": len(chosen),
        "observed": observed,
        "level": level,
        "seed": seed,
    }
    dims = ("sample", "fraction")
    return xr.Dataset(
        {
            "comprehensiveness": (dims, comprehensiveness.T),
            "sufficiency": (dims, sufficiency.T),
            "aopc_comprehensiveness": comprehensiveness.mean(),
            "aopc_sufficiency": sufficiency.mean(),
            "null": ("draw", null),
            "p_value": (1 + np.sum(null >= observed - rounding)) / (1 + draws),
            "interval": ("bound", bootstrap_interval(comprehensiveness.mean(axis=0), np.mean, level, seed)),
        },
        {
            "sample": np.arange(samples),
            "fraction": shares,
            "removed": ("fraction", counts),
            "bound": ["lower", "upper"],
        },
        attributes,
    )


def _checked_fractions(fractions: Sequence[float]) -> np.ndarray:
    values = np.unique(np.asarray(fractions, "float64"))
    if values.size == 0 or not ((values > 0) & (values <= 1)).all():
        raise ValueError(f"`fractions` must lie above 0 and at most at 1. Received: fractions={fractions!r}")
    return values


def _donors(x: np.ndarray, removal: Any, background: Any, mask_value: float) -> tuple[np.ndarray, str]:
    """Rows that removed features take their values from, and what to say of them."""
    if removal not in _REMOVALS:
        near = difflib.get_close_matches(str(removal), _REMOVALS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"`removal` must be one of {', '.join(map(repr, _REMOVALS))}. {hint}Received: removal={removal!r}"
        )
    if removal == "mask":
        if background is not None:
            raise ValueError('`background` is not used with `removal="mask"`. Leave one of them out.')
        return np.full((1, *x.shape[1:]), mask_value, x.dtype), "none"
    if background is None and len(x) < 2:
        raise ValueError(
            f'`x` holds one sample: there is nothing else to take values from for `removal="{removal}"`. Give a '
            f"`background`, "
            'such as training data, or `removal="mask"`.'
        )
    rows = x if background is None else feature_array("background", background)
    if rows.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"`background` must hold samples like those of `x`. Received: background of shape {rows.shape}, x of "
            f"shape {x.shape}"
        )
    said = f"{'x' if background is None else 'given'}, {len(rows)} samples"
    if removal == "marginal":
        return rows, said
    if x.dtype.kind != "f":
        raise ValueError(
            f'`removal="mean"` needs numbers that have a mean; those of `x` are of dtype {x.dtype}, as token ids are. '
            f"Use "
            '"marginal" or "mask", or convert `x` to floats.'
        )
    return rows.mean(axis=0, keepdims=True, dtype="float64").astype(x.dtype), said


def _columns(outputs: np.ndarray, y: Any, target: Any) -> tuple[np.ndarray, str | int]:
    """The number of the output that is asked about, for each sample, and what to say of it."""
    samples, count = outputs.shape
    if y is not None and target is not None:
        raise ValueError("`y` and `target` both say which output is meant. Leave one of them out.")
    if target is not None:
        number = checked_target(target, count)
        return np.full(samples, number), number
    if y is None:
        return outputs.argmax(axis=1), "the output" if count == 1 else "predicted class"
    classes = np.asarray(y)
    whole = classes.shape == (samples,) and classes.dtype.kind in "biuf" and (classes == np.floor(classes)).all()
    if not whole or count == 1 or classes.min() < 0 or classes.max() >= count:
        raise ValueError(
            f"`y` must be the class of each sample, {samples} integers from 0 to {count - 1}, of a model with several "
            f"outputs"
            f"{'; this one has one, leave `y` out' if count == 1 else ''}. Received: y of shape {classes.shape}"
        )
    return classes.astype(int), "y"
