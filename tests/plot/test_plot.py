"""Pictures say what the numbers say: what is drawn, in which order, on which scale, and what is refused."""

import io
import itertools
import json
import re
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import RendererAgg
from scipy import stats

from kerasfactory import explain, plot

pytestmark = pytest.mark.backend_independent  # what `explain` returns are NumPy's arrays

DIMS = ["sample", "head", "query", "key"]
NAMES = ["age", "pulse", "weight"]


@pytest.fixture(autouse=True)
def headless():
    """No window, no figure left over, and no setting changed."""
    with mpl.rc_context():
        plt.switch_backend("agg")
        before = dict(mpl.rcParams)
        yield
        assert dict(mpl.rcParams) == before
    plt.close("all")


def scores_of(keys, names=None, samples=3, heads=2, seed=0):
    values = np.random.default_rng(seed).dirichlet(np.full(keys, 0.3), size=(samples, heads, keys))
    coords = {"sample": range(samples), "head": range(heads)}
    coords |= {"query": names, "key": names} if names else {}
    return xr.DataArray(values, coords, DIMS, "attention")


def summary_of(scores, bins):
    """As `explain.summarize` makes it of scores without masked queries."""
    size = scores.sizes["key"]
    edges = np.arange(bins + 1) * size // bins
    values = np.add.reduceat(np.add.reduceat(scores.values, edges[:-1], axis=3), edges[:-1], axis=2)
    dims = ("sample", "head", "query_bin", "key_bin")
    coords = {name: scores[name].values for name in scores.coords}
    for dim in ("query_bin", "key_bin"):
        coords |= {dim: edges[:-1], f"{dim}_end": (dim, edges[1:])}
    received = (("sample", "head", "key"), scores.mean("query").values)
    entropy = (("sample", "head", "query"), -(scores * np.log(scores)).sum("key").values)
    means = (dims, values / np.diff(edges)[:, None])
    return xr.Dataset({"map": means, "received": received, "entropy": entropy}, coords, {"layer": "attention"})


def drawn(ax):
    return np.asarray(ax.images[0].get_array())


def texts(labels):
    return [label.get_text() for label in labels]


def overlaps(ax):
    """Whether any two names along an axis touch, as drawn. Boxes of text at 45° overlap where the text does not."""
    figure = ax.get_figure(root=True)
    figure.canvas.draw()
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        if any(label.get_rotation() not in (0, 90) for label in labels):
            continue
        boxes = [label.get_window_extent() for label in labels if label.get_text()]
        if any(one.overlaps(other) for one, other in itertools.pairwise(boxes)):
            return True
    return False


