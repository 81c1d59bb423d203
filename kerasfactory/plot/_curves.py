"""Curves: statistics of heads over the epochs, outputs over the fraction of features removed."""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kerasfactory._text import as_matplotlib
from kerasfactory.plot._maps import LETTERS, WIDTH, labels_of, short, wrapped
from kerasfactory.plot._ranking import (
    COLORS,
    MARKERS,
    STATISTICS,
    bootstrap,
    check_finite,
    checked_layers,
    color_of,
    draw_grid,
    note_missing_distance,
)

_LINE_STYLES = ["-", "--", ":", "-."]


def training(history: xr.Dataset | Mapping[str, xr.Dataset]) -> Figure:
    r"""Draw how the heads change while a model trains: entropy, confidence and distance over the epochs.

    There is one row for each layer and one line for each head. Color, marker and line style tell the heads apart. The
    formulas are those of `explain.head_statistics`. With \(n_i\) keys in view of query \(i\), the entropy of head
    \(h\) is

    $$
    H_h = \operatorname{mean}_i \frac{-\sum_j A_{hij} \ln A_{hij}}{\ln n_i} .
    $$

    A head whose entropy stays at 1 gives all keys the same weight.

    Args:
        history: A dictionary from the names of layers to Datasets with `entropy` and `confidence`, from 0 to 1, and
            `distance`, in positions, all (epoch, head), as `explain.AttentionMonitor` records in its `history`; or one
            such Dataset. NaN, as after a training that diverged, leaves a gap, and the label of the row says from which
            epoch on.

    Returns:
        matplotlib.figure.Figure: The figure, with three axes for each layer.

    Raises:
        ValueError: If `history` is empty, as it is before training; if a variable is missing or has other dimensions;
            if `entropy` or `confidence` holds no finite number (`distance` need not, because not every layer has one).

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        falling = (("epoch", "head"), np.array([[1, 1], [0.9, 0.6], [0.9, 0.2]]))
        statistics = {"entropy": falling, "confidence": falling, "distance": falling}
        figure = plot.training({"attention": xr.Dataset(statistics, {"epoch": [0, 1, 2]})})

        print([ax.get_title().partition("\n")[0] for ax in figure.axes])
        #> ['entropy', 'confidence', 'distance']
        ```
    """
    layers = checked_layers(history, "history", dict.fromkeys(STATISTICS, ("epoch", "head")))
    size = (WIDTH, 1.8 + 1.9 * len(layers))
    figure, grid = plt.subplots(len(layers), 3, squeeze=False, sharex=True, figsize=size, layout="constrained")
    for (layer, dataset), axes in zip(layers.items(), grid, strict=True):
        epochs = dataset["epoch"].values
        for name, ax in zip(STATISTICS, axes, strict=True):
            for number, head in enumerate(labels_of(dataset["head"])):
                ax.plot(
                    epochs,
                    dataset[name].values[:, number],
                    color=color_of(number),
                    marker=MARKERS[number % len(MARKERS)],
                    markevery=max(1, len(epochs) // 5),
                    markersize=4,
                    linestyle=_LINE_STYLES[number // len(MARKERS) % len(_LINE_STYLES)],
                    label=as_matplotlib(short(f"head {head}")),
                )
            draw_grid(ax)
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            ax.set_ylim(-0.03, 1.03)
        axes[2].set_ylim(0, 1.05 * float(np.nan_to_num(dataset["distance"]).max()) or 1)
        note_missing_distance(axes[2], dataset["distance"].values)
        is_gap = np.isnan(dataset["entropy"].values).any(axis=1)
        gap = [f"NaN from epoch {epochs[is_gap.argmax()]} on"] if is_gap.any() else []
        axes[0].set_ylabel(as_matplotlib(*wrapped(layer, 20), *gap))
        axes[1].tick_params(labelleft=False)  # the same as those on its left
    for ax, lines in zip(grid[0], STATISTICS.values(), strict=True):
        ax.set_title(as_matplotlib(*lines), fontsize=LETTERS)
    for ax in grid[-1]:
        ax.set_xlabel("epoch")
    lines = max((ax.lines for ax in grid[:, 0]), key=len)
    figure.legend(handles=lines, loc="outside lower center", ncols=min(4, len(lines)), frameon=False)
    return figure


def faithfulness(result: xr.Dataset) -> Figure:
    r"""Draw how far the output falls without the features that an attribution ranks first, beside what chance gives.

    The upper picture shows the change of the output over the fraction of features: with the features of highest
    attribution removed (comprehensiveness: high is good), and with only these kept (sufficiency: low is good; DeYoung
    et al. 2020, [*ERASER*](https://arxiv.org/abs/1911.03429), section 4). Points are means over the samples. Bands are
    percentile bootstrap intervals of these means, from 1,000 draws.

    The lower picture shows the comprehensiveness averaged over the fractions (AOPC), of the attribution and of `draws`
    random attributions, which form the null distribution. With the observed value \(T\) and the null values
    \(T^0_d\),

    $$
    p = \frac{1 + \#\{d : T^0_d \ge T\}}{1 + \text{draws}} .
    $$

    Args:
        result: A Dataset as from `explain.faithfulness`: `comprehensiveness`, `sufficiency` (sample, fraction), in the
            unit of the model's output, `aopc_comprehensiveness`, `null` (draw) and `p_value`. Its attribute `level`
            sets the bands (0.05 gives 95%). Its attribute `observed`, if there is one, is the observed value.

    Returns:
        matplotlib.figure.Figure: The figure, with two axes.

    Raises:
        ValueError: If a variable is missing, has other dimensions, is empty, or holds NaN or infinite numbers.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        rng = np.random.default_rng(0)
        curves = {
            "comprehensiveness": (("sample", "fraction"), rng.normal([0.2, 0.5], 0.1, (50, 2))),
            "sufficiency": (("sample", "fraction"), rng.normal([0.3, 0.1], 0.1, (50, 2))),
        }
        numbers = {
            "aopc_comprehensiveness": 0.35,
            "p_value": 1 / 201,
            "null": ("draw", rng.normal(0.1, 0.05, 200)),
        }
        result = xr.Dataset(curves | numbers, {"fraction": [0.1, 0.5]}, {"level": 0.05})
        figure = plot.faithfulness(result)

        print(figure.axes[1].get_title())
        #> p = 0.005, of 200 random attributions
        ```
    """
    needed = {
        "comprehensiveness": ("sample", "fraction"),
        "sufficiency": ("sample", "fraction"),
        "aopc_comprehensiveness": (),
        "null": ("draw",),
        "p_value": (),
    }
    variables = {str(name): values.dims for name, values in result.items()} if isinstance(result, xr.Dataset) else {}
    for name, dims in needed.items():
        if name not in variables or set(variables[name]) != set(dims):
            raise ValueError(
                f"`result` must be a Dataset as from `explain.faithfulness`, with `{name}` {dims}. Received: "
                f"{variables or type(result).__name__}"
            )
        check_finite(f"`{name}`", result[name].values)
    level = float(result.attrs.get("level", 0.05))
    samples = int(result["comprehensiveness"].notnull().all("fraction").sum())  # NaN: fewer than 2 features in view
    fractions = result["fraction"].values
    labels = {"comprehensiveness": "comprehensiveness (top removed)", "sufficiency": "sufficiency (only top kept)"}

    figure, (curves, chance) = plt.subplots(2, 1, figsize=(WIDTH, 6.4), layout="constrained")
    for (name, label), color, marker, line_style in zip(labels.items(), COLORS, MARKERS, _LINE_STYLES, strict=False):
        values = result[name].transpose("sample", "fraction").dropna("sample").values
        curves.plot(fractions, values.mean(axis=0), color=color, marker=marker, ls=line_style, label=label)
        if samples > 1:
            curves.fill_between(fractions, *bootstrap(values, level, seed=0), color=color, alpha=0.2, lw=0)
    curves.axhline(0, color="#6b6b6b", linewidth=0.8)
    removal = wrapped(f'removed: "{result.attrs["removal"]}"', 48) if "removal" in result.attrs else []
    curves.set_xlabel(as_matplotlib("fraction of the features", *removal))
    curves.set_ylabel("change of the output")
    band = f"mean over {samples} samples, {100 * (1 - level):.4g}% band" if samples > 1 else "one sample: no band"
    curves.set_title(as_matplotlib(band), fontsize="medium")
    curves.margins(y=0.25)  # for the legend
    curves.legend(fontsize=LETTERS)

    null, p_value = result["null"].values, float(result["p_value"])
    observed = float(result.attrs.get("observed", result["aopc_comprehensiveness"]))
    chance.hist(null, bins=min(30, max(5, len(null) // 8)), color="#b0b0b0", label="random attributions")
    chance.axvline(observed, color=COLORS[0], linewidth=2, label=f"this attribution: {observed:.2g}")
    chance.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    chance.set_xlabel("comprehensiveness, mean over the fractions")
    chance.set_ylabel("draws")
    chance.set_title(f"p = {p_value:.2g}, of {len(null)} random attributions", fontsize="medium")
    chance.margins(y=0.3)
    chance.legend(fontsize=LETTERS, loc="upper center")
    return figure
