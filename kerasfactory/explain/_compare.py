"""Several readings of one model side by side: whether they agree, and which of them could fail and did not."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import xarray as xr

from kerasfactory._arguments import checked_level, positive_integer
from kerasfactory.explain._attribution import attribute
from kerasfactory.explain._engine.data import input_arrays, progress_bar, samples_in
from kerasfactory.explain._engine.features import features_of, match
from kerasfactory.explain._engine.labels import given_labels, with_rows_of
from kerasfactory.explain._engine.statistics import holm
from kerasfactory.explain._engine.tables import check_aligned, in_arrays
from kerasfactory.explain._faithfulness import faithfulness
from kerasfactory.explain._sanity import seed_agreement

_ADJUSTED = ("p_adjusted", "p_adjusted_sufficiency")
_OBSERVED = ("observed", "observed_sufficiency")  # attributes of `faithfulness` that differ


def compare(
    model: keras.Model,
    x: Any,
    *,
    methods: Sequence[str | Callable[[keras.Model, Any], Any]] | Mapping[str, Any] = (
        "attention",
        "rollout",
        "value_norm",
    ),
    task: str | None = None,
    target: int | str | tuple[int | str, ...] | None = None,
    query: int | str | None = None,
    layers: str | Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    feature_mask: Any = None,
    special_tokens: Sequence[int] | Sequence[str] | None = None,
    removal: str = "marginal",
    background: Any = None,
    groups: Any = None,
    block: int | None = None,
    top_k: int | None = None,
    draws: int = 200,
    level: float = 0.05,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    seed: int = 0,
) -> xr.Dataset:
    r"""Compares several attributions of one model: how far they agree, and which of them is faithful.

    `faithfulness` tests each method, on the same samples, rows of the background and relabelings. Each pair of methods
    is compared as `seed_agreement` compares two models: with \(T_i\), the \(k\) features with the largest mean share of
    the absolute attribution by method \(i\), their overlap is \(|T_i \cap T_j| / k\). The null distribution is that of
    rankings that know nothing.

    Trying several methods and keeping the one with the smallest p-value is a test of several hypotheses. So the
    p-values of all \(m\) methods (or pairs of methods) are adjusted together, for each kind of p-value, by Holm's
    method (Holm 1979, [*A Simple Sequentially Rejective Multiple Test
    Procedure*](https://www.jstor.org/stable/4615733)). With \(p_{(1)} \le \dots \le p_{(m)}\),

    $$
    \tilde p_{(i)} = \min\Bigl(1, \max_{j \le i} \, (m - j + 1) \, p_{(j)}\Bigr) .
    $$

    The chance that any method which knows nothing has an adjusted p-value of at most `level` is at most `level`,
    however the methods depend on each other.

    In texts, a feature is a position, which holds another word in each text. There the overlap says little, and
    `faithfulness` says more.

    Agreement is no evidence that methods are right: readings of the same weights share their errors. Methods that
    disagree may both be faithful, if features stand in for each other.

    Args:
        model: A `keras.Model`, as for `faithfulness`.
        x: An array, a DataFrame of numbers, or a dictionary or list of arrays, as for `faithfulness`.
        methods: At least 2: methods of `attribute`, and functions of a model and samples that return an attribution,
            (sample, feature), called by their names. Or a dictionary from names to such methods, functions, or
            attributions that were computed before, such as SHAP values.
        task: What the outputs mean, as for `faithfulness`.
        target: The output that is meant, as for `faithfulness`.
        query: The query, as for `attribute`.
        layers: Names of the layers, as for `attribute`.
        feature_names: Names of the features, as for `attribute`.
        feature_mask: Which feature each entry of a sample belongs to, as for `faithfulness`.
        special_tokens: What stands for no feature, as for `attribute`.
        removal: What replaces removed features, as for `faithfulness`.
        background: Samples to draw from, as for `faithfulness`.
        groups: Labels of samples that depend on each other, as for `faithfulness`.
        block: For a series: the length of runs that depend on each other. Not with `groups`.
        top_k: How many features to compare, as for `seed_agreement`; a quarter of these in view if not given.
        draws: How often each null distribution is drawn from.
        level: The error level: intervals cover \(1 - \text{level}\). Between 0 and 0.5.
        batch_size: Samples in a batch, as for `capture`.
        verbose: As for `capture`. The steps are the methods.
        seed: The seed of all that is drawn.

    Returns:
        xr.Dataset: With the coordinates `reading` and `reading_other`, the names of the methods, and these variables.

        - `attribution` (reading, sample, feature), each in its own unit, with the coordinate `in_view` (sample,
          feature) where a method says it.
        - `overlap` (reading, reading_other), from 0 to 1, and `chance`, its mean by chance; `p_value_overlap`, the
          one-sided p-values that two methods agree more than by chance, and `p_adjusted_overlap`, adjusted over the
          pairs. Of a method with itself, the overlap is 1, and the others are NaN.
        - All that `faithfulness` returns, with the further dimension `reading`, such as `aopc_comprehensiveness`
          (reading), `interval` (reading, bound), `null` (reading, draw) and `p_value` (reading).
        - `observed` and `observed_sufficiency` (reading): its attributes of these names.
        - `p_adjusted` and `p_adjusted_sufficiency` (reading): the p-values adjusted over the methods.

        The attributes are those of `faithfulness` that all methods share, `top_k`, and `adjustment`, `"Holm"`.

    Raises:
        ValueError: If there are fewer than 2 methods, or two have the same name; if a function returns something that
            does not fit `x`; and as `attribute`, `faithfulness` and `seed_agreement`.

    Warns:
        UserWarning: As `attribute` and `faithfulness`.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        weights = np.array([5, -4, 3, -2, 1, *[0] * 15])
        model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(1)])
        model.set_weights([weights[:, None], np.zeros(1)])
        x = np.random.default_rng(0).normal(size=(200, 20))

        effect = np.abs(weights * x)
        methods = {
            "effect": effect,
            "squared effect": lambda model, x: (weights * x) ** 2,
            "opposite": -effect,
        }
        result = explain.compare(model, x, methods=methods, top_k=3, verbose=0)

        print((result["p_adjusted"] < 0.05).values)
        #> [ True  True False]
        print(result["overlap"].sel(reading="effect", reading_other="squared effect").item())
        #> 1.0
        ```
    """
    named = _named(methods)
    level, draws = checked_level(level), positive_integer("draws", draws)
    asked: dict[str, Any] = {"task": task, "target": target}
    running: dict[str, Any] = {"batch_size": batch_size, "verbose": 0, "seed": seed}
    of_attribute = {**asked, **running, "query": query, "layers": layers, "feature_names": feature_names}

    def attributed(method):
        if isinstance(method, str):
            return attribute(model, x, method=method, special_tokens=special_tokens, **of_attribute)
        return method(model, in_arrays(x)) if callable(method) else method

    given = {name: attributed(method) for name, method in named.items()}
    check_aligned(x=x, **{f"methods[{name!r}]": array for name, array in given.items()}, groups=groups)
    attributions, special_tokens = _labeled(given, x, feature_mask, special_tokens, given_labels(x, feature_names))
    progress = progress_bar(len(named), verbose, "method")
    dependent = {"groups": groups, "block": block, "draws": draws, "level": level}
    tests = []
    for attribution in attributions.values():
        own = {"removal": removal, "background": background, "feature_mask": feature_mask, **dependent, **running}
        tests.append(faithfulness(model, x, attribution, special_tokens=special_tokens, **asked, **own))
        progress.add(1)
    shared = {key: value for key, value in tests[0].attrs.items() if key not in _OBSERVED}
    names = list(attributions)
    result = xr.concat(tests, "reading", coords="minimal", compat="override", join="override", combine_attrs="drop")
    agreement, compared = _agreement(list(attributions.values()), top_k, dependent, seed)
    variables: dict[str, Any] = {name: (("reading", "reading_other"), matrix) for name, matrix in agreement.items()}
    variables |= {name: ("reading", [test.attrs[name] for test in tests]) for name in _OBSERVED}
    variables |= {name: ("reading", holm(result[name.replace("adjusted", "value")].values)) for name in _ADJUSTED}
    stacked = xr.concat(list(attributions.values()), "reading", coords="minimal", compat="override", join="override")
    result = result.assign(variables | {"attribution": stacked.rename("attribution").drop_attrs()})
    result = result.assign_coords(reading=names, reading_other=names)
    return with_rows_of(x, result.assign_attrs(shared, top_k=compared, adjustment="Holm"))


def _named(methods: Any) -> dict[str, Any]:
    if isinstance(methods, str) or not isinstance(methods, Sequence | Mapping) or len(methods) < 2:
        raise ValueError(
            "`methods` must hold at least 2 methods: names of methods of `explain.attribute`, functions of a model and "
            f"samples, or a dictionary from names to such methods or to attributions. Received: methods={methods!r}"
        )
    if isinstance(methods, Mapping):
        return {str(name): method for name, method in methods.items()}
    names: list[Any] = [method if isinstance(method, str) else getattr(method, "__name__", None) for method in methods]
    if None in names or len(set(names)) < len(names):
        raise ValueError(
            "Each of `methods` must have a name of its own. Give a dictionary: "
            f"`methods={{'first': ..., 'second': ...}}`. Received the names: {names}"
        )
    return dict(zip(names, methods, strict=True))


def _labeled(
    given: dict[str, Any], x: Any, feature_mask: Any, special_tokens: Any, names: Any
) -> tuple[dict[str, xr.DataArray], Any]:
    """The attributions with the same coordinates, and which special tokens are among their features.

    The coordinates are those of the first that has some, which says what is in view.
    """
    arrays = input_arrays("x", x)
    total = features_of(arrays, feature_mask).total
    is_labeled = {name: isinstance(array, xr.DataArray) for name, array in given.items()}
    matched = {
        name: match(array, arrays, (total,), special_tokens if is_labeled[name] else None)
        for name, array in given.items()
    }
    first = next((one for name, one in matched.items() if is_labeled[name]), None)
    coordinates: dict[Any, Any] = {"sample": np.arange(samples_in(arrays))}
    columns = names.names or names.columns
    if first is not None:
        coordinates = dict(first.attribution.isel(feature=first.kept).coords)
    elif columns and len(columns) == total:
        coordinates["feature"] = columns
    dims = ("sample", "feature")
    labeled = {name: xr.DataArray(one.values, coordinates, dims) for name, one in matched.items()}
    return labeled, None if any(len(one.kept) < one.keys for one in matched.values()) else special_tokens


def _agreement(
    attributions: list[xr.DataArray], top_k: int | None, dependent: dict[str, Any], seed: int
) -> tuple[dict[str, np.ndarray], int]:
    """Matrices (method, method), and how many features are compared."""
    count = len(attributions)
    matrices = {name: np.full((count, count), np.nan) for name in ("chance", "p_value_overlap", "p_adjusted_overlap")}
    matrices["overlap"] = np.eye(count)
    pairs = list(itertools.combinations(range(count), 2))
    found = [seed_agreement([attributions[n] for n in pair], top_k=top_k, seed=seed, **dependent) for pair in pairs]
    adjusted = holm(np.array([one["p_value"].item() for one in found]))
    for (row, column), one, p_adjusted in zip(pairs, found, adjusted, strict=True):
        values = {"overlap": one["overlap"].item(), "chance": one.attrs["chance"]}
        values |= {"p_value_overlap": one["p_value"].item(), "p_adjusted_overlap": p_adjusted}
        for name, value in values.items():
            matrices[name][row, column] = matrices[name][column, row] = value
    return matrices, found[0].attrs["top_k"]