def test_plot_is_imported_only_when_asked_for_and_brings_no_keras():
    code = (
        "import sys, kerasfactory; assert 'matplotlib' not in sys.modules\n"
        "import kerasfactory.plot; assert 'keras' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_heatmap_draws_the_mean_and_says_so():
    scores = scores_of(3, NAMES)
    ax = plot.heatmap(scores)
    np.testing.assert_allclose(drawn(ax), scores.mean(["sample", "head"]))
    assert ax.get_title() == "attention, mean over 3 samples and 2 heads"
    assert texts(ax.get_xticklabels()) == texts(ax.get_yticklabels()) == NAMES
    assert ax.images[0].get_clim() == pytest.approx((0, drawn(ax).max()), rel=1e-5)
    assert f"from 0 to {drawn(ax).max():.2g}" in ax.images[0].colorbar.ax.get_ylabel()


def test_heatmap_of_one_head_or_a_rollout_averages_what_there_is():
    scores = scores_of(3, NAMES)
    one = plot.heatmap(scores.sel(sample=1, head=0))
    np.testing.assert_allclose(drawn(one), scores[1, 0])
    assert one.get_title() == "attention, sample 1, head 0"
    np.testing.assert_allclose(drawn(plot.heatmap(scores[:, 0].drop_vars("head"))), scores[:, 0].mean("sample"))
    assert plot.heatmap(scores[0, 0].drop_vars(["sample", "head"]).rename(None)).get_title() == ""
    assert one.images[0].colorbar.ax.get_ylabel().startswith("attention\nfrom 0 to")
    combined = plot.heatmap(explain.rollout(scores))
    assert combined.get_title() == "rollout, mean over 3 samples"
    assert combined.images[0].colorbar.ax.get_ylabel().startswith("rollout\nfrom 0 to")


def test_queries_that_look_nowhere_do_not_dilute_the_mean():
    scores = scores_of(3, samples=2, heads=1)
    scores[1, 0, 2] = 0  # padding in the second sample
    np.testing.assert_allclose(drawn(plot.heatmap(scores))[2], scores[0, 0, 2])
    np.testing.assert_allclose(drawn(plot.heatmap(scores)).sum(axis=1), 1)


def test_heatmap_draws_on_given_axes_with_a_given_scale_and_leaves_the_rest_alone():
    figure, axes = plt.subplots(1, 2)
    assert plot.heatmap(scores_of(3), ax=axes[1], vmax=1) is axes[1]
    assert axes[1].images[0].get_clim() == (0, 1)
    assert not axes[0].images
    assert plt.get_fignums() == [figure.number]


def test_a_map_of_one_text_has_its_words_as_names():
    words = [["not", "bad", "not"], ["too", "long", ""]]
    tokens = {f"{dim}_token": (("sample", dim), words) for dim in ("query", "key")}
    scores = scores_of(3, samples=2).assign_coords(tokens)
    for number in (0, 1):
        ax = plot.heatmap(scores[number])
        assert texts(ax.get_xticklabels()) == texts(ax.get_yticklabels()) == words[number]
    assert plot.heatmap(scores).get_xlabel() == "key (looked at), position"
    assert len(plot.model({"a": scores[0]}).axes) == 3
    np.testing.assert_allclose(drawn(plot.model({"a": scores[0]}).axes[0]), scores[0, 0])


def test_many_named_tokens_show_those_that_receive_most():
    names = [f"a feature with the long name {number}" for number in range(100)]
    scores = scores_of(100, names)
    ax = plot.heatmap(scores, top_k=10)
    mean = scores.mean(["sample", "head"]).values
    most = np.argsort(-mean.sum(axis=0))[:10]
    np.testing.assert_allclose(drawn(ax), mean[np.ix_(most, most)])
    assert ax.get_xticklabels()[0].get_text().endswith(f"name {most[0]}")
    assert ax.get_xticklabels()[0].get_size() == ax.get_yticklabels()[0].get_size()
    share = mean[:, most].sum() / mean.sum()
    said = " ".join(ax.get_title().split())
    assert f"the 10 of 100 features with most attention ({share:.0%} of it), most first" in said


def test_many_positions_are_binned_as_summarize_does():
    scores = scores_of(1000, samples=1, heads=1)
    ax = plot.heatmap(scores)
    np.testing.assert_allclose(drawn(ax), summary_of(scores, 64)["map"][0, 0])
    np.testing.assert_allclose(drawn(ax).sum(axis=1), 1)
    assert "positions in bins" in ax.get_title()
    assert "64 bins" in ax.get_xlabel()
    assert "64 bins" in ax.get_ylabel()
    assert "sum of a bin" in ax.images[0].colorbar.ax.get_ylabel()
    assert ax.get_xlim() == (-0.5, 999.5)


@pytest.mark.parametrize("draw", [plot.heatmap, plot.heads, plot.interactive])
def test_a_summary_is_drawn_wherever_scores_are(draw):
    draw(summary_of(scores_of(100), 20))
    draw({"attention": summary_of(scores_of(5), 5)})


def test_what_explain_returns_is_drawn_as_it_comes():
    import keras  # nothing else here needs it

    from kerasfactory import explain

    inputs = keras.Input((None, 4))
    attended = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs, use_causal_mask=True)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(attended))
    x = np.random.default_rng(0).normal(size=(2, 100, 4))
    for length, bins in ((5, 5), (100, 64)):
        scores = explain.capture(model, x[:, :length], verbose=0)
        summary = explain.summarize(model, x[:, :length], map_size=bins, verbose=0)
        ax = plot.heatmap(summary)
        assert drawn(ax).shape == (bins, bins)
        np.testing.assert_allclose(drawn(ax), drawn(plot.heatmap(scores)), atol=1e-6)
        assert ax.get_title().startswith("attention, mean over 2 samples and 2 heads")
        for one, other in zip(plot.heads(summary).axes[:2], plot.heads(scores).axes[:2], strict=True):
            np.testing.assert_allclose(drawn(one), drawn(other), atol=1e-6)


def test_a_summary_with_as_many_bins_as_tokens_is_the_scores_with_their_names():
    scores = scores_of(3, NAMES)
    ax = plot.heatmap(summary_of(scores, 3))
    np.testing.assert_allclose(drawn(ax), scores.mean(["sample", "head"]))
    assert texts(ax.get_xticklabels()) == NAMES


def test_a_coarse_summary_shows_positions():
    scores = scores_of(100)
    ax = plot.heatmap(summary_of(scores, 20))
    assert drawn(ax).shape == (20, 20)
    assert ax.get_xlim() == (-0.5, 99.5)
    assert "20 bins" in ax.get_xlabel()


def test_heads_share_one_scale_and_say_which():
    scores = scores_of(4, heads=5)
    figure = plot.heads(scores, columns=3)
    axes = figure.axes[:5]
    assert [ax.get_title() for ax in axes] == [f"head {head}" for head in range(5)]
    mean = scores.mean("sample").values
    for ax, values in zip(axes, mean, strict=True):
        np.testing.assert_allclose(drawn(ax), values)
        assert ax.images[0].get_clim() == pytest.approx((0, mean.max()), rel=1e-5)
    assert f"from 0 to {mean.max():.2g}, the largest\nof all heads" in figure.axes[-1].get_ylabel()
    assert figure.get_suptitle() == "attention, mean over 3 samples"


