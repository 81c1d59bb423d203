"""Heat maps of attention scores: one, or all heads of a layer."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from kerasfactory._arguments import positive_integer
from kerasfactory.plot._maps import Maps, Side, maps, scale, short

_CMAP = "Blues"  # of one hue, so that it reads the same with any color vision, and in print
_SMALLEST, _LARGEST = 5.0, 9.0  # font sizes of names, in points


def heatmap(
    scores: xr.DataArray | xr.Dataset | Mapping[str, Any],
    ax: Axes | None = None,
    top: int = 40,
    vmax: float | None = None,
) -> Axes:
    r"""Draw one map of attention: which query looks at which key.

    A map of scores (sample, head, query, key) shows their mean over samples and heads, and the title says so,

    $$
    \bar A_{ij} = \frac{1}{|L_i|} \sum_{(s, h) \in L_i} A_{shij} ,
    $$

    with the samples and heads \(L_i\) in which query \(i\) may look at any key, so that padding does not make the map
    pale. An average hides what samples and heads do not share: look at single ones too, as with
    `scores.sel(sample=0, head=1)`, or draw all `heads`.

    Many tokens do not make small print. Of more than `top` named ones, those are shown that receive most attention,
    on both axes. Positions without names are put into 64 bins: the weights of the keys in a bin are summed, those
    of the queries averaged, as in the map of `explain.summarize`.

    Args:
        scores: A DataArray (query, key), and before these at most `sample` and `head`, as from `explain.capture` or
            `explain.rollout`; or a Dataset as from `explain.summarize`, whose `map` is drawn; or a dictionary as these
            functions return it, if it has one layer. Weights, at least 0, without unit.
        ax: Where to draw; a new figure of a size that fits, if not given.
        top: How many names to show at most, at least 1.
        vmax: Where the color scale ends, above 0. It starts at 0. If not given, it ends at the largest weight of this
            map; give 1, or the same number to each, to compare maps.

    Returns:
        matplotlib.axes.Axes: The axes, with the image as `ax.images[0]`.

    Raises:
        ValueError: If `scores` have other dimensions, are empty, NaN, infinite or negative, or are of several layers;
            if `top` or `vmax` is out of range.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        names = ["age", "pulse", "weight"]
        scores = np.random.default_rng(0).dirichlet(np.ones(3), size=(100, 4, 3))
        scores = xr.DataArray(scores, {"query": names, "key": names}, ["sample", "head", "query", "key"])

        ax = plot.heatmap(scores)
        print(ax.get_title())
        #> mean over 100 samples and 4 heads
        print([label.get_text() for label in ax.get_xticklabels()])
        #> ['age', 'pulse', 'weight']
        ```
    """
    drawn = maps(scores, ("sample", "head"), top)
    end, words = scale(drawn.values, vmax)
    overhang = 0.0  # of the title, over the color bar, in inches
    if ax is None:
        overhang = 1.0
        queries, keys = (min(7.0, max(2.4, 0.2 * size)) for size in drawn.values.shape[-2:])
        size = (keys + _width(drawn.queries) + 1.9, queries + _width(drawn.keys) + 1.2)
        _, ax = plt.subplots(figsize=size, layout="compressed")
    image = _draw(ax, drawn, drawn.values[0, 0], end)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=ax).set_label(f"{_quantity(drawn)}\n{words}", fontsize="small")
    _label(ax, drawn.queries, drawn.keys)
    _fit_names(figure, [ax], drawn)
    letters = max(20, int(13 * (ax.get_window_extent().width / figure.dpi + overhang)))  # in a line of the title
    lines = [line for text in (drawn.title, drawn.note) for line in textwrap.wrap(text, letters)]
    ax.set_title("\n".join(lines), fontsize="medium")
    return ax


def heads(
    scores: xr.DataArray | xr.Dataset | Mapping[str, Any],
    top: int = 16,
    vmax: float | None = None,
    columns: int = 4,
) -> Figure:
    r"""Draw all heads of one layer side by side, on one color scale.

    One scale, which the color bar states, for all heads: with one each, a head that looks everywhere would seem as
    decided as one that looks at a single key. Each map is the mean over the samples, as in `heatmap`,

    $$
    \bar A_{hij} = \frac{1}{|L_{hi}|} \sum_{s \in L_{hi}} A_{shij} ,
    $$

    and tokens are chosen or put into bins as there. The names are the same in all maps: those of the keys that
    receive most attention from all heads together.

    Args:
        scores: As for `heatmap`, with the dimension `head`.
        top: How many names to show at most, at least 1.
        vmax: Where the common color scale ends, above 0; if not given, at the largest weight of all heads.
        columns: Maps in a row, at least 1.

    Returns:
        matplotlib.figure.Figure: The figure; its first axes are those of the heads, in their order.

    Raises:
        ValueError: As `heatmap`; also if there is no dimension `head`, or `columns` is out of range.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        scores = np.random.default_rng(0).dirichlet(np.ones(6), size=(100, 3, 6))
        scores = xr.DataArray(scores, dims=["sample", "head", "query", "key"], name="attention")

        figure = plot.heads(scores)
        print([ax.get_title() for ax in figure.axes[:3]])
        #> ['head 0', 'head 1', 'head 2']
        print(figure.get_suptitle())
        #> attention, mean over 100 samples
        ```
    """
    columns = positive_integer("columns", columns)
    drawn = maps(scores, ("sample",), top)
    of = next(iter(scores.values())) if isinstance(scores, Mapping) and not isinstance(scores, xr.Dataset) else scores
    if "head" not in of.dims:
        raise ValueError(f"`scores` must have a dimension `head`; `heatmap` draws one map. Received: {tuple(of.dims)}")
    end, words = scale(drawn.values, vmax)
    number = drawn.values.shape[1]
    columns = min(columns, number)
    rows = math.ceil(number / columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        squeeze=False,
        figsize=(1.9 * columns + _width(drawn.queries) + 1.9, 2.1 * rows + _width(drawn.keys) + 1.2),
        layout="compressed",
    )
    for ax in grid.flat[number:]:
        ax.remove()
    axes = list(grid.flat[:number])
    for ax, head, values in zip(axes, drawn.heads, drawn.values[0], strict=True):
        image = _draw(ax, drawn, values, end)
        ax.set_title(f"head {head}", fontsize="medium")
    for ax in axes:
        position = axes.index(ax)
        lowest = position + columns >= number
        _label(ax, drawn.queries if position % columns == 0 else None, drawn.keys if lowest else None)
        ax.tick_params(labelleft=position % columns == 0, labelbottom=lowest)
    words += "\nof all heads" * (vmax is None)
    figure.colorbar(image, ax=axes).set_label(f"{_quantity(drawn)}\n{words}", fontsize="small")
    figure.suptitle("\n".join(filter(None, [drawn.title, drawn.note])), fontsize="medium")
    _fit_names(figure, axes, drawn)
    return figure


def _draw(ax: Axes, drawn: Maps, values: np.ndarray, end: float) -> AxesImage:
    """Positions are at the middle of their cells, as are names, counted."""
    keys, queries = (side.edges - 0.5 for side in (drawn.keys, drawn.queries))
    square = drawn.queries.edges[-1] == drawn.keys.edges[-1]
    extent = (float(keys[0]), float(keys[-1]), float(queries[-1]), float(queries[0]))
    image = ax.imshow(
        values,
        cmap=_CMAP,
        vmin=0,
        vmax=end,
        extent=extent,
        aspect="equal" if square else "auto",
        interpolation="nearest",
    )
    for side, axis in ((drawn.queries, ax.yaxis), (drawn.keys, ax.xaxis)):
        if side.names is not None:
            axis.set_ticks(range(len(side.names)), [short(name) for name in side.names])
        else:
            axis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    return image


def _width(side: Side) -> float:
    """Of the longest name, in inches."""
    return 0.065 * max(len(short(name)) for name in side.names) if side.names is not None else 0.0


def _quantity(drawn: Maps) -> str:
    return "attention, sum of a bin" if drawn.keys.binned() else "attention"


def _label(ax: Axes, queries: Side | None, keys: Side | None) -> None:
    """The axis labels say of positions what the ticks are."""
    for side, what, set_label in (
        (queries, "query (looking)", ax.set_ylabel),
        (keys, "key (looked at)", ax.set_xlabel),
    ):
        if side is not None:
            bins = f"\nposition, {len(side.edges) - 1} bins" if side.binned() else ", position"
            set_label(what if side.names is not None else what + bins)


def _fit_names(figure: Figure, axes: list[Axes], drawn: Maps) -> None:
    """Give the names a size and a direction in which they do not touch, or leave some out where there is no such."""
    for ax in axes:
        ax.tick_params(labelsize=_SMALLEST)
        ax.tick_params(axis="x", rotation=90 if drawn.keys.names else 0)
    figure.draw_without_rendering()  # only now the axes have their size
    box = axes[0].get_window_extent()
    for side, length in ((drawn.queries, box.height), (drawn.keys, box.width)):
        axis_of = [ax.yaxis if side is drawn.queries else ax.xaxis for ax in axes]
        if side.names is None:
            for axis in axis_of:
                axis.set_tick_params(labelsize=_LARGEST)
            continue
        names = [short(name) for name in side.names]
        room = 72 * length / figure.dpi / len(names)  # points for each
        size = min(_LARGEST, max(_SMALLEST, 0.75 * room))
        step = math.ceil(1.15 * size / room)
        flat = side is drawn.queries or max(map(len, names)) * 0.7 * size < room * step
        angle = 0 if flat else 45 if 1.6 * size < room * step else 90
        for axis in axis_of:
            axis.set_ticks(range(0, len(names), step), names[::step])
            axis.set_tick_params(labelsize=size, rotation=angle)
            if angle == 45:
                for label in axis.get_ticklabels():
                    label.set(ha="right", rotation_mode="anchor")
