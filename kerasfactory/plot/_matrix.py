"""Heat maps of attention scores: one, or all heads of a layer."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kerasfactory._arguments import positive_integer
from kerasfactory._text import as_matplotlib
from kerasfactory.plot._maps import (
    LETTERS,
    WIDTH,
    Maps,
    Side,
    all_maps,
    glyphs_may_be_missing,
    maps,
    quantity,
    scale,
    short,
    wrapped,
)

_SMALLEST, _LARGEST = 5.0, 9.0  # font sizes of names, in points
_NAMES = ("query", "key", "query_token", "key_token")


def heatmap(
    scores: xr.DataArray | xr.Dataset | Mapping[str, Any],
    *,
    ax: Axes | None = None,
    top_k: int = 40,
    vmax: float | None = None,
) -> Axes:
    r"""Draw one map of attention: which query looks at which key.

    A map of scores (sample, head, query, key) shows their mean over samples and heads, and the title says so:

    $$
    \bar A_{ij} = \frac{1}{|L_i|} \sum_{(s, h) \in L_i} A_{shij} .
    $$

    Here, \(L_i\) are the samples and heads in which query \(i\) may look at any key, so that padding does not make the
    map pale. A mean hides what samples and heads do not share, so draw single ones too, as with `scores.isel(sample=0,
    head=1)`, or draw all `heads`.

    The map of one text has its words, `query_token` and `key_token`, as names. It stays readable with many tokens. Of
    more than `top_k` named tokens, it shows those that receive most attention, on both axes. Positions without names
    are put into 64 bins: weights are summed over the keys in a bin and averaged over the queries, as in the map of
    `explain.summarize`. So are more than `top_k` dates or durations, since their order says more than a choice of them
    would.

    On the color bar, a line marks the uniform share, 1 divided by the number of keys in view: the weight of each key if
    a query gave all keys in its view the same weight. A map that has this color everywhere is uniform. If queries
    differ in the number of keys in view, as with a causal mask, it is a range. Scores whose rows do not sum to 1 have
    no such line.

    Args:
        scores: A DataArray (query, key), with at most `sample` and `head` before these, as from `explain.capture` or
            `explain.rollout`; or a Dataset as from `explain.summarize`, whose `map` is drawn; or a dictionary as these
            functions return it, if it has one layer. Weights are at least 0 and have no unit.
        ax: The axes to draw on. By default, a new figure of a size that fits.
        top_k: The largest number of names to show, at least 1.
        vmax: Where the color scale ends, above 0. It starts at 0. By default, it ends at the largest weight of this
            map. To compare maps, give each the same number, such as 1.

    Returns:
        matplotlib.axes.Axes: The axes, with the image as `ax.images[0]`.

    Raises:
        ValueError: If `scores` have other dimensions, are empty, NaN, infinite or negative, or are of several layers;
            if `top_k` or `vmax` is out of range.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        names = ["age", "pulse", "weight"]
        scores = np.random.default_rng(0).dirichlet(np.ones(3), size=(100, 4, 3))
        dims = ["sample", "head", "query", "key"]
        scores = xr.DataArray(scores, {"query": names, "key": names}, dims)

        ax = plot.heatmap(scores)
        print(ax.get_title())
        #> mean over 100 samples and 4 heads
        print([label.get_text() for label in ax.get_xticklabels()])
        #> ['age', 'pulse', 'weight']
        ```
    """
    drawn = maps(scores, ("sample", "head"), top_k)
    end, description = scale(drawn.values, vmax)
    overhang = 0.0  # of the title, over the color bar, in inches
    if ax is None:
        overhang = 1.0
        height, width = (min(7.0, max(2.4, 0.2 * cells)) for cells in drawn.values.shape[2:])
        size = (width + _name_width(drawn.queries) + 1.9, height + _name_width(drawn.keys) + 1.2)
        _, ax = plt.subplots(figsize=size, layout="compressed")
    image = _draw(ax, drawn, drawn.values[0, 0], end)
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, ax=ax)
    bar.set_label(as_matplotlib(quantity(drawn), description), fontsize=LETTERS)
    _mark_uniform(bar, [drawn])
    _label_axes(ax, drawn.queries, drawn.keys)
    _fit_names(figure, [ax], drawn)
    letters = max(20, int(12 * (ax.get_window_extent().width / figure.dpi + overhang)))  # in a line of the title
    lines = [line for text in (drawn.heading(), drawn.note) for line in wrapped(text, letters, 6)]
    ax.set_title(as_matplotlib(*lines), fontsize="medium")
    return ax


def heads(
    scores: xr.DataArray | xr.Dataset | Mapping[str, Any],
    *,
    columns: int = 4,
    top_k: int = 16,
    vmax: float | None = None,
) -> Figure:
    r"""Draw all heads of one layer side by side, on one color scale.

    All heads have one color scale, which the color bar shows. If each head had its own scale, a head that looks
    everywhere would seem as focused as one that looks at a single key. Each map is the mean over the samples, as in
    `heatmap`:

    $$
    \bar A_{hij} = \frac{1}{|L_{hi}|} \sum_{s \in L_{hi}} A_{shij} .
    $$

    Tokens are chosen or put into bins as in `heatmap`. All maps have the same names: those of the keys that receive
    most attention from all heads together.

    Args:
        scores: As for `heatmap`, with the dimension `head`.
        columns: The number of maps in a row, at least 1. On a phone, two beside each other can be read.
        top_k: The largest number of names to show, at least 1.
        vmax: Where the common color scale ends, above 0. By default, at the largest weight of all heads.

    Returns:
        matplotlib.figure.Figure: The figure. Its first axes are those of the heads, in their order.

    Raises:
        ValueError: As `heatmap`; also if there is no dimension `head`, or if `columns` is out of range.

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
    drawn = maps(scores, ("sample",), top_k)
    if "head" not in drawn.dims:
        raise ValueError(f"`scores` must have a dimension `head`; `heatmap` draws one map. Received: {drawn.dims}")
    end, description = scale(drawn.values, vmax)
    number = len(drawn.heads)
    columns = min(columns, number)
    rows = math.ceil(number / columns)
    size = (1.9 * columns + _name_width(drawn.queries) + 1.9, 2.1 * rows + _name_width(drawn.keys) + 1.2)
    figure, grid = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="compressed")
    for ax in grid.flat[number:]:
        ax.remove()
    axes = list(grid.flat[:number])
    for position, (ax, head) in enumerate(zip(axes, drawn.heads, strict=True)):
        image = _draw(ax, drawn, drawn.values[0, position], end)
        ax.set_title(as_matplotlib(short(f"head {head}")), fontsize="medium")
        leftmost, lowest = position % columns == 0, position + columns >= number
        _label_axes(ax, drawn.queries if leftmost else None, drawn.keys if lowest else None)
        ax.tick_params(labelleft=leftmost, labelbottom=lowest)
    quantities = [quantity(drawn), description, *["of all heads"] * (vmax is None)]
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(as_matplotlib(*quantities), fontsize=LETTERS)
    _mark_uniform(bar, [drawn])
    lines = [line for text in (drawn.heading(), drawn.note) for line in wrapped(text, int(12 * size[0]), 4)]
    figure.suptitle(as_matplotlib(*lines), fontsize="medium")
    _fit_names(figure, axes, drawn)
    return figure


def model(
    scores: Mapping[str, xr.DataArray | xr.Dataset] | xr.DataArray | xr.Dataset,
    *,
    vmax: float | None = None,
) -> Figure:
    r"""Draw all heads of all layers in one figure: a row for each layer, a column for each head, one color scale.

    With one scale for all, focused heads can be told from those that look everywhere. The color bar marks the uniform
    share, as in `heatmap`. Each map is the mean over the samples, as in `heads`:

    $$
    \bar A_{\ell hij} = \frac{1}{|L_{\ell hi}|} \sum_{s \in L_{\ell hi}} A_{\ell shij} .
    $$

    A mean hides what samples do not share, so choose one sample, as with `{name: layer.isel(sample=[0]) for name, layer
    in scores.items()}`. Tokens are in their order, without names, and more than 64 of them are put into bins, as in
    `heatmap`. `heads` and `heatmap` draw the names.

    Args:
        scores: A dictionary from the names of layers to scores or summaries, each as for `heads`, as `explain.capture`
            and `explain.summarize` return it; or those of one layer. Layers may differ in their heads and tokens.
        vmax: Where the common color scale ends, above 0. By default, at the largest weight of all layers.

    Returns:
        matplotlib.figure.Figure: The figure. Its axes are those of the heads, layer by layer, and last the color bar.

    Raises:
        ValueError: If `scores` are empty, or those of a layer cannot be drawn by `heads`; if `vmax` is out of range.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        rng, dims = np.random.default_rng(0), ["sample", "head", "query", "key"]
        scores = {
            f"block_{n}": xr.DataArray(rng.dirichlet(np.ones(6), (100, 4, 6)), dims=dims)
            for n in range(3)
        }

        figure = plot.model(scores)
        print(len(figure.axes), figure.get_suptitle())
        #> 13 mean over 100 samples
        ```
    """
    layers = all_maps(_without_names(scores), ("sample",), 1)
    for drawn in layers:
        if "head" not in drawn.dims:
            raise ValueError(
                f"Layer {drawn.layer!r}: `scores` must have a dimension `head`; `heatmap` draws one map. Received: "
                f"{drawn.dims}"
            )
    end, description = scale(np.concatenate([drawn.values.ravel() for drawn in layers]), vmax)
    columns = max(len(drawn.heads) for drawn in layers)
    names = [_in_lines(drawn.layer) for drawn in layers]
    margin = 0.45 + 0.075 * max(len(line) for name in names for line in name.split("\n"))
    cell = float(np.clip((WIDTH - margin - 1.45) / columns - 0.07, 0.5, 1.2))
    titles = dict.fromkeys(text for drawn in layers for text in (drawn.title, drawn.note) if text)
    lines = wrapped(", ".join(titles), int(12 * (cell * columns + 1)), 4)
    same_heads = len({tuple(drawn.heads) for drawn in layers}) == 1
    margins = margin, 0.4, 1.45, 0.4 + 0.18 * len(lines)  # left, bottom, right, top, in inches
    figure, grid, bar_axes = _grid((len(layers), columns), cell, margins, gap=0.07 if same_heads else 0.25)
    titled: dict[int, str] = {}
    for drawn, name, row in zip(layers, names, grid, strict=True):
        for ax in row[len(drawn.heads) :]:
            ax.remove()
        for column, (ax, head) in enumerate(zip(row, drawn.heads, strict=False)):
            image = _draw(ax, drawn, drawn.values[0, column], end)
            ax.set(xticks=[], yticks=[])
            if titled.get(column) != head:  # layers may name their heads in other ways
                title = f"head {head}" if len(f"head {head}") <= 13 * cell else short(head, max(3, int(13 * cell)))
                ax.set_title(as_matplotlib(title), fontsize=LETTERS, pad=3)
                titled[column] = head
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=LETTERS)
    several = [*["of all layers"] * (vmax is None and len(layers) > 1)]
    bar = figure.colorbar(image, cax=bar_axes)
    bar.set_label(as_matplotlib(max(map(quantity, layers), key=len), description, *several), fontsize=LETTERS)
    _mark_uniform(bar, layers)
    figure.supxlabel("key (looked at)", fontsize="medium")
    figure.supylabel("query (looking)", fontsize="medium")
    figure.suptitle(as_matplotlib(*lines), fontsize="medium", y=1 - 0.05 / figure.get_figheight(), va="top")
    return figure


def _in_lines(layer: str) -> str:
    """The path of a layer, broken at its slashes where it is long."""
    return as_matplotlib(*wrapped(layer.replace("/", "/ "), 16, 3)).replace("/ ", "/")


def _grid(
    shape: tuple[int, int], cell: float, margins: tuple[float, float, float, float], gap: float
) -> tuple[Figure, np.ndarray, Axes]:
    """Square axes of a fixed size, and those of a color bar. To lay out a hundred axes by constraints takes long."""
    left, bottom, right, top = margins
    rows, columns = shape
    inner = cell * columns + 0.07 * (columns - 1), cell * rows + gap * (rows - 1)
    width, height = left + inner[0] + right, bottom + inner[1] + top
    places = {"left": left / width, "bottom": bottom / height, "right": 1 - right / width, "top": 1 - top / height}
    spaces = {"wspace": 0.07 / cell, "hspace": gap / cell}
    figure, grid = plt.subplots(rows, columns, squeeze=False, figsize=(width, height), gridspec_kw=places | spaces)
    bar = figure.add_axes((1 - (right - 0.3) / width, bottom / height, 0.15 / width, inner[1] / height))
    return figure, grid, bar


def _without_names(scores: Any) -> Any:
    """The scores without the names of tokens, for which small maps have no room."""
    if isinstance(scores, Mapping) and not isinstance(scores, xr.Dataset):
        return {name: _without_names(layer) for name, layer in scores.items()}
    if isinstance(scores, xr.DataArray | xr.Dataset):
        return scores.drop_vars([name for name in _NAMES if name in scores.coords])
    return scores


def _draw(ax: Axes, drawn: Maps, values: np.ndarray, end: float) -> AxesImage:
    """Draw one map. A position is the middle of its cell, and the name of cell n stands at position n."""
    keys, queries = (side.edges - 0.5 for side in (drawn.keys, drawn.queries))
    square = drawn.queries.edges[-1] == drawn.keys.edges[-1]
    extent = (float(keys[0]), float(keys[-1]), float(queries[-1]), float(queries[0]))
    image = ax.imshow(
        values,
        cmap="Blues",  # one hue, which reads the same with any color vision and in print
        vmin=0,
        vmax=end,
        extent=extent,
        aspect="equal" if square else "auto",
        interpolation="nearest",
    )
    for side, axis in ((drawn.queries, ax.yaxis), (drawn.keys, ax.xaxis)):
        if side.names is not None:
            axis.set_ticks(range(len(side.names)), [as_matplotlib(short(name)) for name in side.names])
        else:
            axis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        if side.times is not None:
            axis.set_major_formatter(FuncFormatter(partial(_time, side.times)))
    return image


def _mark_uniform(bar: Colorbar, drawn: list[Maps]) -> None:
    """Mark on the color bar what uniform attention would draw: a line, or a range if queries differ in their keys."""
    ends = [end for each in drawn for end in each.uniform or ()]
    top = bar.ax.get_ylim()[1]
    if not ends or min(ends) > 1.001 * top:
        return
    low, high = min(*ends, top), min(max(ends), top)
    for end in (low, high):
        bar.ax.axhline(end, color="white", linewidth=3)
        bar.ax.axhline(end, color="black", linewidth=1.2)
    bar.ax.plot([0, 0], [low, high], color="black", linewidth=2.4, clip_on=False)
    bar.ax.annotate(
        "uniform",
        (0, (low + high) / 2),
        (-3, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="center",
        fontsize=LETTERS,
    )


def _name_width(side: Side) -> float:
    """The width of the longest name, in inches."""
    return 0.065 * max((len(short(name)) for name in side.names or side.times or ()), default=0)


def _time(times: list[str], position: float, _: Any) -> str:
    """The text of a tick, which may stand beyond the map."""
    return times[int(position)] if 0 <= position < len(times) else ""


def _label_axes(ax: Axes, queries: Side | None, keys: Side | None) -> None:
    """Label the axes that are given. Where the ticks are positions, the label says so."""
    for side, role, set_label in (
        (queries, "query (looking)", ax.set_ylabel),
        (keys, "key (looked at)", ax.set_xlabel),
    ):
        if side is not None:
            unit = "position" * (side.names is None and side.times is None)
            bins = f"{len(side.edges) - 1} bins" * side.binned()
            lines = [role, ", ".join(filter(None, [unit, bins]))] if bins else [", ".join(filter(None, [role, unit]))]
            set_label(as_matplotlib(*lines))


def _fit_names(figure: Figure, axes: list[Axes], drawn: Maps) -> None:
    """Choose the size and the angle of the names so that they do not touch. Where there is none, leave some out."""
    for ax in axes:
        ax.tick_params(labelsize=_SMALLEST)
        ax.tick_params(axis="x", rotation=90 if drawn.keys.names or drawn.keys.times else 0)
    with glyphs_may_be_missing():
        figure.draw_without_rendering()  # the axes have their size only after this
    box = axes[0].get_window_extent()
    for side, length, axis_of_maps in (
        (drawn.queries, box.height, [ax.yaxis for ax in axes]),
        (drawn.keys, box.width, [ax.xaxis for ax in axes]),
    ):
        if side.names is None:
            for axis in axis_of_maps:
                axis.set_tick_params(labelsize=_LARGEST)
            continue
        names = [short(name) for name in side.names]
        room = 72 * length / figure.dpi / len(names)  # for each name, in points
        size = min(_LARGEST, max(_SMALLEST, 0.75 * room))
        step = math.ceil(1.15 * size / room)
        fits_flat = axis_of_maps[0].axis_name == "y" or max(map(len, names)) * 0.7 * size < room * step
        angle = 0 if fits_flat else 45 if 1.6 * size < room * step else 90
        for axis in axis_of_maps:
            axis.set_ticks(range(0, len(names), step), [as_matplotlib(name) for name in names[::step]])
            axis.set_tick_params(labelsize=size, rotation=angle)
            if angle == 45:
                for label in axis.get_ticklabels():
                    label.set(ha="right", rotation_mode="anchor")