@pytest.mark.parametrize(("size", "named"), [(5, True), (30, True), (100, True), (1000, False)])
def test_labels_do_not_touch_each_other(size, named):
    names = [f"measurement {number} of the worst kind" for number in range(size)] if named else None
    scores = scores_of(size, names, samples=1)
    assert not overlaps(plot.heatmap(scores))
    for ax in plot.heads(scores).axes[:2]:
        assert not overlaps(ax)


def test_labels_fit_on_small_axes_too():
    _, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    plot.heatmap(scores_of(30, [f"feature {number}" for number in range(30)]), ax=axes[0])
    assert not overlaps(axes[0])
    assert len(axes[0].get_yticks()) > 5


WRONG_SCORES = {
    "several layers": (lambda s: {"first": s, "second": s}, r"one layer.*\['first', 'second'\]"),
    "an array": (lambda s: s.values, "must be a DataArray.*Received: ndarray"),
    "other dimensions": (lambda s: s.rename(query="query_0", key="key_0"), r"dimensions \(query, key\).*query_0"),
    "too many": (lambda s: s.expand_dims("axis_1"), "Choose one entry.*axis_1"),
    "empty": (lambda s: s[:0], "must not be empty.*'sample': 0"),
    "nan": (lambda s: s.where(s["sample"] != 1), "must be finite.*dropna"),
    "negative": (lambda s: s - 0.5, "must not be negative"),
    "no map": (lambda s: s.to_dataset(name="scores"), "must be a DataArray.*Received: Dataset"),
}


