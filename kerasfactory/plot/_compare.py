"""Several attributions beside each other: what they rank first, whether they agree, and which are faithful."""

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from kerasfactory._arguments import positive_integer
from kerasfactory._text import as_matplotlib
from kerasfactory.plot._maps import LETTERS, WIDTH, labels_of, short
from kerasfactory.plot._ranking import COLORS, check_finite

_VARIABLES = {
    "attribution": ("reading", "sample", "feature"),
    "overlap": ("reading", "reading_other"),
    "observed": ("reading",),
    "null": ("reading", "draw"),
    "p_adjusted": ("reading",),
}
_NULL = "#bdbdbd"


def compare(result: xr.Dataset, *, top_k: int = 10) -> Figure:
    r"""Draw what `explain.compare` returns: rankings, agreement and faithfulness of several methods.

    At the top are the ranks that each method gives to the features, 1 for the largest mean share of the absolute
    attribution. The dark ones are those that are compared. In the middle is the overlap of the features that each two
    methods rank first; the label says what random rankings reach on average. At the bottom is the AOPC
    comprehensiveness of each method in the samples and rows of its test, in front of a gray band that holds the inner
    95% of the null distribution. Numbers are the p-values of `explain.compare`, adjusted over the methods,

    $$
    \tilde p_{(i)} = \min\Bigl(1, \max_{j \le i} \, (m - j + 1) \, p_{(j)}\Bigr) .
    $$

    Args:
        result: A Dataset as `explain.compare` returns it.
        top_k: The largest number of features to show, at least 1: those of the best mean rank.

    Returns:
        matplotlib.figure.Figure: The figure, with three axes.

    Raises:
        ValueError: If a variable is missing, has other dimensions, or holds NaN or infinite numbers.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain, plot

        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
        x = np.random.default_rng(0).normal(size=(50, 6))
        methods = {"size": np.abs(x), "value": x}
        result = explain.compare(model, x, methods=methods, draws=20, verbose=0)

        figure = plot.compare(result)
        print([ax.get_title() for ax in figure.axes])
        #> ['rank', 'overlap of the first 1', 'comprehensiveness']
        ```
    """
    top_k = positive_integer("top_k", top_k)
    _check(result)
    names = [as_matplotlib(short(name, 24)) for name in labels_of(result["reading"])]
    ranks = _ranks(result["attribution"].transpose("reading", "sample", "feature"))
    shown = np.argsort(ranks.mean(axis=0), kind="stable")[:top_k]
    compared = result.attrs.get("top_k", 1)
    rows = np.arange(len(names))
    is_turned = max(map(len, names)) * len(names) > 30
    margin = 0.7 + 0.075 * max(map(len, names)) * is_turned
    heights = [0.26 * len(shown) + margin, 0.3 * len(names) + margin + 0.2, 0.42 * len(names) + 1.5]
    size = (max(WIDTH, 2.3 + 0.42 * len(names)), sum(heights))
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=size, height_ratios=heights, layout="constrained")
    features = [as_matplotlib(short(name, 24)) for name in labels_of(result["feature"])]
    _cells(top, ranks[:, shown].T, compared >= ranks[:, shown].T, "{:.0f}")
    top.set_yticks(range(len(shown)), [features[feature] for feature in shown])
    top.set_title("rank" if len(shown) == len(features) else f"rank, {len(shown)} of {len(features)} features")
    overlap = result["overlap"].transpose("reading", "reading_other").values
    _cells(middle, overlap, overlap, "{:.2f}")
    middle.set_yticks(rows, names)
    middle.set_title(f"overlap of the first {compared}")
    if "chance" in result:
        middle.set_xlabel(f"by chance {np.nanmean(result['chance']):.2f} on average")
    for ax in (top, middle):
        ax.set_xticks(rows, names, rotation=90 if is_turned else 0)
    _draw_faithfulness(bottom, result, names)
    return figure


def _ranks(attribution: xr.DataArray) -> np.ndarray:
    """The rank of each feature by each method, from 1, by the mean share of what is in view of a sample."""
    sizes = np.abs(attribution.values)
    if "in_view" in attribution.coords:
        sizes = np.where(attribution["in_view"].transpose("sample", "feature").values, sizes, 0)
    sums = sizes.sum(axis=-1, keepdims=True)
    return stats.rankdata(-(sizes / np.where(sums > 0, sums, 1)).mean(axis=1), "min", axis=1)


def _cells(ax: Axes, values: np.ndarray, shades: np.ndarray, form: str) -> None:
    """A matrix with its numbers written into it; `shades` are from 0 to 1."""
    shades = np.asarray(shades, float)
    ax.imshow(shades, cmap="Blues", vmin=0, vmax=1.25, aspect="auto", interpolation="nearest")
    for place in np.ndindex(values.shape):
        color = "white" if shades[place] > 0.6 else "black"
        ax.text(place[1], place[0], form.format(values[place]), ha="center", va="center", color=color, fontsize=LETTERS)


def _draw_faithfulness(ax: Axes, result: xr.Dataset, names: list[str]) -> None:
    rows = np.arange(len(names))
    low, high = np.quantile(result["null"].transpose("reading", "draw"), [0.025, 0.975], axis=1)
    ax.barh(rows, high - low, 0.7, low, color=_NULL, label="rankings that know nothing (95%)")
    ax.plot(result["observed"], rows, "o", color=COLORS[0], label="the method")
    p_values = [f"p = {p:.2g}" for p in result["p_adjusted"].values]
    ax.set_yticks(rows, [f"{name}\n{p}" for name, p in zip(names, p_values, strict=True)])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.axvline(0, color="#6b6b6b", linewidth=0.8)
    ax.set_title("comprehensiveness")
    ax.set_xlabel("change of the output")
    ax.margins(y=0)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.legend(loc="outside lower center", ncols=2, fontsize=LETTERS, frameon=False)


def _check(result: xr.Dataset) -> None:
    if not isinstance(result, xr.Dataset):
        raise ValueError(f"`result` must be what `explain.compare` returns. Received: {type(result).__name__}")
    for name, dims in _VARIABLES.items():
        if name not in result or set(result[name].dims) != set(dims):
            received = {str(key): value.dims for key, value in result.items()}
            raise ValueError(
                f"`result` must hold `{name}` with the dimensions {dims}, as `explain.compare` returns it. Received: "
                f"{received}"
            )
        check_finite(f"`{name}`", result[name].values)
