"""How often the verdicts on features are wrong on models like the user's own: they are tried where the truth is known.

A verdict is a claim about data of which no one knows the truth. So the same training and the same tests are run on the
user's `x` with labels that are made: permuted ones, which no feature says anything about, and ones that follow a
feature that is known.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pandas as pd
import xarray as xr
from keras import ops
from scipy import stats

from kerasfactory import _backend
from kerasfactory._arguments import checked_level, checked_seed, positive_integer
from kerasfactory.explain._attribution import attribute
from kerasfactory.explain._claims import feature_claims
from kerasfactory.explain._engine.data import check_rows_finite, feature_array, progress_bar
from kerasfactory.explain._engine.labels import given_labels
from kerasfactory.explain._engine.outputs import outputs_of
from kerasfactory.explain._engine.statistics import clusters_of

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

_SCHEMA = "kerasfactory.calibration/2"
_OWN, _PERMUTED, _PLANTED = _ARMS = ("own labels", "permuted", "planted")
_NEEDED = "needed, not claimed"
_OF_CLASSES = ("classification", "multilabel")
_WEAKEST, _STRONGEST = 0.1, 0.9  # planted, whatever skill the user's model has
_GRID = 200  # values of the feature, and of the noise, for which the share that it decides is computed


def calibrate(
    train: Callable[[Any, Any], keras.Model],
    x: Any,
    y: Any,
    *,
    method: str = "attention",
    task: str | None = None,
    target: int | str | tuple[int | str, ...] | None = None,
    layers: str | Sequence[str] | None = None,
    feature_mask: Any = None,
    groups: Any = None,
    block: int | None = None,
    n: int = 20,
    strength: float | None = None,
    level: float = 0.05,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    store: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> xr.Dataset:
    r"""Measures how often `feature_claims` is wrong, and how often it is right, on models like yours.

    A verdict is about data whose truth no one knows. Here, `train` gets your `x` with labels whose truth is known, the
    model that it returns is tested with `feature_claims`, and the verdicts are counted. There are two arms of `n`
    models each:

    - **permuted**: the labels are shuffled over the samples. No feature says anything about them, so each “supported”
      is wrong.
    - **planted**: your labels, in the order of a score. With \(z_j\), the normal scores of a feature \(j\) that is
      drawn for each model, and \(\varepsilon\), those of permuted labels, the score of sample \(i\) is

        $$
        s_i = w\, z_{ij} + \sqrt{1 - w^2}\, \varepsilon_i ,
        $$

        and the sample with the smallest score gets the smallest label (of several numbers: the first in the order of
        the first of them, then the second, and so on). So the labels have the distribution that they had, and features
        other than \(j\) say nothing about them that \(j\) does not. If \(j\) is supported, it is found; another
        supported feature is wrong.

    Each model is trained on one half of the samples and tested on the other, so give all the data that you have. The
    halves are drawn for each model, as whole `groups` if there are any. With `block`, they are the first and the second
    half of the series. `train` never gets the samples that a model is tested on. `calibrate` cannot tell whether your
    own model was trained on the samples that you test it on.

    The weight \(w\) is such that the planted feature explains the share `strength` of the variance of `y` or, for
    classes, of their entropy. If it is not given, it is the skill of a first model that is trained with your labels, 1
    - loss / loss of the best constant, but at least 0.1 and at most 0.9. One feature then says as much as all features
    of your model together. Single features of your model say less, and are found less often: a smaller `strength` shows
    how often.

    Only verdicts on features are counted. The claims about a ranking as a whole (`faithfulness`) can be true of a model
    that was trained with permuted labels, because its output still depends on its features.

    Some things can mislead. All models have your `x`, so the intervals cover other labels, halves and seeds, but no
    other data. Permuted labels are independent of each other unless `groups` or `block` is given: if your samples are
    not, say so here and to `feature_claims`. With `block`, labels are shifted along the series. If features and labels
    drift over the whole series, they are still related after the shift. The planted signal rises with its feature. A
    model may find one that rises and falls, or is in several features together, less often. `audit` adjusts its
    verdicts for all of its claims, so it supports fewer features.

    Args:
        train: A function of the arrays `(x, y)` that builds, compiles and trains a model and returns it. It is called
            `2 * n + 1` times, each time after `keras.utils.set_random_seed`. The global random state is not restored
            afterward.
        x: Your data, (sample, feature): an array or a DataFrame of finite numbers. `train` gets an array.
        y: Your labels, in the form that the model's loss takes: numbers, classes or one-hot rows, one for each sample.
        method: The method of the attribution that says which features are high, as for `attribute`.
        task: As for `attribute`.
        target: As for `attribute`.
        layers: Names of the layers, as for `capture`.
        feature_mask: Which feature each column belongs to, as for `feature_claims`, (column,). Columns of one feature
            are planted together.
        groups: Which samples belong together, as patients or days, (sample,). Whole groups exchange labels, which are
            repeated or cut where sizes differ. It is also passed to `feature_claims`.
        block: The length of the runs that a series is cut into. Labels are shifted around the series by at least as
            many samples, so that they depend on each other as before. It is also passed to `feature_claims`.
        n: How many models to train in each arm. With 20, the interval of a share is some 0.2 to 0.4 wide.
        strength: The skill that knowing the planted feature gives, between 0 and 1; that of your model if not given.
        level: The error level of the tests, as for `feature_claims`. The intervals cover 1 - `level`.
        batch_size: Samples in a batch, as for `feature_claims`.
        verbose: As for `capture`. The steps are the models.
        store: A file, `*.jsonl`, to which the counts of each model are written as soon as they are known. Another call
            with the same data and arguments continues from there. Only `n` may differ. Whether `train` is the same
            function is not checked.
        seed: The seed of all that is drawn. The seed of each model is made of it and of the number of the model.

    Returns:
        xr.Dataset: Over `outcome`: `count`, the number of models of the arm in which it happened, `share`, and
            `interval` (outcome, bound: `lower`, `upper`), the Wilson interval of the share.

        The outcomes are `permuted: a feature supported`, `permuted: a feature needed, not claimed`,
        `planted: another supported`, `planted: another needed, not claimed`, `planted: it is supported`,
        `planted: it is needed, not claimed` and `planted: it is refuted`. The first share should be at most `level`.
        The third may be larger: the test bounds the mean share of false features among those supported, and one false
        feature beside the planted one is half of them. “Refuted” is wrong only if no other feature says nearly what the
        planted one says.

        Over `arm` (`permuted`, `planted`) and `run`: `supported` and `needed`, the numbers of features with these
        verdicts that are not planted, and the `skill` of the model on the tested half. Over `run`, for the planted arm:
        `planted`, the name of the feature, and its `verdict`. The verdict on a group that it belongs to counts, too.

        The attribute `summary` says the same in words. The others are `n`, `strength`, `own_skill` (of the model with
        your labels), `method`, `level` and `seed`.

    Raises:
        ValueError: If `x` is not a table, or `x` or `y` hold anything but finite numbers; if `train` is not a function,
            or returns anything but a compiled `keras.Model`; if half of the samples are too few to test any feature; if
            `store` holds something else, or another call; if another argument is out of range; and as `attribute` and
            `feature_claims`. What `train` raises is passed on, with a note that names the model.
        FileNotFoundError: If the folder of `store` does not exist.

    Warns:
        UserWarning: As `attribute` and `feature_claims`, of the first model alone.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain
        from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention


        def train(x, y):
            inputs = keras.Input((3,))
            tokens = FeatureTokenizer(4, feature_names=["age", "pulse", "weight"])(inputs)
            attended = InterpretableMultiHeadAttention(4, 1)(tokens[:, :1], tokens)
            model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))
            model.compile(keras.optimizers.Adam(0.05), "mse")
            model.fit(x, y, epochs=2, verbose=0)
            return model


        rng = np.random.default_rng(0)
        x = rng.normal(size=(200, 3))
        y = x[:, 0] + rng.normal(size=200)
        calibration = explain.calibrate(train, x, y, n=2, verbose=0)
        count = calibration["count"].sel(outcome="permuted: a feature supported").item()
        print(count, "of", calibration.attrs["n"])
        #> 0 of 2
        ```
    """
    if not callable(train) or isinstance(train, keras.Model):
        raise ValueError(
            "`train` must be a function of `(x, y)` that trains a new model and returns it. Received: "
            f"train={train!r} of type {type(train).__name__}"
        )
    data = _checked_data(x, y, feature_mask, groups, block)
    n = positive_integer("n", n)
    if strength is not None and not 0 < strength < 1:
        raise ValueError(f"`strength` must be a number between 0 and 1. Received: strength={strength!r}")
    reading = {"method": method, "task": task, "target": target, "layers": layers}
    settings = {**reading, "strength": strength, "level": checked_level(level), "seed": checked_seed(seed)}
    made_by = json.loads(json.dumps({"schema": _SCHEMA, **settings, "data": _digest(data)}))
    progress = progress_bar(1 + 2 * n, verbose, "model")
    with _stored(store, made_by) as (found, keep):
        for arm, run in [(_OWN, 0), *itertools.product((_PERMUTED, _PLANTED), range(n))]:
            key, own = f"{arm}/{run}", found.get(f"{_OWN}/0")
            if key not in found:
                rng = np.random.default_rng([*b"calibrate", settings["seed"], _ARMS.index(arm), run])
                try:
                    of_run = _run(train, data, _labels(data, arm, own, rng), reading, level, batch_size, rng)
                except Exception as error:
                    error.add_note(f"`calibrate` was at the model of {arm}, run {run}.")
                    raise
                if arm == _OWN:
                    of_run["strength"] = strength or float(np.clip(of_run["skill"] or 0, _WEAKEST, _STRONGEST))
                found[key] = of_run
                keep(key, of_run)
            progress.add(1)
    return _summarized(found, n, {"method": method, "level": level, "seed": seed})


def calibration_record(calibration: Any) -> dict[str, Any]:
    """What `calibrate` found, as JSON."""
    if not isinstance(calibration, xr.Dataset) or "outcome" not in calibration.dims:
        raise ValueError(
            "`calibration` must be what `explain.calibrate` returned. Received: calibration of type "
            f"{type(calibration).__name__}"
        )
    outcomes = [calibration.sel(outcome=outcome) for outcome in calibration["outcome"].values]
    return {
        **calibration.attrs,
        "outcomes": [
            {
                "outcome": one["outcome"].item(),
                "count": one["count"].item(),
                "share": one["share"].item(),
                "interval": one["interval"].values.tolist(),
            }
            for one in outcomes
        ],
    }


class _Data(NamedTuple):
    """The user's data, checked."""

    x: np.ndarray  # (sample, column)
    y: np.ndarray  # (sample, ...)
    feature_mask: np.ndarray | None  # (column,)
    names: list[str] | None  # of the columns of a DataFrame
    groups: np.ndarray | None  # (sample,), numbers
    block: int | None
    columns: list[list[int]]  # of each feature


class _Labels(NamedTuple):
    """Labels for the user's `x`, of which it is known what says something about them."""

    y: np.ndarray
    planted: int | None = None  # the number of the feature that they follow
    is_made: bool = True


def _checked_data(x: Any, y: Any, feature_mask: Any, groups: Any, block: int | None) -> _Data:
    names = given_labels(x, None).columns
    x = feature_array("x", x)
    if x.ndim != 2:
        raise ValueError(
            "`x` must be a table, (sample, feature), because `calibrate` counts verdicts on single features. For "
            "texts, series and images, test the ranking as a whole with `explain.faithfulness`. Received: shape "
            f"{x.shape}"
        )
    check_rows_finite(x, "`x`")
    y = _backend.as_numpy(y) if ops.is_tensor(y) else np.asarray(y)
    if y.ndim == 0 or len(y) != len(x) or y.dtype.kind not in "biuf" or not np.isfinite(y).all():
        raise ValueError(
            f"`y` must hold finite numbers, one label for each sample, {len(x)}. Received: shape {y.shape}, dtype "
            f"{y.dtype}"
        )
    clusters = clusters_of(len(x), groups, block)
    if int(clusters.max()) < 1:
        raise ValueError(
            "`groups` or `block` leave only one group of samples. Calibration needs at least two, to exchange labels "
            f"and to hold samples out. Received: groups={groups!r}, block={block!r}"
        )
    columns, mask = [[column] for column in range(x.shape[1])], None
    if feature_mask is not None:
        mask = np.asarray(feature_mask)
        columns = [np.flatnonzero(mask == number).tolist() for number in np.unique(mask[mask >= 0])]
    return _Data(x, y, mask, names, None if groups is None else clusters, block, columns)


def _labels(data: _Data, arm: str, own: dict[str, Any] | None, rng: np.random.Generator) -> _Labels:
    if own is None:
        return _Labels(data.y, is_made=False)
    y = _permuted(data, rng)
    if arm == _PERMUTED:
        return _Labels(y)
    varying = [number for number, of_one in enumerate(data.columns) if np.ptp(data.x[:, of_one], axis=0).any()]
    planted = int(rng.choice(varying))
    columns = data.x[:, data.columns[planted]].astype("float64")
    spread = columns.std(axis=0)
    standardized = (columns - columns.mean(axis=0)) / np.where(spread > 0, spread, 1)
    # The score of a feature of several columns is their sum, with random weights.
    direction = rng.normal(size=len(spread)) if len(spread) > 1 else np.ones(1)
    signal = _normal_scores(_codes((standardized @ direction)[:, None]), rng, share_ties=True)
    noise = _normal_scores(_codes(y), rng)  # which depends on itself as labels do, within groups or along a series
    return _Labels(_planted(data.y, signal, noise, own["strength"], own["classes"]), planted)


def _permuted(data: _Data, rng: np.random.Generator) -> np.ndarray:
    """The labels of other samples: of another group, or of another time."""
    if data.block is not None:
        return np.roll(data.y, rng.integers(data.block, len(data.y) - data.block + 1), axis=0)
    if data.groups is None:
        return rng.permutation(data.y)
    rows = [np.flatnonzero(data.groups == group) for group in range(data.groups.max() + 1)]
    y = np.empty_like(data.y)
    for group, other in enumerate(rng.permutation(len(rows))):
        y[rows[group]] = data.y[np.resize(rows[other], len(rows[group]))]  # in a larger group they are repeated
    return y


def _codes(y: np.ndarray) -> np.ndarray:
    """Whole numbers, (sample,), in the order of the labels: by their first column, then by the second, and so on."""
    return np.unique(y.reshape(len(y), -1), axis=0, return_inverse=True)[1].reshape(-1)


def _normal_scores(codes: np.ndarray, rng: np.random.Generator, share_ties: bool = False) -> np.ndarray:
    """Quantiles of the normal distribution in the order of the codes. Equal ones have the same, or a random order."""
    scores = np.empty(len(codes))
    scores[np.lexsort((rng.random(len(codes)), codes))] = _quantiles(len(codes))
    if share_ties:
        scores = (np.bincount(codes, scores) / np.bincount(codes))[codes]
    return scores / scores.std()


def _quantiles(count: int) -> np.ndarray:
    return stats.norm.ppf((np.arange(count) + 0.5) / count)


def _planted(y: np.ndarray, signal: np.ndarray, noise: np.ndarray, strength: float, classes: bool) -> np.ndarray:
    """The values of `y`, in the order of a score of which a signal decides the given share."""
    values = y[np.argsort(_codes(y), kind="stable")]
    few = np.linspace(0, len(y) - 1, min(_GRID, len(y))).astype(int)
    table = (_codes(values)[:, None] if classes else values.reshape(len(y), -1).astype("float64"))[few]
    low, high = 0.0, 1.0
    for _ in range(12):
        weight = (low + high) / 2
        is_enough = _share_decided(table, np.sort(signal)[few], weight, classes) >= strength
        low, high = (low, weight) if is_enough else (weight, high)
    planted = np.empty_like(y)
    planted[np.argsort(high * signal + np.sqrt(1 - high**2) * noise, kind="stable")] = values
    return planted


def _share_decided(values: np.ndarray, signal: np.ndarray, weight: float, classes: bool) -> float:
    """The skill of whoever knows the signal: the share of the entropy of classes, or of the variance of numbers."""
    score = weight * signal[:, None] + np.sqrt(1 - weight**2) * _quantiles(_GRID)
    drawn = np.empty((score.size, values.shape[1]))
    drawn[np.argsort(score, axis=None)] = values[np.arange(score.size) * len(values) // score.size]
    if not classes:
        mean = drawn.reshape(*score.shape, -1).mean(axis=1)
        return float(mean.var(axis=0).sum() / drawn.var(axis=0).sum())
    kinds = np.unique(drawn)
    given = (drawn.reshape(score.shape)[:, :, None] == kinds).mean(axis=1)
    return float(1 - stats.entropy(given, axis=1).mean() / stats.entropy(given.mean(axis=0)))


def _halves(data: _Data, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The samples to train on and those to test on: whole groups, or the first and the last part of a series."""
    samples = np.arange(len(data.x))
    if data.block is not None:
        is_first = samples < len(samples) // 2 // data.block * data.block
    else:
        groups = samples if data.groups is None else data.groups
        count = groups.max() + 1
        is_first = np.isin(groups, rng.permutation(count)[: count // 2])
    return samples[is_first], samples[~is_first]


def _run(
    train: Callable,
    data: _Data,
    labels: _Labels,
    reading: dict[str, Any],
    level: float,
    batch_size: int | None,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Trains a model on half of the samples, and counts what is said of its features on the others."""
    training, held_out = _halves(data, rng)
    seed, seed_of_tests = (int(number) for number in rng.integers(2**31, size=2))
    keras.utils.set_random_seed(seed)
    model = _checked_model(train(data.x[training], labels.y[training]))
    x, y = data.x[held_out], labels.y[held_out]
    running: dict[str, Any] = {"batch_size": batch_size, "verbose": 0, "seed": seed_of_tests}
    with warnings.catch_warnings():
        if labels.is_made:  # the first model has warned of the same
            warnings.simplefilter("ignore", UserWarning)
        labeled = x if data.names is None else pd.DataFrame(x, columns=data.names)
        attribution = attribute(model, labeled, **reading, **running)
        groups = None if data.groups is None else data.groups[held_out]
        dependence: dict[str, Any] = {"feature_mask": data.feature_mask, "groups": groups, "block": data.block}
        claims = feature_claims(model, x, y, attribution, level=level, **dependence, **running)
    columns = [] if labels.planted is None else data.columns[labels.planted]
    has_planted = np.asarray(claims["member"].values[:, columns].any(axis=1))
    found = _counted(claims, has_planted)
    if labels.planted is not None:
        found["planted"] = str(claims["feature"].values[labels.planted])
    if not labels.is_made:
        _check_is_testable(claims, len(held_out))
        found["classes"] = outputs_of(model, x[:1], task=reading["task"], target=None).task in _OF_CLASSES
    return found


def _counted(claims: xr.Dataset, has_planted: np.ndarray) -> dict[str, Any]:
    """The verdicts on features that are not planted, and that on the planted one, or on a group that it belongs to."""
    others, its_own = (claims["verdict"].values[are_of].tolist() for are_of in (~has_planted, has_planted))
    skill = float(claims.attrs["skill"])
    return {
        "skill": skill if np.isfinite(skill) else None,
        "supported": others.count("supported"),
        "needed": others.count(_NEEDED),
        "verdict": next((verdict for verdict in ("supported", _NEEDED) if verdict in its_own), (*its_own, "")[0]),
    }


def _checked_model(model: Any) -> keras.Model:
    if not isinstance(model, keras.Model):
        hint = " Does the function end in `return model`?" if model is None else ""
        raise ValueError(
            f"`train` must return the trained model, a `keras.Model`. Received: {model!r} of type "
            f"{type(model).__name__}.{hint}"
        )
    if getattr(model, "loss", None) is None:
        raise ValueError(
            "`train` must return a model that is compiled with a loss: features are tested by how the loss changes "
            f"without them. Call `model.compile(loss=...)`. Received: a model named {model.name!r} that is not "
            "compiled."
        )
    return model


def _check_is_testable(claims: xr.Dataset, samples: int) -> None:
    if claims["effect"].isnull().all():
        raise ValueError(
            f"No feature can be tested on {samples} samples, of which {claims.attrs['clusters']} are independent: the "
            "half that models are not trained on. `feature_claims` needs at least 20, and one for each column: "
            "give more data."
        )


def _summarized(found: dict[str, Any], n: int, settings: dict[str, Any]) -> xr.Dataset:
    """The models of both arms, and how often what happened."""
    of_arm = {arm: [found[f"{arm}/{run}"] for run in range(n)] for arm in (_PERMUTED, _PLANTED)}
    per_model = {
        key: np.array([[one[key] for one in models] for models in of_arm.values()], dtype)
        for key, dtype in (("supported", int), ("needed", int), ("skill", float))
    }
    verdict = np.array([one["verdict"] for one in of_arm[_PLANTED]])
    outcomes = {
        "permuted: a feature supported": per_model["supported"][0] > 0,
        "permuted: a feature needed, not claimed": per_model["needed"][0] > 0,
        "planted: another supported": per_model["supported"][1] > 0,
        "planted: another needed, not claimed": per_model["needed"][1] > 0,
        "planted: it is supported": verdict == "supported",
        "planted: it is needed, not claimed": verdict == _NEEDED,
        "planted: it is refuted": verdict == "refuted",
    }
    counts = np.array([happened.sum() for happened in outcomes.values()])
    intervals = [
        stats.binomtest(int(count), n).proportion_ci(1 - settings["level"], method="wilson") for count in counts
    ]
    own = found[f"{_OWN}/0"]

    def said(number):
        low, high = intervals[number]
        return f"{counts[number]} of {n} ({low:.0%} to {high:.0%})"

    summary = (
        f"On models like yours, “supported” was wrong in {said(0)} with permuted labels, and in {said(2)} with a "
        f"planted feature. The planted feature, which allows a skill of {own['strength']:.2g}, was found in {said(4)}. "
        f"In {said(5)} it was needed, but not claimed, and in {said(6)} it was refuted."
    )
    return xr.Dataset(
        {
            **{name: (("arm", "run"), values) for name, values in per_model.items()},
            "planted": ("run", [one["planted"] for one in of_arm[_PLANTED]]),
            "verdict": ("run", verdict),
            "count": ("outcome", counts),
            "share": ("outcome", counts / n),
            "interval": (("outcome", "bound"), np.array(intervals)),
        },
        {"arm": list(of_arm), "run": np.arange(n), "outcome": list(outcomes), "bound": ["lower", "upper"]},
        {"summary": summary, "n": n, "strength": own["strength"], "own_skill": own["skill"], **settings},
    )


def _digest(data: _Data) -> str:
    digest = hashlib.sha256(repr((data.block, data.columns)).encode())
    for array in (data.x, data.y, data.groups):
        if array is not None:
            digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _stored(store: Any, made_by: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Callable[[str, Any], None]]]:
    """What a file holds of each model that is done, and a function that adds to it.

    A line of the file is JSON and, before it, its checksum. A kill leaves the last line unfinished: it does not count.
    """
    if store is None:
        yield {}, lambda key, of_run: None
        return
    first = _line("made_by", made_by)
    with _opened(store) as stream:
        content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        entries = [_parsed(store, line) for line in whole.splitlines()]
        if not entries and not first.startswith(content):  # a kill may have left a part of it
            raise _not_a_calibration(store)
        key, before = entries[0] if entries else ("made_by", made_by)
        if key != "made_by" or not isinstance(before, dict):
            raise _not_a_calibration(store)
        differing = [key for key in made_by if made_by[key] != before.get(key)]
        if differing:
            raise ValueError(
                f"{store} belongs to another call, which differs in: {', '.join(differing)}. Choose another `store`, "
                "or delete this one."
            )
        stream.truncate(len(whole))
        stream.seek(len(whole))

        def keep(key, value):
            stream.write(_line(key, value))
            stream.flush()
            os.fsync(stream.fileno())

        if not entries:
            keep("made_by", made_by)
        yield dict(entries[1:]), keep


@contextlib.contextmanager
def _opened(store: Any) -> Iterator[Any]:
    """The file, which nobody else writes to meanwhile."""
    if not isinstance(store, str | os.PathLike) or Path(store).suffix != ".jsonl":
        raise ValueError(f"`store` must be the path of a file whose name ends in .jsonl. Received: store={store!r}")
    if not Path(store).parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(Path(store).parent)!r} to write `store` into.")
    try:
        number = os.open(
            store, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666
        )
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{store} is a link: it is not followed. Give the file that it leads to.") from None
        raise
    with os.fdopen(number, "r+b") as stream:
        try:
            if fcntl is not None:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"Another process or thread is writing to {store}. Wait until it has finished, or choose another "
                "`store`."
            ) from None
        yield stream


def _line(key: str, value: Any) -> bytes:
    entry = json.dumps([key, value], sort_keys=True).encode()
    return f"{_checksum(entry)} ".encode() + entry + b"\n"


def _parsed(store: Any, line: bytes) -> tuple[str, Any]:
    checksum, _, entry = line.partition(b" ")
    if checksum.decode("latin-1") != _checksum(entry):
        raise _not_a_calibration(store)
    key, value = json.loads(entry)
    return key, value


def _checksum(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]


def _not_a_calibration(store: Any) -> ValueError:
    return ValueError(
        f"{store} holds something else than models of `calibrate`, or it was changed: it is not overwritten. Choose "
        "another `store`."
    )