@pytest.mark.parametrize("draw", [plot.heatmap, plot.heads, plot.interactive])
@pytest.mark.parametrize("wrong", WRONG_SCORES)
def test_scores_that_cannot_be_drawn_are_refused(draw, wrong):
    change, message = WRONG_SCORES[wrong]
    if (draw, wrong) == (plot.interactive, "several layers"):
        change, message = lambda s: {}, "must not be empty"  # it draws several
    with pytest.raises(ValueError, match=f"(?s){message}"):
        draw(change(scores_of(3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: plot.heatmap(s, top_k=0), "`top_k` must be a positive integer"),
        (lambda s: plot.heatmap(s, vmax=0), "`vmax` must be a number above 0"),
        (lambda s: plot.heads(s, columns=0), "`columns` must be a positive integer"),
        (lambda s: plot.heads(s[:, 0]), "must have a dimension `head`"),
        (lambda s: plot.interactive(s, samples=0), "`samples` must be a positive integer"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(scores_of(3))
    assert not plt.get_fignums()


def attribution_of(means, samples=50):
    values = np.random.default_rng(0).normal(means, 0.1, size=(samples, len(means)))
    names = [f"feature {number}" for number in range(len(means))]
    return xr.DataArray(values, {"feature": names}, ["sample", "feature"])


def test_features_are_ranked_with_bootstrap_intervals():
    attribution = attribution_of([0.2, 0.9, 0.5])
    ax = plot.features(attribution, level=0.1)
    assert texts(ax.get_yticklabels()) == ["feature 1", "feature 2", "feature 0"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first is on top
    order = [1, 2, 0]
    np.testing.assert_allclose(ax.lines[0].get_xdata(), attribution.mean("sample")[order])
    (lines,) = ax.collections
    low, high = np.array([segment[:, 0] for segment in lines.get_segments()]).T
    scipy = stats.bootstrap(
        (attribution.values,), np.mean, axis=0, confidence_level=0.9, method="percentile", random_state=0
    )
    np.testing.assert_allclose(low, scipy.confidence_interval.low[order], atol=0.004)
    np.testing.assert_allclose(high, scipy.confidence_interval.high[order], atol=0.004)
    assert ax.get_xlabel() == "attribution, mean over 50 samples,\nwith its 90% interval"


def test_an_error_level_of_5_percent_draws_the_95_percent_interval():
    attribution = attribution_of([0.2, 0.9, 0.5])
    rng = np.random.default_rng(0)
    means = [attribution.values[rng.integers(50, size=50)].mean(axis=0) for _ in range(1000)]
    for ax in (plot.features(attribution, level=0.05), plot.features(attribution)):
        bounds = np.array([segment[:, 0] for segment in ax.collections[0].get_segments()]).T
        np.testing.assert_allclose(bounds, np.percentile(means, [2.5, 97.5], axis=0)[:, [1, 2, 0]], rtol=1e-9)
        assert ax.get_xlabel().endswith("with its 95% interval")


def test_features_beyond_the_top_are_left_out_by_size_not_sign():
    ax = plot.features(attribution_of([0.2, -0.9, 0.5, 0.01]), top_k=2)
    assert texts(ax.get_yticklabels()) == ["feature 2", "feature 1"]
    assert ax.get_title() == "2 of 4 features"


def test_one_sample_has_no_interval():
    for attribution in (attribution_of([0.2, 0.9], samples=1), attribution_of([0.2, 0.9])[0]):
        ax = plot.features(attribution)
        assert not ax.collections
        assert ax.get_xlabel() == "attribution, mean over 1 sample"


def test_several_attributions_are_side_by_side_in_the_order_of_the_first():
    ax = plot.features({"attention": attribution_of([0.2, 0.9]), "uniform": attribution_of([0.5, 0.5])})
    assert texts(ax.get_yticklabels()) == ["feature 1", "feature 0"]
    assert texts(ax.get_legend().get_texts()) == ["attention", "uniform"]
    assert len({line.get_marker() for line in ax.lines}) == 2


def claims_of(effects, verdicts):
    effects = np.asarray(effects, float)
    interval = np.stack([effects - 0.1, effects + 0.1], axis=1)
    names = [f"feature {number}" for number in range(len(effects))]
    variables = {"effect": ("feature", effects), "interval": (("feature", "bound"), interval)}
    return xr.Dataset(variables | {"verdict": ("feature", verdicts)}, {"feature": names})


def test_claims_carry_their_verdict_as_shape_and_word():
    ax = plot.features(claims_of([0.1, 0.9, np.nan], ["refuted", "supported", "undetermined"]))
    assert texts(ax.get_yticklabels()) == [
        "feature 1 (supported)",
        "feature 0 (refuted)",
        "feature 2 (undetermined)",
    ]
    assert len({line.get_marker() for line in ax.lines if line.get_label() in ("refuted", "supported")}) == 2


def test_long_names_that_differ_in_the_middle_stay_apart():
    names = [f"measurement {number} of the systolic blood pressure, maximum" for number in range(20)]
    ax = plot.features(attribution_of(np.ones(20)).assign_coords(feature=names))
    assert {label.replace("\n", " ") for label in texts(ax.get_yticklabels())} == set(names)
    assert not overlaps(ax)


@pytest.mark.parametrize(
    ("attribution", "message"),
    [
        (attribution_of([0.1, np.nan]), "must be finite. 50 of 100"),
        (attribution_of([0.1])[:0], "must not be empty"),
        (attribution_of([0.1]).rename(feature="key"), r"dimensions \(sample, feature\).*'key'"),
        (attribution_of([0.1]).values, "Received: ndarray"),
        ({}, "must not be empty"),
        ({"one": attribution_of([0.1]), "other": attribution_of([0.1, 0.2])}, "same features.*'other'"),
        (claims_of([0.1], ["proven"]), r"verdict must be one of.*\['proven'\]"),
        (claims_of([0.1], ["supported"]).drop_vars("interval"), "must hold `effect`"),
    ],
)
def test_attributions_that_cannot_be_drawn_are_refused(attribution, message):
    with pytest.raises(ValueError, match=message):
        plot.features(attribution)


@pytest.mark.parametrize("level", [95, 0.95, 0])
def test_the_level_of_the_interval_is_checked_and_a_confidence_is_shown_the_way_out(level):
    with pytest.raises(ValueError, match=r"`level` must be a number between 0 and 0\.5.*an error level: 0\.05 "):
        plot.features(attribution_of([0.1]), level=level)
    assert not plt.get_fignums()


def test_the_seed_of_the_bootstrap_is_checked():
    with pytest.raises(ValueError, match="`seed` must be an integer, at least 0"):
        plot.features(attribution_of([0.1]), seed=-1)


def statistics_of(heads=2, **changed):
    numbers = {"entropy": [0.9, 0.4], "confidence": [0.2, 0.7], "distance": [3.0, 1.5]} | changed
    variables = {name: ("head", np.resize(values, heads)) for name, values in numbers.items()}
    redundancy = 0.3 * (1 - np.eye(heads))
    return xr.Dataset(variables | {"redundancy": (("head", "head_other"), redundancy)}, {"head": range(heads)})


def test_head_statistics_draws_each_number_of_each_layer():
    figure = plot.head_statistics({"first": statistics_of(), "second": statistics_of(distance=[9.0, 0.0])})
    points = [ax.lines[0].get_xdata().tolist() for ax in figure.axes[:3]]
    assert points == [[0.9, 0.4], [0.2, 0.7], [3.0, 1.5]]
    np.testing.assert_allclose(drawn(figure.axes[3]), [[0, 0.3], [0.3, 0]])
    assert figure.axes[3].images[0].get_clim() == (0, 1)
    assert figure.axes[2].get_xlim()[0] == figure.axes[6].get_xlim()[0] == 0
    assert figure.axes[2].get_xlim() == figure.axes[6].get_xlim()
    assert figure.axes[4].get_ylabel().startswith("second")
    assert len(plot.head_statistics(statistics_of()).axes) == 5


def test_layers_may_differ_in_their_heads():
    figure = plot.head_statistics({"first": statistics_of(4), "second": statistics_of(2)})
    for axes, heads in ((figure.axes[:4], 4), (figure.axes[4:8], 2)):
        assert drawn(axes[3]).shape == (heads, heads)
        assert axes[3].get_xlim() == axes[0].get_ylim()[::-1] == (-0.5, heads - 0.5)


def test_a_distance_that_is_not_defined_is_said_to_be():
    figure = plot.head_statistics(statistics_of(distance=[np.nan, np.nan]))
    assert "not defined" in figure.axes[2].texts[0].get_text()


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({}, "not empty"),
        ({"first": scores_of(3)}, "must be a Dataset"),
        (statistics_of().drop_vars("redundancy"), "must hold `redundancy`"),
        (statistics_of(entropy=[0.1, np.nan]), "`entropy` must be finite"),
    ],
)
def test_statistics_that_cannot_be_drawn_are_refused(statistics, message):
    with pytest.raises(ValueError, match=message):
        plot.head_statistics(statistics)


def history_of(epochs=4, heads=2):
    values = np.linspace(1, 0.2, epochs * heads).reshape(epochs, heads)
    variables = dict.fromkeys(("entropy", "confidence", "distance"), (("epoch", "head"), values))
    return xr.Dataset(variables, {"epoch": range(epochs), "head": range(heads)})


def test_training_has_a_line_for_each_head():
    history = history_of(heads=9)
    figure = plot.training({"first": history, "second": history_of()})
    assert len(figure.axes) == 6
    lines = figure.axes[0].lines
    for line, head in zip(lines, range(9), strict=True):
        np.testing.assert_allclose(line.get_ydata(), history["entropy"].sel(head=head))
    assert figure.axes[2].get_ylim()[1] > history["distance"].max()
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 9


@pytest.mark.parametrize("heads", [2, 16])
def test_the_legend_of_a_training_names_all_heads_within_the_figure(heads):
    figure = plot.training({"first": history_of(), "second": history_of(heads=heads)})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert texts(legend.get_texts()) == [f"head {head}" for head in range(heads)]
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_training_that_diverged_says_from_when():
    history = history_of()
    figure = plot.training({"attention": history.where(history["epoch"] < 2)})
    assert "NaN from epoch 2 on" in figure.axes[0].get_ylabel()


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({}, r"not empty. Received: \{\}"),
        (history_of().isel(epoch=0), r"`entropy` with the dimensions \('epoch', 'head'\)"),
        (history_of() * np.nan, "finite numbers"),
    ],
)
def test_histories_that_cannot_be_drawn_are_refused(history, message):
    with pytest.raises(ValueError, match=message):
        plot.training(history)


