"""Several methods side by side: whether they agree, and which are faithful, tested together."""

import keras
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib import pyplot as plt

from kerasfactory import explain, plot
from kerasfactory.explain._engine.statistics import holm
from kerasfactory.layers import FeatureTokenizer

WEIGHTS = np.array([5, -4, 3, -2, 1, 0, 0, 0])
X = np.random.default_rng(0).normal(size=(100, 8))
EFFECT = np.abs(WEIGHTS * X)


@pytest.fixture(scope="module")
def linear():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.set_weights([WEIGHTS[:, None], np.zeros(1)])
    return model


@pytest.fixture(scope="module")
def attentive():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    tokens = FeatureTokenizer(4)(inputs)
    attended = keras.layers.MultiHeadAttention(2, 4, name="attention")(tokens, tokens)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))
    model.compile(loss="mse")
    return model


@pytest.mark.backend_independent
def test_holm_is_that_of_the_paper():
    # By hand: 4 x 0.01; 3 x 0.02; 2 x 0.03, and 1 x 0.5.
    np.testing.assert_allclose(holm(np.array([0.03, 0.5, 0.01, 0.02])), [0.06, 0.5, 0.04, 0.06])
    np.testing.assert_allclose(holm(np.array([0.4, 0.9, 0.5])), [1, 1, 1])
    # Of 3 true nulls in 4, in any dependence: here all are one number.
    p = np.random.default_rng(0).random(4000)
    assert np.mean([holm(np.array([value] * 3)).min() <= 0.05 for value in p]) < 0.05


@pytest.mark.backend_independent
def test_planted_truth_is_found_and_noise_is_not(linear):
    noise = np.random.default_rng(2).random(X.shape)
    methods = {"effect": EFFECT, "double": lambda model, x: 2 * EFFECT, "noise": noise, "opposite": -EFFECT}
    result = explain.compare(linear, X, methods=methods, top_k=3, draws=100, verbose=0)
    assert result["reading"].values.tolist() == result["reading_other"].values.tolist() == list(methods)
    assert (result["p_adjusted"].sel(reading=["effect", "double"]) <= 0.05).all()
    assert (result["p_adjusted"].sel(reading=["noise", "opposite"]) > 0.2).all()
    for name, other in (("p_adjusted", "p_value"), ("p_adjusted_sufficiency", "p_value_sufficiency")):
        np.testing.assert_allclose(result[name], holm(result[other].values))

    # The test of each method is that of `faithfulness`, and of each pair that of `seed_agreement`.
    alone = explain.faithfulness(linear, X, noise, draws=100, verbose=0)
    of_noise = result.sel(reading="noise")
    for name, values in alone.items():
        np.testing.assert_allclose(of_noise[name], values, err_msg=name)
    assert of_noise["observed"] == alone.attrs["observed"]
    two = explain.seed_agreement([EFFECT, noise], top_k=3, draws=100)
    pair = result.sel(reading="effect", reading_other="noise")
    assert (pair["overlap"], pair["p_value_overlap"]) == (two["overlap"], two["p_value"])
    assert pair["chance"] == two.attrs["chance"] == pytest.approx(3 / 8, abs=0.05)

    overlap = result["overlap"].values
    np.testing.assert_array_equal(overlap, overlap.T)
    np.testing.assert_array_equal(np.diag(overlap), 1)
    assert overlap[0, 1] == overlap[0, 3] == 1  # absolute values are compared
    pairs = np.triu_indices(4, 1)
    np.testing.assert_allclose(
        result["p_adjusted_overlap"].values[pairs], holm(result["p_value_overlap"].values[pairs])
    )
    assert np.isnan(np.diag(result["p_value_overlap"])).all()
    assert result.attrs["adjustment"] == "Holm"
    assert result.attrs["top_k"] == 3
    np.testing.assert_allclose(result["attribution"].sel(reading="double"), 2 * EFFECT)


