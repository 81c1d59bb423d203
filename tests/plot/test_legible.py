"""Pictures can be read on a phone, and on a dark ground."""

import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from kerasfactory import plot

pytestmark = pytest.mark.backend_independent
RNG = np.random.default_rng(0)
NAMES = ["age", "income", "turnover", "receipts", "requests", "tenure"]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def scores():
    values = RNG.dirichlet(np.ones(6), (5, 4, 6))
    return xr.DataArray(values, {"query": NAMES, "key": NAMES}, ["sample", "head", "query", "key"], name="block")


def shares(names=NAMES):
    return xr.DataArray(RNG.dirichlet(np.ones(len(names)), 8), {"feature": names}, ["sample", "feature"])


def numbers(dims, *shape):
    return xr.Dataset({name: (dims, RNG.random(shape)) for name in ("entropy", "confidence", "distance")})


def training():
    return plot.training({"block_1": numbers(("epoch", "head"), 5, 8).assign_coords(epoch=range(5), head=range(8))})


def head_statistics():
    redundancy = ("head", "head_other"), 1 - np.eye(4)
    return plot.head_statistics(numbers(("head",), 4).assign(redundancy=redundancy).assign_coords(head=range(4)))


def faithfulness():
    curves = {name: (("sample", "fraction"), RNG.random((9, 3))) for name in ("comprehensiveness", "sufficiency")}
    others = {"aopc_comprehensiveness": 0.4, "p_value": 0.01, "null": ("draw", RNG.random(99))}
    return plot.faithfulness(xr.Dataset(curves | others, {"fraction": [0.1, 0.2, 0.5]}))


def compare():
    methods = ["attention", "rollout", "value_norm", "permutation"]
    variables = {
        "attribution": (("reading", "sample", "feature"), RNG.random((4, 8, 6))),
        "overlap": (("reading", "reading_other"), np.eye(4)),
        "observed": ("reading", RNG.random(4)),
        "null": (("reading", "draw"), RNG.random((4, 50))),
        "p_adjusted": ("reading", RNG.random(4)),
    }
    return plot.compare(xr.Dataset(variables, {"reading": methods, "reading_other": methods, "feature": NAMES}))


PICTURES = {
    "heatmap": lambda: plot.heatmap(scores()).figure,
    "model": lambda: plot.model({"block_1": scores(), "block_2": scores()}),
    "features": lambda: plot.features({f"method {number}": shares() for number in range(7)}).figure,
    "image": lambda: plot.image(shares(range(16)), RNG.random((8, 4, 4))),
    "head_statistics": head_statistics,
    "training": training,
    "faithfulness": faithfulness,
    "compare": compare,
}


@pytest.mark.parametrize("picture", PICTURES)
def test_letters_are_9_pixels_high_where_a_phone_of_390_pixels_shows_the_figure(picture):
    figure = PICTURES[picture]()
    figure.draw_without_rendering()
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert min(sizes) / 72 * 390 / figure.get_figwidth() > 8.9


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_every_line_of_seven_is_seen_on_a_light_and_on_a_dark_ground(style):
    with plt.style.context(style):
        for figure in (PICTURES["training"](), PICTURES["features"]()):
            ground = np.array(to_rgb(figure.get_facecolor()))
            colors = {line.get_color() for line in figure.axes[0].lines}
            assert len(colors) == 7
            assert min(np.abs(np.array(to_rgb(color)) - ground).max() for color in colors) > 0.3


def test_titles_of_sentences_are_seen_on_a_dark_ground():
    with plt.style.context("dark_background"):
        _, ax = plt.subplots(figsize=(5, 4))
        plot.text(shares().assign_coords(sample=[f"text {number}" for number in range(8)])[:2], ax=ax)
    (color,) = {text.get_color() for text in ax.texts if text.get_text().startswith("text")}
    assert to_rgb(color) == (1, 1, 1)