def faithfulness_of(samples=60, **attributes):
    rng = np.random.default_rng(0)
    dims = ("sample", "fraction")
    variables = {
        "comprehensiveness": (dims, rng.normal([0.2, 0.4, 0.5], 0.1, (samples, 3))),
        "sufficiency": (dims, rng.normal([0.4, 0.2, 0.1], 0.1, (samples, 3))),
        "aopc_comprehensiveness": 0.37,
        "null": ("draw", rng.normal(0.1, 0.05, 99)),
        "p_value": 0.01,
    }
    return xr.Dataset(variables, {"fraction": [0.1, 0.2, 0.5]}, {"level": 0.1, "removal": "mean"} | attributes)


def test_faithfulness_draws_curves_null_and_observed():
    result = faithfulness_of()
    curves, chance = plot.faithfulness(result).axes
    np.testing.assert_allclose(curves.lines[0].get_ydata(), result["comprehensiveness"].mean("sample"))
    np.testing.assert_allclose(curves.lines[1].get_ydata(), result["sufficiency"].mean("sample"))
    assert len(curves.collections) == 2
    assert curves.get_title() == "mean over 60 samples, 90% band"
    assert 'removed: "mean"' in curves.get_xlabel()
    assert sum(patch.get_height() for patch in chance.patches) == 99
    assert chance.lines[0].get_xdata() == [0.37, 0.37]
    assert chance.get_title() == "p = 0.01, of 99 random attributions"


def test_faithfulness_compares_with_the_null_what_was_compared():
    # With many samples the null distribution is of some of them, and so is what it is compared with.
    chance = plot.faithfulness(faithfulness_of(observed=0.35)).axes[1]
    assert chance.lines[0].get_xdata() == [0.35, 0.35]


def test_faithfulness_of_one_sample_has_no_band():
    curves = plot.faithfulness(faithfulness_of(samples=1)).axes[0]
    assert curves.get_title() == "one sample: no band"
    assert not curves.collections


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (scores_of(3), "must be a Dataset"),
        (faithfulness_of().drop_vars("null"), "with `null`"),
        (faithfulness_of() * np.nan, "`comprehensiveness` must be finite"),
        (faithfulness_of().isel(sample=slice(0)), "`comprehensiveness` must not be empty"),
    ],
)
def test_results_that_cannot_be_drawn_are_refused(result, message):
    with pytest.raises(ValueError, match=message):
        plot.faithfulness(result)