def test_methods_of_attention_and_of_the_whole_model(attentive):
    methods = ["attention", "rollout", "integrated_gradients", "uniform"]
    result = explain.compare(attentive, X[:30], methods=methods, draws=10, verbose=0)
    for method in methods:
        alone = explain.attribute(attentive, X[:30], method=method, verbose=0)
        np.testing.assert_allclose(result["attribution"].sel(reading=method), alone, rtol=1e-5, atol=1e-7)
    assert result.sizes["reading"] == 4
    assert np.isfinite(result["aopc_comprehensiveness"]).all()


@pytest.mark.backend_independent
def test_tables_keep_their_names_and_masks_their_view(attentive):
    table = pd.DataFrame(X[:20], [f"row {n}" for n in range(20)], list("abcdefgh"))
    result = explain.compare(
        attentive,
        table,
        methods={"attention": "attention", "SHAP": EFFECT[:20]},
        special_tokens=["h"],
        draws=5,
        verbose=0,
    )
    assert result["feature"].values.tolist() == list("abcdefgh")
    assert result["sample"].values.tolist() == table.index.tolist()
    assert not result["in_view"].sel(feature="h").any()
    assert result["in_view"].sel(feature="a").all()
    of_names = explain.compare(attentive, table, methods={"one": EFFECT[:20], "two": EFFECT[:20]}, draws=5, verbose=0)
    assert of_names["feature"].values.tolist() == list("abcdefgh")
    xr.testing.assert_identical(
        of_names,
        explain.compare(attentive, table, methods={"one": EFFECT[:20], "two": EFFECT[:20]}, draws=5, verbose=0),
    )


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("attention", "at least 2 methods"),
        (["attention"], "at least 2 methods"),
        (["attention", "attention"], r"a name of its own. Give a dictionary.*\['attention', 'attention'\]"),
        (["attention", "magic"], "There is no method 'magic'"),
        ({"attention": "attention", "short": EFFECT[:, :5]}, r"a number for each sample and feature, \(100, 8\)"),
    ],
)
def test_bad_methods_are_refused(attentive, methods, message):
    with pytest.raises(ValueError, match=message):
        explain.compare(attentive, X, methods=methods, verbose=0)
    named = {"first": "attention", "second": "attention"}
    assert explain.compare(attentive, X[:9], methods=named, draws=2, verbose=0)["overlap"].min() == 1


@pytest.mark.backend_independent
def test_the_picture_says_what_the_result_holds(linear):
    methods = {"effect": EFFECT, "noise": np.random.default_rng(1).random(X.shape), "$opposite$": -EFFECT}
    result = explain.compare(linear, X, methods=methods, top_k=2, draws=40, verbose=0)
    figure = plot.compare(result, top_k=4)
    left, middle, right = figure.axes
    assert left.get_title() == "rank, 4 of 8 features"
    ranks = np.array([text.get_text() for text in left.texts]).reshape(4, 3)
    order = np.argsort(-EFFECT.mean(axis=0))
    shown = [int(label.get_text()) for label in left.get_yticklabels()]
    assert [ranks[shown.index(feature), 0] for feature in order[:2]] == ["1", "2"]
    assert (ranks[:, 0] == ranks[:, 2]).all()
    assert [text.get_text() for text in middle.texts][::4] == ["1.00"] * 3
    assert middle.get_xlabel().startswith(f"by chance {np.nanmean(result['chance']):.2f}")
    assert right.get_yticklabels()[0].get_text() == f"effect\np = {result['p_adjusted'].values[0]:.2g}"
    assert right.get_yticklabels()[2].get_text().startswith("\\$opposite\\$")
    np.testing.assert_allclose(right.lines[0].get_xdata(), result["observed"])
    plt.close(figure)
    plt.close(plot.compare(result.isel(sample=[0])))
    with pytest.raises(ValueError, match="`overlap` with the dimensions"):
        plot.compare(result.drop_vars("overlap"))
    with pytest.raises(ValueError, match=r"what `explain.compare` returns. Received: DataArray"):
        plot.compare(result["attribution"])
