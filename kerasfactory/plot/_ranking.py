"""Rankings: of features by attribution or by a claim's effect, of heads by their statistics."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kerasfactory._arguments import checked_level, checked_seed, positive_integer
from kerasfactory._text import as_matplotlib
from kerasfactory.plot._maps import LETTERS, WIDTH, labels_of, short, wrapped

# Okabe and Ito's colors, which differ with any color vision. Shapes and words say the same. Their black is the color of
# the text instead, which is seen on a dark ground too.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
MARKERS = "osD^vPX"
STATISTICS = {
    "entropy": ("entropy", "(0: one key,", "1: uniform)"),
    "confidence": ("confidence", "(mean of the", "largest weight)"),
    "distance": ("distance", "(positions)"),
}
_GRAY = "#6b6b6b"
_VERDICTS = {
    "supported": ("o", "#0072b2"),
    "needed, not claimed": ("D", "#009e73"),
    "undetermined": ("s", _GRAY),
    "refuted": ("X", "#d55e00"),
}


def features(
    attribution: xr.DataArray | xr.Dataset | Mapping[str, xr.DataArray],
    *,
    ax: Axes | None = None,
    top_k: int = 20,
    level: float = 0.05,
    seed: int = 0,
) -> Axes:
    r"""Draw features in the order of their attribution, the largest on top, with intervals.

    A point is the mean over the samples. The line through it is a percentile bootstrap interval (Efron 1979,
    [*Bootstrap Methods: Another Look at the Jackknife*](https://doi.org/10.1214/aos/1176344552)): it runs from the
    \(\text{level} / 2\) quantile to the \(1 - \text{level} / 2\) quantile of the means

    $$
    \bar a^{*}_f = \frac{1}{n} \sum_{i=1}^{n} a_{s_i f}, \qquad s_1, \dots, s_n \text{ drawn with replacement}
    $$

    of 1,000 bootstrap samples. The interval shows how far the mean would move with other samples. It does not show how
    far the mean would move with another training run, nor that the model uses the feature. A single sample has no
    interval.

    Args:
        attribution: One of three. A DataArray (sample, feature) or (feature), as from `explain.attribute`. A dictionary
            of such DataArrays, whose keys are the names of the methods: they share one axis, so they should have one
            unit, as have methods whose rows sum to 1. The first one sets the order. Or a Dataset of claims with
            `effect` (feature), `interval` (feature, bound) and `verdict` (feature): "supported", "needed, not claimed",
            "refuted" or "undetermined", which shapes and words tell apart. Values have no unit and may have any sign.
        ax: The axes to draw on. By default, a new figure.
        top_k: The largest number of features to show, at least 1. Those with the largest absolute mean are shown.
        level: The error level of the intervals, between 0 and 0.5: 0.05 draws 95% intervals. Claims bring their own
            intervals.
        seed: The seed of the bootstrap, an integer of at least 0.

    Returns:
        matplotlib.axes.Axes: The axes.

    Raises:
        ValueError: If `attribution` has other dimensions, has no features or no samples, or holds NaN or infinite
            numbers; if the attributions in a dictionary differ in their features; if `top_k`, `level` or `seed` is out
            of range.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        values = np.random.default_rng(0).dirichlet([1, 5, 2], size=100)
        names = {"feature": ["age", "pulse", "weight"]}
        attribution = xr.DataArray(values, names, ["sample", "feature"])

        ax = plot.features(attribution)
        print([label.get_text() for label in ax.get_yticklabels()])
        #> ['pulse', 'weight', 'age']
        ```
    """
    top_k, level, seed = positive_integer("top_k", top_k), checked_level(level), checked_seed(seed)
    claims = attribution if isinstance(attribution, xr.Dataset) else None
    read = _read_attributions(attribution, level, seed) if claims is None else _read_claims(claims)
    names, means, bounds, axis_label = read

    ranked_by = np.nan_to_num(next(iter(means.values())))  # a claim may have a verdict, but no effect to draw
    order = np.argsort(-np.abs(ranked_by), kind="stable")[:top_k]
    order = order[np.argsort(-ranked_by[order], kind="stable")]
    # A long name gets two lines instead of losing its middle, where features often differ.
    labels = [as_matplotlib(*wrapped(names[index], 34)) for index in order]
    if claims is not None:
        verdicts = claims["verdict"].values[order]
        labels = [f"{label} ({verdict})" for label, verdict in zip(labels, verdicts, strict=True)]
    if ax is None:
        row_height = 0.22 + 0.1 * max(len(means), 1 + any("\n" in label for label in labels))
        longest = max(len(line) for label in labels for line in label.split("\n"))
        legend_height = 0.2 * len(means) * (len(means) > 2)
        size = (WIDTH + 0.075 * max(0, longest - 20), 1.2 + len(order) * row_height + legend_height)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    handles: list[Any] = []
    for number, (method, mean) in enumerate(means.items()):
        marker, color = MARKERS[number % len(MARKERS)], color_of(number)
        rows = np.arange(len(order)) + (number - (len(means) - 1) / 2) * 0.7 / len(means)
        if method in bounds:
            low, high = bounds[method][:, order]
            ax.hlines(rows, low, high, color=color if claims is None else _GRAY, linewidth=1.6)
        if claims is None:
            # A label that is empty, or starts with `_`, would be in no legend.
            label = as_matplotlib(short(method, 40))
            label = f" {label}" if len(means) > 1 and label[:1] in ("", "_") else label
            handles += ax.plot(mean[order], rows, marker, color=color, label=label or None, linestyle="none")
            continue
        for verdict, (marker, color) in _VERDICTS.items():
            chosen = verdicts == verdict
            if chosen.any():
                ax.plot(mean[order][chosen], rows[chosen], marker, color=color, label=verdict, linestyle="none")
    ax.set_yticks(range(len(order)), labels)
    ax.set_ylim(len(order) - 0.4, -0.6)
    draw_grid(ax)
    ax.set_axisbelow(True)
    if claims is None and min(mean[order].min() for mean in means.values()) >= 0:
        ax.set_xlim(left=0)
    else:
        ax.axvline(0, color=_GRAY, linewidth=0.8)
    ax.set_xlabel(as_matplotlib(*axis_label))
    if len(order) < len(names):
        ax.set_title(f"{len(order)} of {len(names)} features", fontsize="medium")
    if len(means) > 1:  # verdicts are in the labels
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)} if len(means) > 2 else {"loc": "best"}
        legend = ax.legend(handles=handles, fontsize=LETTERS, **place)
        for text, method in zip(legend.get_texts(), means, strict=True):
            text.set_text(as_matplotlib(short(method, 40)))
    return ax


def head_statistics(statistics: xr.Dataset | Mapping[str, xr.Dataset]) -> Figure:
    r"""Draw what `explain.head_statistics` measures for each head: four pictures for each layer.

    Entropy, confidence and distance are points, on one axis for all layers. Redundancy is a matrix of the
    Jensen–Shannon distances between the heads of a layer,

    $$
    R_{gh} = \operatorname{mean}_i \sqrt{\operatorname{JS}_2(A_{gi}, A_{hi})} .
    $$

    A distance of 0 means that two heads do the same, and 1 that they share no key. Pale squares off the diagonal are
    redundant heads. The formulas are those of `explain.head_statistics`.

    Args:
        statistics: A Dataset with `entropy` and `confidence`, from 0 to 1, and `distance`, in positions, all (head),
            and `redundancy` (head, head_other), from 0 to 1; or a dictionary from the names of layers to such Datasets.
            `distance` may be NaN, as it is where there are not as many queries as keys.

    Returns:
        matplotlib.figure.Figure: The figure, with four axes for each layer and one for the color bar.

    Raises:
        ValueError: If a variable is missing, has other dimensions, is empty, or holds NaN or infinite numbers.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        numbers = {name: ("head", [0.9, 0.4]) for name in ("entropy", "confidence", "distance")}
        redundancy = (("head", "head_other"), np.array([[0, 0.3], [0.3, 0]]))
        statistics = xr.Dataset({**numbers, "redundancy": redundancy}, {"head": [0, 1]})

        figure = plot.head_statistics({"attention": statistics})
        print([ax.get_xlabel().partition("\n")[0] for ax in figure.axes[:4]])
        #> ['entropy', 'confidence', 'distance', 'redundancy']
        ```
    """
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(STATISTICS, ("head",))
    layers = checked_layers(statistics, "statistics", dims | {"redundancy": ("head", "head_other")})
    for layer, dataset in layers.items():
        for name in ("entropy", "confidence", "redundancy"):
            check_finite(f"`{name}` of {layer!r}" if layer else f"`{name}`", dataset[name].values)
    most_heads = max(dataset.sizes["head"] for dataset in layers.values())
    row_height = min(4, max(1.5, 0.25 * most_heads + 0.5))
    size = (WIDTH, 2 * len(layers) * (row_height + 0.6))
    figure, grid = plt.subplots(2 * len(layers), 2, squeeze=False, figsize=size, layout="constrained")
    farthest = max(float(np.nan_to_num(dataset["distance"]).max()) for dataset in layers.values())
    for (layer, dataset), axes in zip(layers.items(), grid.reshape(-1, 4), strict=True):
        rows = np.arange(dataset.sizes["head"])
        names = [as_matplotlib(short(head, 8)) for head in labels_of(dataset["head"])]
        for name, ax, largest in zip(STATISTICS, axes[:3], (1, 1, farthest or 1), strict=True):
            ax.hlines(rows, 0, dataset[name], color="#bbbbbb", linewidth=1)
            ax.plot(dataset[name], rows, "o", color=COLORS[0])
            ax.set_xlim(0, 1.05 * largest)
            ax.set_ylim(len(rows) - 0.5, -0.5)
        note_missing_distance(axes[2], dataset["distance"].values)
        image = axes[3].imshow(dataset["redundancy"], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        vertical, horizontal = (slice(None, None, math.ceil(len(rows) / labels)) for labels in (16, 8))
        for ax in axes:
            ax.set_yticks(rows[vertical], names[vertical])
        axes[3].set_xticks(rows[horizontal], names[horizontal], rotation=90 if max(map(len, names)) > 3 else 0)
        for ax, lines in zip(axes, [*STATISTICS.values(), ("redundancy", "distance to the other head")], strict=True):
            ax.set_xlabel(as_matplotlib(*lines))
        axes[0].set_ylabel(as_matplotlib(*wrapped(layer, int(11 * row_height)), "head"))
        axes[2].set_ylabel("head")
    bar = figure.colorbar(image, ax=list(grid.flat), location="bottom", aspect=30, shrink=0.8)
    bar.set_label("redundancy: Jensen–Shannon distance\n(0: the same, 1: nothing shared)", fontsize=LETTERS)
    return figure


def color_of(number: int) -> str:
    """The color of one of several lines or methods."""
    return [*COLORS, plt.rcParams["text.color"]][number % 7]


def draw_grid(ax: Axes) -> None:
    """A grid that is fainter than the data on any ground."""
    ax.grid(color=plt.rcParams["text.color"], alpha=0.15, linewidth=0.6)


def checked_layers(given: Any, argument: str, variables: dict[str, tuple[str, ...]]) -> dict[str, xr.Dataset]:
    """A Dataset for each layer, with these variables in these dimensions, which hold finite numbers."""
    layers = {"": given} if isinstance(given, xr.Dataset) else given
    if not isinstance(layers, Mapping) or not layers or not all(isinstance(d, xr.Dataset) for d in layers.values()):
        raise ValueError(
            f"`{argument}` must be a Dataset, or a dictionary from the names of layers to Datasets, and not empty. "
            f"Received: {given if isinstance(given, Mapping) and not given else type(given).__name__}"
        )
    for layer, dataset in layers.items():
        for name, dims in variables.items():
            if name not in dataset or set(dataset[name].dims) != set(dims):
                received = {str(key): value.dims for key, value in dataset.items()}
                raise ValueError(
                    f"`{argument}` must hold `{name}` with the dimensions {dims}. Received for {layer!r}: {received}"
                )
            if name != "distance" and not np.isfinite(dataset[name].values).any():
                raise ValueError(
                    f"`{argument}` must hold finite numbers. None of the {dataset[name].size} values of `{name}` of "
                    f"{layer!r} is finite: look for NaN in the samples and in the model's weights."
                )
    in_order = ("epoch", "head", "head_other", ...)
    return {layer: dataset.transpose(*in_order, missing_dims="ignore") for layer, dataset in layers.items()}


def note_missing_distance(ax: Axes, distance: np.ndarray) -> None:
    """Write on the axes why they are empty, if `explain.head_statistics` gives no distance."""
    if np.isnan(distance).all():
        ax.text(0.5, 0.5, "not defined:\nqueries are no keys", ha="center", va="center", transform=ax.transAxes)


def check_finite(name: str, values: np.ndarray) -> None:
    """Raise a `ValueError` for values that cannot be drawn."""
    if not values.size:
        raise ValueError(f"{name} must not be empty. Received the shape: {values.shape}")
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise ValueError(
            f"{name} must be finite. {wrong.sum()} of {wrong.size} entries are NaN or infinite, the first at "
            f"{[int(index) for index in np.argwhere(wrong)[0]]}. Find where they come from, or leave them out."
        )


def bootstrap(values: np.ndarray, level: float, seed: int) -> np.ndarray:
    """Bounds (bound, feature) of the mean over the samples. One draw at a time, because there may be many samples."""
    rng, count = np.random.default_rng(seed), len(values)
    means = [np.bincount(rng.integers(count, size=count), minlength=count) @ values / count for _ in range(1000)]
    return np.quantile(means, [level / 2, 1 - level / 2], axis=0)


# What `features` draws: the features' names, means and bounds for each method (one without a name for claims), and the
# lines of the axis' label. Means are (feature), bounds (bound, feature).
_Ranking = tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray], list[str]]


def _read_attributions(given: Any, level: float, seed: int) -> _Ranking:
    methods = given if isinstance(given, Mapping) else {"": given}
    if not methods:
        raise ValueError("`attribution` must not be empty. Received: {}")
    names: dict[str, list[str]] = {}
    values: dict[str, np.ndarray] = {}
    for method, attribution in methods.items():
        dims = getattr(attribution, "dims", None)
        if not isinstance(attribution, xr.DataArray) or dims not in (("sample", "feature"), ("feature",)):
            raise ValueError(
                "`attribution` must be a DataArray with the dimensions (sample, feature) or (feature), as from "
                f"`explain.attribute`. Received{f' for {method!r}' if method else ''}: "
                f"{type(attribution).__name__}{f' with the dimensions {dims}' if dims is not None else ''}"
            )
        check_finite("`attribution`", attribution.values)
        names[method], values[method] = _feature_names(attribution), np.atleast_2d(attribution.values)
    first, *others = names
    for method in others:
        if names[method] != names[first]:
            raise ValueError(
                "All attributions must have the same features in the same order. Received for "
                f"{first!r}: {names[first]}; for {method!r}: {names[method]}"
            )
    means = {method: array.mean(axis=0) for method, array in values.items()}
    bounds = {method: bootstrap(array, level, seed) for method, array in values.items() if len(array) > 1}
    label = f"attribution, mean over {len(values[first])} sample{'s' * (len(values[first]) > 1)}"
    return (
        names[first],
        means,
        bounds,
        [f"{label},", f"with its {100 * (1 - level):.4g}% interval"] if bounds else [label],
    )


def _read_claims(claims: xr.Dataset) -> _Ranking:
    missing = [name for name in ("effect", "interval", "verdict") if name not in claims]
    if missing or claims["effect"].dims != ("feature",) or set(claims["interval"].dims) != {"feature", "bound"}:
        raise ValueError(
            "A Dataset of claims must hold `effect` (feature), `interval` (feature, bound) and `verdict` (feature). "
            f"Received: { {str(name): values.dims for name, values in claims.items()} }"
        )
    unknown = set(claims["verdict"].values.tolist()) - set(_VERDICTS)
    if unknown:
        raise ValueError(f"A verdict must be one of {list(_VERDICTS)}. Received: {sorted(map(str, unknown))}")
    if not claims.sizes["feature"]:
        raise ValueError("A Dataset of claims must hold at least one claim. Received none.")
    bounds = claims["interval"].transpose("bound", "feature").values
    return (
        _feature_names(claims),
        {"": claims["effect"].values},
        {"": bounds},
        ["rise of the loss without the feature,", "with its interval"],
    )


def _feature_names(labeled: xr.DataArray | xr.Dataset) -> list[str]:
    return labels_of(labeled["feature"])