def test_the_interactive_map_is_one_piece_and_always_the_same():
    fragment = plot.interactive(scores_of(3, NAMES))
    assert fragment == plot.interactive(scores_of(3, NAMES))
    assert fragment != plot.interactive(scores_of(3, NAMES, seed=1))
    assert "\n" not in fragment
    for outside in ("src=", "href=", "@import", "url(", "import(", "fetch("):
        assert outside not in fragment
    assert " id=" not in fragment  # nothing to collide with


def test_the_interactive_map_has_sliders_for_what_there_is_to_slide():
    assert plot.interactive(scores_of(3)).count('type="range"') == 2
    assert plot.interactive(scores_of(3, samples=1)).count('type="range"') == 1
    assert plot.interactive(scores_of(3)[0, 0]).count('type="range"') == 0
    assert '"samples":["0","1"],' in plot.interactive(scores_of(3), samples=2)


def test_the_interactive_map_of_several_layers_holds_them_all_on_one_scale():
    scores = {"first": scores_of(3, NAMES, seed=1), "<second>": scores_of(5, heads=3, seed=2)}
    fragment = plot.interactive(scores)
    data = json.JSONDecoder().raw_decode(fragment.partition("const data = ")[2])[0]
    assert [layer["name"] for layer in data["layers"]] == list(scores)
    assert [layer["heads"] for layer in data["layers"]] == [["0", "1"], ["0", "1", "2"]]
    for layer, values in zip(data["layers"], scores.values(), strict=True):
        weights = np.array(layer["weights"]).reshape(values.shape) / 1000
        order = [NAMES.index(name) for name in layer["keys"]] if values.sizes["key"] == 3 else slice(None)
        np.testing.assert_allclose(weights, values.values[:, :, order][..., order], atol=6e-4)
    assert data["end"] == pytest.approx(max(float(values.max()) for values in scores.values()), abs=1e-5)
    assert re.findall(r'name="(\w+)" min="0" max="(\d)"', fragment) == [("layer", "1"), ("sample", "2"), ("head", "2")]
    assert 'class="overview"' in fragment
    assert 'class="overview"' not in plot.interactive({"first": scores["first"]})
    assert "uniform: 0.2 to 0.33" in fragment
    with pytest.raises(ValueError, match=r"same samples.*layer\[:2\].*\[3, 3, 2\]"):
        plot.interactive(scores | {"third": scores["first"][:2]})
    with pytest.raises(ValueError, match=r"Layer 'third'.*must not be negative"):
        plot.interactive(scores | {"third": scores["first"] - 0.5})


def test_the_interactive_map_says_what_uniform_attention_would_be():
    assert "uniform: 0.33<" in plot.interactive(scores_of(3))
    assert "uniform" not in plot.interactive(scores_of(3) / 2)


def test_html_is_what_a_notebook_shows():
    fragment = plot.interactive(scores_of(3))
    assert type(fragment._repr_html_()) is str
    assert fragment._repr_html_() == fragment


def test_the_interactive_map_cannot_be_broken_by_a_name():
    evil = ["</script><script>alert(1)</script>", "`capture`", '"><img src=x>']
    scores = scores_of(3, evil)
    fragment = plot.interactive(scores.rename("<b>layer</b>"))
    assert fragment.count("</script>") == 1
    assert "<img" not in fragment
    assert "`capture`" not in fragment
    assert "&lt;b&gt;layer" in fragment
    assert 'class="kerasfactory-map mathjax_ignore tex2jax_ignore"' in fragment  # or notebooks look for formulas


def test_the_interactive_map_says_names_as_they_are():
    names = [*HOSTILE, LONG, ""]
    fragment = plot.interactive(scores_of(14, names).rename("$a$ <i>\u202eb</i> & \ud800"))
    fragment.encode("ascii", "strict")
    data = json.JSONDecoder().raw_decode(fragment.partition("const data = ")[2])[0]
    shown = [*HOSTILE.values(), LONG, ""]
    (layer,) = data["layers"]
    assert sorted(layer["queries"]) == sorted(layer["keys"]) == sorted(shown)
    assert sorted(text for _, text in layer["keyTicks"]) == sorted([*HOSTILE.values(), "xxxxxxxxxxxx…xxxxxxxxxxx", ""])
    assert r'<p class="title">$a$ &lt;i&gt;\u202eb&lt;/i&gt; &amp; \ud800</p>' in fragment


