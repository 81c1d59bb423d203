"""Colors for attributions: one hue for shares, two for values with a sign."""

import math

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize

from kerasfactory.plot._maps import scale

# Ink and card, and what a card turns into at the ends of the scale. Blue and orange differ with any color vision, and
# the ink has a contrast of at least 4.5 to 1 on all between the card and an end.
LIGHT = {"ink": "#1b1b1b", "card": "#ffffff", "plus": "#5aa9e6", "minus": "#f09a4a", "line": "#767676"}
DARK = {"ink": "#ececec", "card": "#151515", "plus": "#2166ac", "minus": "#a04f00", "line": "#8a8a8a"}


def shades(values: np.ndarray, vmax: float | None) -> tuple[float, bool, str]:
    """Where the colors end, whether they have two sides, and a description of the scale."""
    signed = bool((values < -1e-6 * np.abs(values).max()).any())
    end, description = scale(np.abs(values), vmax)
    return end, signed, description.replace("from 0", f"from −{end:.2g}") if signed else description


def mappable(start: str, end: float, signed: bool) -> ScalarMappable:
    """Values as colors: `start` is that of 0."""
    colors = [LIGHT["minus"]] * signed + [start, LIGHT["plus"]]
    colormap = LinearSegmentedColormap.from_list("shades", colors)
    return ScalarMappable(Normalize(-end if signed else 0, end), colormap)


def rounded(value: float, end: float) -> float:
    """A number of two digits, or of fewer where the third digit of the scale's end is more."""
    return round(float(f"{value:.2g}"), 2 - math.floor(math.log10(end))) + 0.0


def amount(value: float, end: float, signed: bool) -> str:
    """The rounded number as a text, with its sign where there are two."""
    number = rounded(value, end)
    return f"{number:{'+' * (signed and number != 0)}g}".replace("-", "−")
