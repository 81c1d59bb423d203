"""Attributions laid over the pictures that they are about."""

import math
from typing import Any, overload

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from kerasfactory._arguments import positive_integer
from kerasfactory._text import as_matplotlib
from kerasfactory.plot._maps import LETTERS, WIDTH, sample_titles, short, wrapped
from kerasfactory.plot._ranking import COLORS, check_finite
from kerasfactory.plot._shades import shades

_DARKEST = 0.45  # gray of what is black, on which no color would be seen
_OPAQUE = 0.9  # opacity of the color at the end of the scale, through which the picture is still seen
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # of red, green and blue (ITU-R BT.709)


@overload
def image(
    attribution: xr.DataArray,
    images: Any,
    *,
    ax: None = None,
    feature_mask: Any = None,
    samples: int = 8,
    columns: int = 4,
    vmax: float | None = None,
) -> Figure: ...
@overload
def image(
    attribution: xr.DataArray,
    images: Any,
    *,
    ax: Axes,
    feature_mask: Any = None,
    samples: int = 8,
    columns: int = 4,
    vmax: float | None = None,
) -> Axes: ...
def image(
    attribution: xr.DataArray,
    images: Any,
    *,
    ax: Axes | None = None,
    feature_mask: Any = None,
    samples: int = 8,
    columns: int = 4,
    vmax: float | None = None,
) -> Figure | Axes:
    r"""Draw attributions over the pictures that they are about, all on one color scale.

    The picture is gray, and each pixel has the color of its feature. At the pixel \(p\) of the feature \(f(p)\), the
    color has the opacity

    $$
    \alpha_p = 0.9 \, \min\!\left(1, \frac{|a_{f(p)}|}{\text{vmax}}\right) ,
    $$

    so that the picture is visible where the attribution is small. Values of at least 0 are blue. If any value is
    negative, positive values are blue, and negative ones are orange. The darkest gray is not black, because no color
    would be visible on black.

    A feature without pixels, such as a class token, is left out. The function never guesses which feature that is.
    Either the numbers in `feature_mask` count it, or the attribution says that it is not `in_view`, as after
    `explain.attribute(..., special_tokens=[0])`, and the numbers count the others.

    Args:
        attribution: A DataArray (sample, feature) or (feature), as from `explain.attribute`. Values have no unit and
            may have any sign. The coordinate `sample` is the title of the picture.
        images: The pictures (sample, height, width), or with a last axis of 1, 3 or 4 channels; or a single picture,
            which all samples share. Numbers of any range: the least is drawn dark, and the largest white.
        ax: The axes to draw on, if there is one sample. By default, a new figure with axes for each sample.
        feature_mask: Integers (height, width): the number of the feature to which a pixel belongs, or -1 for none, as
            from `explain.patches`. By default, each pixel is a feature, if there are as many features as pixels.
        samples: The number of samples to show, from the first, at least 1. Choose others with `isel(sample=[...])`.
        columns: The number of pictures in a row, at least 1.
        vmax: Where the color scale ends, above 0. By default, at the largest absolute value of all that is drawn.

    Returns:
        matplotlib.figure.Figure | matplotlib.axes.Axes: The figure, whose first axes are those of the samples, or the
            axes if they were given. The colors are `ax.images[1]`.

    Raises:
        ValueError: If `attribution` has other dimensions, is empty, or holds NaN or infinite numbers; if `images` and
            `feature_mask` do not have the same height and width, or `images` has another number of samples; if
            `feature_mask` is missing, holds no integers, or does not say which features have pixels; if `ax` is given
            for several samples; if `samples`, `columns` or `vmax` is out of range.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        rng = np.random.default_rng(0)
        images = rng.random((3, 8, 8))
        # Four patches of 4 by 4 pixels.
        mask = np.arange(4).reshape(2, 2).repeat(4, axis=0).repeat(4, axis=1)
        shares = rng.dirichlet(np.ones(4), 3)
        attribution = xr.DataArray(shares, {"sample": ["3", "8", "1"]}, ["sample", "feature"])

        figure = plot.image(attribution, images, feature_mask=mask)
        print([ax.get_title() for ax in figure.axes[:3]])
        #> ['3', '8', '1']
        ```
    """
    samples, columns = positive_integer("samples", samples), positive_integer("columns", columns)
    values = _values(attribution)
    pictures, mask = _pixels(images, feature_mask, *values.shape)
    values, pictures = values[:samples], pictures[:samples]
    numbers = _features(attribution, mask)
    overlays = np.where(mask >= 0, values[:, numbers], np.nan)
    check_finite("`attribution`", values[:, np.unique(numbers[mask >= 0])])
    check_finite("`images`", pictures)
    end, signed, description = shades(np.nan_to_num(overlays), vmax)
    titles = sample_titles(attribution) or [""] * len(values)
    label = as_matplotlib("attribution", description)
    if ax is not None:
        if len(attribution.shape) == 2 and len(attribution) > 1:
            raise ValueError(
                f"`ax` can hold one picture: choose a sample, as with `attribution[0]` and `images[0]`, or leave `ax` "
                f"out for a figure of all. Received: {len(attribution)} samples"
            )
        drawn = _draw(ax, pictures[0], overlays[0], end, signed, titles[0])
        figure = ax.get_figure(root=True)
        assert figure is not None
        _add_bar(figure, drawn, ax, label)
        return ax
    columns = min(columns, len(values))
    rows = math.ceil(len(values) / columns)
    width = float(np.clip((WIDTH - 1.2) / columns, 1.0, 2.1))
    height = width * float(np.clip(mask.shape[0] / mask.shape[1], 0.3, 3))
    size = (width * columns + 1.2, max(2.2, (height + 0.3) * rows + 0.4))
    figure, grid = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="compressed")
    for unused in grid.flat[len(values) :]:
        unused.remove()
    axes = list(grid.flat[: len(values)])
    for one, picture, overlay, title in zip(axes, pictures, overlays, titles, strict=False):
        drawn = _draw(one, picture, overlay, end, signed, title)
    _add_bar(figure, drawn, axes, label)
    named = short(attribution.name, 48) if attribution.name is not None else ""
    all_samples = attribution.sizes.get("sample", 1)
    cut = f"{len(values)} of {all_samples} samples" * (len(values) < all_samples)
    lines = wrapped(", ".join(filter(None, [named, cut])), int(12 * size[0]))
    figure.suptitle(as_matplotlib(*lines), fontsize="medium")
    return figure