# What people call features, layers and heads, and each as it has to be drawn.
HOSTILE = {
    "cost ($) in ($)": "cost ($) in ($)",
    "$AAPL$": "$AAPL$",
    "$$": "$$",
    r"\$5_$": r"\$5_$",
    "_mine": "_mine",
    r"\frac{a_1}{2}": r"\frac{a_1}{2}",
    "90% & #1 {x} ~": "90% & #1 {x} ~",
    "</script><!--": "</script><!--",
    "two\nlines\r": r"two\nlines\r",
    "nul\x00, \u2028": r"nul\x00, \u2028",
    "lone \ud800": r"lone \ud800",
    "abc\u202edef": r"abc\u202edef",
}
LONG = "x" * 300
NAMED = {
    "features of a map": lambda names: plot.heatmap(scores_of(14, names)).figure,
    "features of maps": lambda names: plot.heads(scores_of(14, names)),
    "heads of maps": lambda names: plot.heads(scores_of(2, heads=14).assign_coords(head=names)),
    "features": lambda names: plot.features(attribution_of(np.ones(14)).assign_coords(feature=names)).figure,
    "claims": lambda names: plot.features(claims_of(np.ones(14), ["refuted"] * 14).assign_coords(feature=names)).figure,
    "methods": lambda names: plot.features(dict.fromkeys(names, attribution_of([1.0]))).figure,
    "layers in training": lambda names: plot.training(dict.fromkeys(names, history_of())),
    "heads in training": lambda names: plot.training(history_of(heads=14).assign_coords(head=names)),
    "layers of a model": lambda names: plot.model(dict.fromkeys(names, scores_of(2, heads=1))),
    "pictures": lambda names: plot.image(
        xr.DataArray(np.ones((14, 4)), {"sample": names}, ["sample", "feature"]), np.ones((14, 2, 2)), samples=14
    ),
    "words": lambda names: (
        plot.text(
            attribution_of(np.ones(14)).assign_coords(feature=names), ax=plt.figure(figsize=(9, 9)).gca(), samples=1
        ).figure
    ),
    "titles of sentences": lambda names: (
        plot.text(
            xr.DataArray(np.ones((14, 1)), {"sample": names, "feature": ["word"]}, ["sample", "feature"]),
            ax=plt.figure(figsize=(9, 9)).gca(),
            samples=14,
        ).figure
    ),
    "layers with statistics": lambda names: plot.head_statistics(dict.fromkeys(names, statistics_of())),
}
AROUND = {"claims": ("", " (refuted)"), "heads of maps": ("head ", ""), "heads in training": ("head ", "")}


def drawn_lines(figure, monkeypatch):
    """The lines that the renderer gets, none of which is a formula or TeX."""
    lines = []
    draw = RendererAgg.draw_text

    def noted(self, gc, x, y, text, *arguments, ismath=False, **options):
        assert not ismath, text
        lines.append(text)
        return draw(self, gc, x, y, text, *arguments, ismath=ismath, **options)

    monkeypatch.setattr(RendererAgg, "draw_text", noted)
    figure.set_layout_engine("none")  # takes long
    figure.savefig(io.BytesIO(), dpi=30)
    return lines


@pytest.mark.parametrize("what", NAMED)
def test_names_are_drawn_as_they_are(what, monkeypatch):
    lines = drawn_lines(NAMED[what]([*HOSTILE, LONG, ""]), monkeypatch)
    before, after = AROUND.get(what, ("", ""))
    assert {f"{before}{shown}{after}" for shown in HOSTILE.values()} <= set(lines)
    assert LONG not in "".join(lines)
    assert "xxx…xxx" in "".join(lines).replace(" ", "")
    assert max(map(len, lines)) < 60


@pytest.mark.parametrize("draw", [lambda scores: plot.heatmap(scores).figure, plot.heads])
def test_the_name_of_a_layer_is_a_title_as_it_is(draw, monkeypatch):
    for name, shown in ((r"a_1 $\frac$ $b$", r"a_1 $\frac$ $b$"), ("two\nlines", r"two\nlines"), (LONG, "xxx…xxx")):
        lines = drawn_lines(draw({name: scores_of(2)}), monkeypatch)
        assert shown in "".join(lines)
        assert max(map(len, lines)) < 80


def test_what_a_result_says_of_itself_is_drawn_as_it_is(monkeypatch):
    lines = drawn_lines(plot.faithfulness(faithfulness_of(removal="$mean$ of _all_")), monkeypatch)
    assert 'removed: "$mean$ of _all_"' in lines


@pytest.mark.parametrize("again", [False, True])
def test_a_legend_has_all_methods_also_if_it_is_made_again(again):
    ax = plot.features(dict.fromkeys(["_mine", "", "other"], attribution_of([1.0, 2.0])))
    if again:
        ax.legend()
    legend = ax.get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_mine", "", "other"]
    assert [handle.get_marker() for handle in legend.legend_handles] == ["o", "s", "D"]


def test_names_that_a_font_has_no_glyphs_for_are_drawn_and_matplotlib_says_so():
    ax = plot.heatmap(scores_of(2, ["年齢", "👩‍🔬"]))  # no warning before the figure is shown
    with pytest.warns(UserWarning, match="Glyph .* missing from font"):
        ax.figure.savefig(io.BytesIO())


