"""All heads of a model on one scale, and what uniform attention would be on the color bars."""

import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt

from kerasfactory import plot

pytestmark = pytest.mark.backend_independent


@pytest.fixture(autouse=True)
def headless():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def scores_of(keys=4, heads=2, samples=3, seed=0, mask=1):
    values = np.random.default_rng(seed).dirichlet(np.full(keys, 0.5), size=(samples, heads, keys)) * mask
    values /= np.maximum(values.sum(-1, keepdims=True), 1e-12)
    return xr.DataArray(values, dims=["sample", "head", "query", "key"], name="attention")


def drawn(ax):
    return np.asarray(ax.images[0].get_array())


def uniform_ends(bar):
    """Where the color bar says that uniform attention is."""
    assert [text.get_text() for text in bar.texts] == ["uniform"]
    return sorted({float(line.get_ydata()[0]) for line in bar.lines if len(set(line.get_ydata())) == 1})


@pytest.mark.parametrize("draw", [lambda s: plot.heatmap(s).figure, plot.heads, lambda s: plot.model({"a": s})])
def test_the_color_bar_marks_the_share_of_each_key_if_all_were_alike(draw):
    assert uniform_ends(draw(scores_of(4)).axes[-1]) == pytest.approx([0.25])
    flat = xr.full_like(scores_of(5), 0.2)
    assert uniform_ends(draw(flat).axes[-1]) == pytest.approx([0.2])


def test_keys_out_of_view_do_not_count():
    padded = np.array([1, 1, 1, 0, 0])
    bar = plot.heatmap(scores_of(5, mask=padded)).figure.axes[-1]
    assert uniform_ends(bar) == pytest.approx([1 / 3])
    queries_too = scores_of(5, mask=padded * padded[:, None])
    assert uniform_ends(plot.heatmap(queries_too).figure.axes[-1]) == pytest.approx([1 / 3])


def test_a_causal_mask_has_a_range_of_shares():
    bar = plot.heatmap(scores_of(5, mask=np.tri(5))).figure.axes[-1]
    ends = uniform_ends(bar)
    assert (ends[0], ends[-1]) == pytest.approx((0.2, 1))


def test_bins_hold_the_share_of_all_their_keys():
    assert uniform_ends(plot.heatmap(scores_of(128, samples=1)).figure.axes[-1]) == pytest.approx([2 / 128])
    names = [f"feature {number}" for number in range(50)]
    chosen = plot.heatmap(scores_of(50).assign_coords(query=names, key=names), top_k=10)
    assert uniform_ends(chosen.figure.axes[-1]) == pytest.approx([1 / 50])
    bins = {"query_bin": [0, 10], "key_bin": [0, 10], "query_bin_end": ("query_bin", [10, 30])}
    bins |= {"key_bin_end": ("key_bin", [10, 30])}
    summary = xr.Dataset({"map": (("query_bin", "key_bin"), [[0.5, 0.5], [0.2, 0.8]])}, bins)
    assert uniform_ends(plot.heatmap(summary).figure.axes[-1]) == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize("change", [lambda s: s * 0.5, lambda s: s.isel(key=[0, 1]), lambda s: s * 0])
def test_what_is_no_share_has_no_mark(change):
    bar = plot.heatmap(change(scores_of())).figure.axes[-1]
    assert not bar.texts


def test_a_mark_beyond_the_scale_is_left_out():
    assert not plot.heatmap(scores_of(4), vmax=0.1).figure.axes[-1].texts


def test_all_heads_of_all_layers_are_maps_on_one_scale(tmp_path):
    scores = {"first": scores_of(4, seed=1), "second": scores_of(6, heads=3, seed=2)}
    figure = plot.model(scores)
    maps = [layer.mean("sample").values[head] for layer in scores.values() for head in range(layer.sizes["head"])]
    assert len(figure.axes) == 5 + 1
    for ax, values in zip(figure.axes, maps, strict=False):
        np.testing.assert_allclose(drawn(ax), values)
        assert ax.images[0].get_clim() == pytest.approx((0, max(map(np.max, maps))), rel=1e-5)
    assert [ax.get_ylabel() for ax in figure.axes[:5]] == ["first", "", "second", "", ""]
    assert [ax.get_title() for ax in figure.axes[:5]] == ["head 0", "head 1", "", "", "head 2"]
    assert figure.get_suptitle() == "mean over 3 samples"
    assert uniform_ends(figure.axes[-1]) == pytest.approx([1 / 6, 1 / 4])
    for name in ("model.png", "model.svg"):
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_rows_are_layers_and_columns_are_heads():
    figure = plot.model({name: scores_of(heads=heads) for name, heads in (("a", 2), ("b", 3), ("c", 1))})
    figure.draw_without_rendering()
    boxes = [ax.get_window_extent() for ax in figure.axes[:6]]
    lefts, tops = ({round(getattr(box, side), -1) for box in boxes} for side in ("x0", "y1"))
    assert len(lefts) == 3
    assert len(tops) == 3
    assert boxes[0].y0 > boxes[2].y1 > boxes[5].y1
    assert len({round(box.width, -1) for box in boxes}) == 1


def test_tokens_stay_in_their_order_and_many_are_binned():
    names = [f"feature {number}" for number in range(50)]
    scores = scores_of(50).assign_coords(query=names, key=names)
    np.testing.assert_allclose(drawn(plot.model({"a": scores}).axes[0]), scores.mean("sample").values[0])
    assert drawn(plot.model({"a": scores_of(100)}).axes[0]).shape == (64, 64)


def test_one_sample_one_layer_and_summaries_are_drawn():
    scores = scores_of(4)
    figure = plot.model({"a": scores.assign_coords(sample=[4, 5, 6]).isel(sample=1)})
    assert figure.get_suptitle() == "sample 5"
    assert plot.model(scores).axes[0].get_ylabel() == "attention"
    bins = {f"{dim}_bin": range(4) for dim in ("query", "key")}
    bins |= {f"{dim}_bin_end": (f"{dim}_bin", [1, 2, 3, 4]) for dim in ("query", "key")}
    dims = ("sample", "head", "query_bin", "key_bin")
    summary = xr.Dataset({"map": (dims, scores.values)}, bins, {"layer": "block"})
    summary["received"] = (("sample", "head", "key"), scores.mean("query").values)
    named = summary.assign_coords(key=list("abcd"))
    for one in (summary, named):
        np.testing.assert_allclose(drawn(plot.model({"block": one}).axes[0]), scores.mean("sample").values[0])
    assert plot.model(summary).axes[0].get_ylabel() == "block"


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "must not be empty"),
        ({"good": scores_of(), "bad": scores_of()[:, 0]}, "Layer 'bad'.*must have a dimension `head`"),
        ({"good": scores_of(), "bad": scores_of() - 0.5}, "Layer 'bad'.*must not be negative"),
        ({"bad": scores_of().values}, "Layer 'bad'.*Received: ndarray"),
        ([scores_of()], "Received: list"),
    ],
)
def test_layers_that_cannot_be_drawn_are_named(scores, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        plot.model(scores)


def test_the_end_of_the_scale_is_checked():
    with pytest.raises(ValueError, match="`vmax` must be"):
        plot.model({"a": scores_of()}, vmax=0)
