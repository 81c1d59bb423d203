"""Rankings: of features by attribution or by a claim's effect, of heads by their statistics."""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kerasfactory._arguments import positive_integer

# Okabe and Ito's colors, which differ with any color vision; shapes and words say the same.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
MARKERS = "osD^vPX"
_VERDICTS = {"supported": ("o", "#0072b2"), "undetermined": ("s", "#6b6b6b"), "refuted": ("X", "#d55e00")}
_DRAWS = 1000
STATISTICS = {
    "entropy": "entropy\n(0: one key, 1: all alike)",
    "confidence": "confidence\n(mean of the largest weight)",
    "distance": "distance\n(positions)",
}


def features(
    attribution: xr.DataArray | xr.Dataset | Mapping[str, xr.DataArray],
    ax: Axes | None = None,
    top: int = 20,
    level: float = 0.95,
    seed: int = 0,
) -> Axes:
    r"""Draw features in the order of their attribution, the largest on top, with intervals.

    A point is the mean over the samples. The line through it is the interval between the \((1 - \text{level}) / 2\) and
    \((1 + \text{level}) / 2\) quantiles of the means

    $$
    \bar a^{*}_f = \frac{1}{n} \sum_{i=1}^{n} a_{s_i f}, \qquad s_1, \dots, s_n \text{ drawn with replacement}
    $$

    of 1,000 bootstrap samples (Efron 1979, [*Bootstrap Methods: Another Look at the
    Jackknife*](https://doi.org/10.1214/aos/1176344552)). It says how far the mean would move with other samples. It
    does not say how far it would move with another training run, nor that the model uses the feature. A single sample
    has no interval.

    Args:
        attribution: A DataArray (sample, feature), or (feature), as from `explain.attribute`; several of them in a
            dictionary from a method's name, which are drawn in the order of the first and on one axis, so that they
            should have one unit, as methods have whose rows sum to 1; or a Dataset of claims over
            `feature` with `effect`, `interval` (feature, bound) and `verdict`: "supported", "refuted" or
            "undetermined", which shapes and words tell apart. Without unit, of any sign.
        ax: Where to draw; a new figure, if not given.
        top: How many features to show at most, at least 1: those with the largest mean, whatever its sign.
        level: How much of the bootstrap distribution the interval holds, between 0 and 1. Claims bring their own.
        seed: Of the bootstrap, at least 0.

    Returns:
        matplotlib.axes.Axes: The axes.

    Raises:
        ValueError: If the dimensions are others; if there are no features or samples, or NaN or infinite numbers; if
            the attributions in a dictionary differ in their features; if `top` or `level` is out of range.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        values = np.random.default_rng(0).dirichlet([1, 5, 2], size=100)
        attribution = xr.DataArray(values, {"feature": ["age", "pulse", "weight"]}, ["sample", "feature"])

        ax = plot.features(attribution)
        print([label.get_text() for label in ax.get_yticklabels()])
        #> ['pulse', 'weight', 'age']
        ```
    """
    top = positive_integer("top", top)
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, as 0.95. Received: level={level!r}")
    claims = attribution if isinstance(attribution, xr.Dataset) else None
    if claims is not None:
        means, bounds = {"": _claimed(claims)}, {"": claims["interval"].transpose("feature", "bound").values.T}
        names = _feature_names(claims["effect"])
        what = "effect, with its interval"
    else:
        several: Any = attribution if isinstance(attribution, Mapping) else {"": attribution}
        if not several:
            raise ValueError("`attribution` must not be empty. Received: {}")
        checked = {method: _checked(method, values) for method, values in several.items()}
        first = next(iter(checked.values()))
        names = _feature_names(first)
        for method, values in checked.items():
            if _feature_names(values) != names:
                raise ValueError(
                    "All attributions must have the same features in the same order. Received for "
                    f"{next(iter(checked))!r}: {names}; for {method!r}: {_feature_names(values)}"
                )
        means = {method: values.values.mean(axis=0) for method, values in checked.items()}
        bounds = {
            method: bootstrap(values.values, level, seed) for method, values in checked.items() if len(values) > 1
        }
        what = f"attribution, mean over {len(first)} sample{'s' * (len(first) > 1)}"
        what += f", with its {level:.0%} interval" * bool(bounds)

    leading = np.nan_to_num(next(iter(means.values())))  # a claim may have no effect to draw, but a verdict
    order = np.argsort(-np.abs(leading), kind="stable")[:top]
    order = order[np.argsort(-leading[order], kind="stable")]
    # Two lines for a long name, not its two ends: features are often told apart in the middle.
    labels = ["\n".join(textwrap.wrap(names[index], 34, max_lines=2, placeholder="…")) for index in order]
    if claims is not None:
        labels = [f"{label} ({claims['verdict'].values[index]})" for label, index in zip(labels, order, strict=True)]
    if ax is None:
        room = 0.22 + 0.1 * max(len(means), 1 + any("\n" in label for label in labels))
        _, ax = plt.subplots(figsize=(6.4, 1.2 + len(order) * room), layout="constrained")
    for number, (method, mean) in enumerate(means.items()):
        rows = np.arange(len(order)) + (number - (len(means) - 1) / 2) * 0.7 / len(means)
        if method in bounds:
            low, high = bounds[method][:, order]
            ax.hlines(rows, low, high, color="#6b6b6b" if claims is not None else COLORS[number % 7], linewidth=1.6)
        if claims is None:
            marker, color = MARKERS[number % 7], COLORS[number % 7]
            ax.plot(mean[order], rows, marker, color=color, label=method or None, linestyle="none")
        else:
            verdicts = claims["verdict"].values[order]
            for verdict, (marker, color) in _VERDICTS.items():
                if (verdicts == verdict).any():
                    at = verdicts == verdict
                    ax.plot(mean[order][at], rows[at], marker, color=color, label=verdict, linestyle="none")
    ax.set_yticks(range(len(order)), labels)
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.grid(axis="both", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    if min(mean[order].min() for mean in means.values()) >= 0 and claims is None:
        ax.set_xlim(left=0)
    else:
        ax.axvline(0, color="#6b6b6b", linewidth=0.8)
    ax.set_xlabel(what)
    if len(order) < len(names):
        ax.set_title(f"{len(order)} of {len(names)} features", fontsize="medium")
    if len(means) > 1:  # verdicts are in the labels
        ax.legend(loc="best", fontsize="small")
    return ax


def head_statistics(statistics: xr.Dataset | Mapping[str, xr.Dataset]) -> Figure:
    r"""Draw what `explain.head_statistics` says about each head: one row of pictures for each layer.

    Entropy, confidence and distance are points, on one axis for all layers. Redundancy is a matrix of the
    Jensen–Shannon distances between the heads of a layer,

    $$
    R_{gh} = \operatorname{mean}_i \sqrt{\operatorname{JS}_2(A_{gi}, A_{hi})} ,
    $$

    from 0, two heads that do the same, to 1, no key in common: pale squares off the diagonal are redundant heads. The
    formulas are those of `explain.head_statistics`.

    Args:
        statistics: A Dataset with `entropy` and `confidence`, from 0 to 1, `distance`, in positions, all (head), and
            `redundancy` (head, head_other), from 0 to 1; or a dictionary of them from names of layers. `distance` may
            be NaN, as where there are not as many queries as keys.

    Returns:
        matplotlib.figure.Figure: The figure, with four axes for each layer, and one for the color bar.

    Raises:
        ValueError: If a variable is missing, has other dimensions, or is empty, NaN or infinite.

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
        #> ['entropy', 'confidence', 'distance', 'other head']
        ```
    """
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(STATISTICS, ("head",))
    layers = of_layers(statistics, "statistics", dims | {"redundancy": ("head", "head_other")})
    for layer, dataset in layers.items():
        for name in ("entropy", "confidence", "redundancy"):
            check_finite(f"`{name}` of {layer!r}" if layer else f"`{name}`", dataset[name].values)
    number = max(dataset.sizes["head"] for dataset in layers.values())
    figure, grid = plt.subplots(
        len(layers),
        4,
        squeeze=False,
        figsize=(10, 1.1 + len(layers) * min(4, max(1.5, 0.25 * number + 0.5))),
        layout="constrained",
    )
    for (layer, dataset), axes in zip(layers.items(), grid, strict=True):
        rows, names = np.arange(dataset.sizes["head"]), [str(head) for head in dataset["head"].values]
        step = -(-len(rows) // 16)
        for (name, what), ax in zip(STATISTICS.items(), axes, strict=False):
            ax.hlines(rows, 0, dataset[name], color="#bbbbbb", linewidth=1)
            ax.plot(dataset[name], rows, "o", color=COLORS[0])
            ax.set_ylim(len(rows) - 0.5, -0.5)
            ax.set_yticks(rows[::step], names[::step])
            if ax in grid[-1]:
                ax.set_xlabel(what)
        undefined(axes[2], dataset["distance"].values)
        axes[0].set_ylabel(f"{layer}\nhead" if layer else "head")
        redundancy = dataset["redundancy"].transpose("head", "head_other")
        image = axes[3].imshow(redundancy, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes[3].set_xticks(rows[:: -(-len(rows) // 8)], names[:: -(-len(rows) // 8)])
        axes[3].set_yticks(rows[::step], names[::step])
        axes[3].set_ylabel("head")
    farthest = max(float(np.nan_to_num(dataset["distance"]).max()) for dataset in layers.values())
    for axes in grid:
        for ax, end in zip(axes, (1, 1, farthest or 1), strict=False):
            ax.set_xlim(0, 1.05 * end)
    grid[-1, 3].set_xlabel("other head")
    grid[0, 3].set_title("redundancy", fontsize="medium")
    figure.colorbar(image, ax=list(grid[:, 3]), label="Jensen–Shannon distance\n(0: the same, 1: nothing shared)")
    return figure


def of_layers(given: Any, argument: str, variables: dict[str, tuple[str, ...]]) -> dict[str, xr.Dataset]:
    """A Dataset for each layer, which has the variables, in these dimensions, with something to draw in them."""
    layers = {"": given} if isinstance(given, xr.Dataset) else given
    if not isinstance(layers, Mapping) or not layers or not all(isinstance(d, xr.Dataset) for d in layers.values()):
        raise ValueError(
            f"`{argument}` must be a Dataset, or a dictionary of them from names of layers, and not empty. Received: "
            f"{given if isinstance(given, Mapping) and not given else type(given).__name__}"
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
                    f"`{argument}` must hold finite numbers. `{name}` of {layer!r} has none, of "
                    f"{dataset[name].size}: look for NaN in the samples and in the model's weights."
                )
    return dict(layers)


def undefined(ax: Axes, distance: np.ndarray) -> None:
    """Says why there is nothing to see, where `explain.head_statistics` gives no distance."""
    if np.isnan(distance).all():
        ax.text(0.5, 0.5, "not defined:\nqueries are no keys", ha="center", va="center", transform=ax.transAxes)


def check_finite(what: str, values: np.ndarray) -> None:
    """Raises a `ValueError` for what cannot be drawn."""
    if not values.size:
        raise ValueError(f"{what} must not be empty. Received the shape: {values.shape}")
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise ValueError(
            f"{what} must be finite. {wrong.sum()} of {wrong.size} entries are NaN or infinite, the first at "
            f"{[int(index) for index in np.argwhere(wrong)[0]]}. Find where they come from, or leave them out."
        )


def _checked(method: str, attribution: Any) -> xr.DataArray:
    dims = getattr(attribution, "dims", None)
    if not isinstance(attribution, xr.DataArray) or dims not in (("sample", "feature"), ("feature",)):
        raise ValueError(
            "`attribution` must be a DataArray with the dimensions (sample, feature) or (feature), as from "
            f"`explain.attribute`. Received{f' for {method!r}' if method else ''}: "
            f"{type(attribution).__name__}{f' with the dimensions {dims}' if dims is not None else ''}"
        )
    check_finite("`attribution`", attribution.values)
    return attribution if "sample" in attribution.dims else attribution.expand_dims("sample")


def _claimed(claims: xr.Dataset) -> np.ndarray:
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
        raise ValueError("A Dataset of claims must not be empty. Received none.")
    return claims["effect"].values


def _feature_names(of: xr.DataArray) -> list[str]:
    return [str(name) for name in of["feature"].values]


def bootstrap(values: np.ndarray, level: float, seed: int) -> np.ndarray:
    """Bounds (bound, feature) of the mean over the samples. One draw at a time: the samples may be many."""
    rng, count = np.random.default_rng(seed), len(values)
    means = [np.bincount(rng.integers(count, size=count), minlength=count) @ values / count for _ in range(_DRAWS)]
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