def test_names_that_are_cut_leave_room_for_the_picture():
    names = [f"{number} {LONG}" for number in range(14)]
    for figure in (
        plot.features(claims_of(np.ones(14), ["needed, not claimed"] * 14).assign_coords(feature=names)).figure,
        plot.heatmap(scores_of(14, names)).figure,
        plot.heads(scores_of(14, names, heads=1)),
    ):
        figure.draw_without_rendering()
        ax = figure.axes[0]
        assert ax.get_window_extent().width > 150
        texts_within = [*ax.get_yticklabels(), ax.title, ax.xaxis.label]
        boxes = [text.get_window_extent() for text in texts_within if text.get_text()]
        assert min(box.x0 for box in boxes) >= 0
        assert max(box.x1 for box in boxes) <= figure.bbox.x1


@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (3, 1), (2, 2), (3, 3), (70, 2)])
@pytest.mark.parametrize("draw", [lambda scores: plot.heatmap(scores), lambda scores: plot.heads(scores).axes[0]])
def test_positions_are_whole_numbers(draw, sizes):
    ax = draw(xr.DataArray(np.full((2, *sizes), 1 / sizes[1]), dims=["head", "query", "key"]))
    for size, axis, (low, high) in zip(
        sizes, (ax.yaxis, ax.xaxis), (sorted(ax.get_ylim()), ax.get_xlim()), strict=True
    ):
        shown = [place for place in axis.get_ticklocs() if low <= place <= high]
        assert shown
        assert shown == [int(place) for place in shown]
        assert set(shown) <= set(range(size))


def test_epochs_and_draws_are_whole_numbers():
    figure = plot.training(history_of(epochs=1))
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_xlim()
    assert [place for place in figure.axes[0].get_xticks() if low <= place <= high] == [0]
    places = plot.faithfulness(faithfulness_of().isel(draw=slice(2))).axes[1].get_yticks()
    assert (places == places.astype(int)).all()


def dates(*texts):
    return np.array(texts, "datetime64[ns]")


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        (dates("2024-01-31", "2024-02-01"), ["2024-01-31", "2024-02-01"]),
        (dates("2024-01-31T06", "2024-02-01"), ["2024-01-31 06:00", "2024-02-01 00:00"]),
        (dates("2024-01-31T06:00:01.5", "NaT"), ["2024-01-31 06:00:01.500", "NaT"]),
        (pd.date_range("2024-01-31", periods=2, tz="Asia/Tokyo"), ["2024-01-31", "2024-02-01"]),
        (pd.period_range("2024-01", periods=2, freq="M"), ["2024-01", "2024-02"]),
        (np.array([90, 120], "timedelta64[m]"), ["90 min", "120 min"]),
        (np.array([24, 72], "timedelta64[h]"), ["1 d", "3 d"]),
        ([0, 10], ["0", "10"]),
        ([0.25, 0.5], ["0.25", "0.5"]),
    ],
)
def test_times_are_drawn_as_such(times, shown):
    scores = scores_of(2, samples=2).assign_coords(query=times, key=times)
    ax = plot.heatmap(scores)
    assert texts(ax.get_xticklabels()) == texts(ax.get_yticklabels()) == shown
    assert ax.get_xlabel() == "key (looked at)"
    ax = plot.features(attribution_of([2.0, 1.0]).assign_coords(feature=times))
    assert texts(ax.get_yticklabels()) == shown
    scores = scores_of(2, samples=2).assign_coords(sample=times)
    if getattr(times, "tz", None) is None:  # xarray leaves it out of a single date
        title = plot.heatmap(scores[0, 0]).get_title()
        assert " ".join(title.split()) == f"attention, sample {shown[0]}, head 0"
    assert f'"samples":{json.dumps(shown, separators=(",", ":"))}' in plot.interactive(scores)


@pytest.mark.parametrize("summarized", [False, True])
def test_many_dates_stay_in_their_order(summarized):
    scores = scores_of(100, list(pd.date_range("2024-01-01", periods=100)))
    drawing = (
        summary_of(scores.drop_vars(["query", "key"]), 20).assign_coords(query=scores["query"], key=scores["key"])
        if summarized
        else scores
    )
    bins = 20 if summarized else 64
    ax = plot.heatmap(drawing)
    assert drawn(ax).shape == (bins, bins)
    ax.figure.draw_without_rendering()
    found = dict(zip(ax.get_xticks(), texts(ax.get_xticklabels()), strict=True))
    assert {place: text for place, text in found.items() if 0 <= place < 100} == {
        place: str(np.datetime64("2024-01-01") + int(place)) for place in found if 0 <= place < 100
    }
    assert len(found) > 3
    assert ax.get_xlabel() == f"key (looked at)\n{bins} bins"
    assert not overlaps(ax)
    fragment = plot.interactive(drawing)
    assert '[0,"2024-01-01"]' in fragment
    assert ' to 2024-04-09"' in fragment