def _draw(ax: Axes, picture: np.ndarray, overlay: np.ndarray, end: float, signed: bool, title: str) -> AxesImage:
    """The picture in gray and the values over it: the more, the less transparent."""
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    blue, orange = COLORS[:2]
    zero = 0.5 if signed else 0.0
    stops = [(zero, to_rgba(blue, 0)), (1.0, to_rgba(blue, _OPAQUE))]
    if signed:
        stops = [(0.0, to_rgba(orange, _OPAQUE)), (zero, to_rgba(orange, 0)), *stops]
    colormap = LinearSegmentedColormap.from_list("overlay", stops)
    norm = Normalize(-end if signed else 0, end)
    drawn = ax.imshow(overlay, cmap=colormap, norm=norm, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    figure = ax.get_figure(root=True)
    assert figure is not None
    letters = int(12.5 * ax.get_window_extent().width / figure.dpi)  # in a line of the title
    ax.set_title(as_matplotlib(*wrapped(title, max(15, letters))), fontsize=LETTERS)
    return drawn


def _add_bar(figure: Figure, drawn: AxesImage, axes: Axes | list[Axes], label: str) -> None:
    """The scale, on white as the brightest pixels are, whatever the ground of the figure."""
    bar = figure.colorbar(drawn, ax=axes)
    bar.ax.set_facecolor("white")
    bar.set_label(label, fontsize=LETTERS)


def _values(attribution: Any) -> np.ndarray:
    """The values (sample, feature)."""
    dims = getattr(attribution, "dims", None)
    if not isinstance(attribution, xr.DataArray) or dims not in (("sample", "feature"), ("feature",)):
        raise ValueError(
            "`attribution` must be a DataArray with the dimensions (sample, feature) or (feature), as from "
            f"`explain.attribute`. Received: {type(attribution).__name__}"
            f"{f' with the dimensions {dims}' if dims is not None else ''}"
        )
    if 0 in attribution.shape:
        raise ValueError(f"`attribution` must not be empty. Received the sizes: {dict(attribution.sizes)}")
    return np.atleast_2d(attribution.to_numpy().astype("float64"))


def _pixels(images: Any, feature_mask: Any, count: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """The pictures (sample, height, width) in gray, from the darkest to 1, and the feature of each pixel."""
    pixels = np.asarray(images)
    if pixels.dtype.kind not in "buif":
        raise ValueError(f"`images` must be numbers. Received: {pixels.dtype}")
    mask = _mask(pixels.shape, features) if feature_mask is None else _checked_mask(feature_mask)
    if pixels.shape[-2:] == mask.shape:
        gray = pixels.astype("float64")
    elif pixels.shape[-3:-1] == mask.shape and pixels.shape[-1] in (1, 3, 4):
        channels = pixels.astype("float64")
        gray = channels[..., 0] if pixels.shape[-1] == 1 else channels[..., :3] @ _LUMINANCE
    else:
        raise ValueError(
            "`images` must be (sample, height, width) or (sample, height, width, channel), of the height and width of "
            f"`feature_mask`, {mask.shape}. Move channels to the end, as with `np.moveaxis(images, 1, -1)`. Received "
            f"the shape: {pixels.shape}"
        )
    if gray.shape[:-2] not in ((), (count,)):
        raise ValueError(
            f"`images` must be as many as the samples of `attribution`: {count}. Choose the same of both, as with "
            f"`attribution[:4]` and `images[:4]`. Received the shape: {pixels.shape}"
        )
    gray = np.broadcast_to(gray, (count, *mask.shape))
    low, high = gray.min(), gray.max()
    return _DARKEST + (1 - _DARKEST) * (gray - low) / ((high - low) or 1), mask


def _mask(shape: tuple[int, ...], features: int) -> np.ndarray:
    """A feature for each pixel."""
    sizes = [shape[-2:], *([shape[-3:-1]] if shape[-1:] in ((1,), (3,), (4,)) else [])]
    for size in sizes:
        if len(size) == 2 and math.prod(size) == features:
            return np.arange(features).reshape(size)
    raise ValueError(
        "`feature_mask` must say to which feature each pixel belongs, because there are not as many features as "
        "pixels. `explain.patches(height, width, size)` makes one for square patches. Received: "
        f"{features} features, images of the shape {shape}"
    )


def _checked_mask(feature_mask: Any) -> np.ndarray:
    mask = np.asarray(feature_mask)
    if mask.ndim == 3 and (mask == mask[..., :1]).all():  # the channels of a pixel belong together
        mask = mask[..., 0]
    if mask.ndim != 2 or mask.dtype.kind not in "iu" or not mask.size or mask.max() < 0:
        raise ValueError(
            "`feature_mask` must be integers (height, width), the number of the feature to which each pixel belongs, "
            f"as from `explain.patches(height, width, size)`. Received: {mask.dtype} of the shape {mask.shape}"
        )
    return mask


def _features(attribution: xr.DataArray, mask: np.ndarray) -> np.ndarray:
    """The place in the attribution of each pixel's feature."""
    numbers, features = np.unique(mask[mask >= 0]), attribution.sizes["feature"]
    counts_all = len(numbers) == features or numbers[0] > 0  # it counts what has no pixels, before all patches
    if numbers[-1] < features and counts_all:
        return np.maximum(mask, 0)
    if "in_view" in attribution.coords:
        in_view = np.atleast_2d(attribution["in_view"].to_numpy()).any(axis=0)
        if in_view.sum() == numbers[-1] + 1:
            return np.flatnonzero(in_view)[np.maximum(mask, 0)]
    raise ValueError(
        f"`feature_mask` must number the features of `attribution`. Received: {features} features, and a mask of "
        f"{len(numbers)} features with numbers up to {numbers[-1]}. If some are no part of the picture, as class "
        "tokens, name them, as with `explain.attribute(..., special_tokens=[0])`, or leave them out, as with "
        "`attribution.isel(feature=slice(1, None))`."
    )
