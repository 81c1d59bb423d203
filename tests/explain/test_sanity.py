"""Attributions without what was learned, and those of models from other seeds."""

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers, ops
from scipy import stats

from kerasfactory import explain
from kerasfactory.explain import _sanity
from kerasfactory.layers import FeatureTokenizer

RNG = np.random.default_rng(3)
X = RNG.normal(size=(60, 8)).astype("float32")


def tabular(seed=0, sharpness=1.0, features=8, names=None):
    """A model that was never trained; sharp, as if it had been."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((features,))
    tokens = FeatureTokenizer(8, feature_names=names)(inputs)
    attended = layers.MultiHeadAttention(2, 4, name="attention")(tokens, tokens)
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(attended)))
    attention = model.get_layer("attention")
    attention._query_dense.kernel.assign(sharpness * attention._query_dense.kernel)
    return model


def test_what_is_kept_by_hand():
    """A model whose attribution is its first weights: the shares, the shuffles and the relabelings are NumPy's."""
    model = tabular()
    kernel = model.get_layer("attention")._query_dense.kernel

    def first_weights(model, x):
        return np.tile(np.abs(ops.convert_to_numpy(ops.convert_to_tensor(kernel))).reshape(-1)[:8], (len(x), 1))

    own = first_weights(model, X)[0]
    own = own / own.sum()
    result = explain.parameter_randomization(model, X, method=first_weights, draws=30, verbose=0)
    values = ops.convert_to_numpy(kernel).reshape(-1)
    # All that another shuffle can put there, and so what all distances are made of on average.
    shuffled = np.abs(np.stack([np.random.default_rng(k).permutation(values)[:8] for k in range(3000)]))
    expected = np.abs(shuffled / shuffled.sum(axis=1, keepdims=True) - own).sum(axis=1) / 2
    spread = expected.std() / np.sqrt(30)
    assert abs(result["distance"].mean() - expected.mean()) < 4 * spread
    assert abs(result["null"].mean() - expected.mean()) < 4 * spread  # the order of what is shuffled says nothing
    np.testing.assert_allclose(result["kept"], 1 - result["distance"] / result["null"].mean("relabeling"))
    assert result["median_kept"] == np.median(result["kept"])
    above = int((result["kept"] > 0.5).sum())
    assert result["p_value"] == stats.binomtest(above, 30, alternative="less").pvalue
    assert result["interval"][0] <= result["median_kept"] <= result["interval"][1]


def test_attention_is_in_the_weights_and_data_are_not():
    model = tabular(sharpness=8)
    attention = explain.parameter_randomization(model, X, draws=10, verbose=0)
    assert attention["interval"].sel(bound="upper") < 0.5
    assert attention["p_value"] == 0.5**10
    assert attention.attrs["method"] == "attention"

    data = explain.parameter_randomization(model, X, method=lambda model, x: np.abs(x), draws=10, verbose=0)
    np.testing.assert_allclose(data["kept"], 1)
    assert (data["p_value"], data["p_opposite"]) == (1, 0.5**10)

    even = explain.parameter_randomization(model, X, method="uniform", draws=10, verbose=0)
    assert np.isnan(even["kept"]).all()
    assert (even["p_value"], even["p_opposite"]) == (1, 1)


def test_the_size_of_batches_changes_nothing_but_the_memory(monkeypatch):
    sizes, attribute = [], _sanity.attribute

    def counted(model, x, **arguments):
        sizes.append(arguments["batch_size"])
        return attribute(model, x, **arguments)

    monkeypatch.setattr(_sanity, "attribute", counted)
    model = tabular()
    small = explain.parameter_randomization(model, X, draws=2, batch_size=7, verbose=0)
    xr.testing.assert_allclose(small, explain.parameter_randomization(model, X, draws=2, verbose=0), atol=1e-6)
    assert sizes == [7, 7, 7, None, None, None]


@pytest.mark.parametrize("method", ["rollout", "attention_gradient", "value_norm"])
def test_each_method_runs_with_other_weights(method):
    result = explain.parameter_randomization(tabular(), X, method=method, task="classification", draws=2, verbose=0)
    assert (result["distance"] > 0).all()
    assert np.isfinite(result["kept"]).all()


def test_which_weights_are_shuffled_and_which_samples_are_used():
    model = tabular()
    tokens = explain.parameter_randomization(
        model, X, method=lambda model, x: model.layers[1](x)[..., 0], draws=2, verbose=0
    )
    np.testing.assert_array_equal(tokens["distance"], 0)  # those of the tokenizer are not attention's
    assert (
        explain.parameter_randomization(
            model, X, method=lambda model, x: model.layers[1](x)[..., 0], parameters="all", draws=2, verbose=0
        )["distance"]
        > 0
    ).all()
    many = explain.parameter_randomization(model, np.tile(X, (5, 1)), draws=1, verbose=0)
    assert many.attrs["samples"] == 256


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameters": "none"}, '"attention" or "all"'),
        ({"tolerance": 1}, "`tolerance` must be a number between 0 and 1"),
        ({"draws": 0}, "`draws` must be a positive integer"),
        ({"level": 95}, "`level` must be"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer"),
        ({"x": iter([X])}, "must be an array"),
        ({"method": "atention"}, "Did you mean 'attention'"),
        ({"method": lambda model, x: x[0]}, r"must be \(sample, feature\)"),
        ({"method": lambda model, x: x * np.nan}, "NaN or infinite"),
    ],
)
def test_randomization_refuses_what_it_cannot_test(arguments, message):
    with pytest.raises(ValueError, match=message):
        explain.parameter_randomization(**({"model": tabular(), "x": X, "verbose": 0} | arguments))


@pytest.mark.backend_independent
def test_an_attribution_that_changes_its_shape_is_refused():
    widths = iter([4, 5])
    with pytest.raises(ValueError, match="of one shape, whatever the weights"):
        explain.parameter_randomization(tabular(), X, method=lambda model, x: x[:, : next(widths)], verbose=0)


@pytest.mark.backend_independent
def test_models_that_were_never_trained_agree_by_chance():
    """Over many pairs of them, a p-value is at most 0.05 in about one of twenty."""
    few = X[:20]
    attributions = [explain.attribute(tabular(seed), few, batch_size=20, verbose=0) for seed in range(60)]
    p_values = [
        explain.seed_agreement(attributions[first : first + 3], draws=400)["p_value"].item()
        for first in range(0, 60, 3)
    ]
    found = sum(p_value <= 0.05 for p_value in p_values)
    assert stats.binomtest(found, len(p_values), 0.05, alternative="greater").pvalue > 0.01


@pytest.mark.backend_independent
def test_models_that_agree_and_models_that_do_not():
    names = {"feature": list("abcdefgh")}
    truth = np.broadcast_to(np.arange(1.0, 9), (40, 8))
    alike = [xr.DataArray(truth * (1 + 0.01 * k), names, ("sample", "feature")) for k in range(3)]
    result = explain.seed_agreement(alike)
    assert result["overlap"] == 1
    assert result["p_value"] < 0.05
    np.testing.assert_allclose(result["mean"], np.arange(1, 9) / 36)
    np.testing.assert_allclose(result["spread"], 0, atol=1e-12)
    assert result["mean"].sel(feature="h") == result["mean"].max()
    assert result["null"].mean().item() == pytest.approx(2 / 8, abs=0.05)  # two of eight are in a top of two by chance

    apart = explain.seed_agreement([truth, truth[:, ::-1]])
    assert (apart["overlap"], apart["p_value"]) == (0, 1)
    assert apart["p_opposite"] < 0.7 < apart["p_value"]
    assert explain.seed_agreement([truth, truth], top_k=5).attrs["top_k"] == 5
    one = explain.seed_agreement([truth[:1], truth[:1]])
    assert np.isnan(one["interval"]).all()
    with pytest.raises(ValueError, match="at least 2 models"):
        explain.seed_agreement([truth])
    with pytest.raises(ValueError, match="same samples and features"):
        explain.seed_agreement([truth, truth[:, 1:]])
    with pytest.raises(ValueError, match="same samples and features"):
        explain.seed_agreement([alike[0], alike[0].assign_coords(feature=list("hgfedcba"))])
    with pytest.raises(ValueError, match="smaller than the number of features"):
        explain.seed_agreement([truth, truth], top_k=8)


def padded(values, view):
    shares = values * view / (values * view).sum(axis=1, keepdims=True)
    return xr.DataArray(shares, {"in_view": (("sample", "feature"), view)}, ("sample", "feature"))


@pytest.mark.backend_independent
def test_models_that_know_nothing_agree_by_chance_on_padded_data():
    """Before, they agreed in all runs: what is seldom padding came first."""
    runs, p_values = 40, {"random": [], "uniform": [], "fixed": [], "truth": []}
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        view = np.arange(10) < rng.integers(2, 11, (40, 1))
        shape, truth = view.shape, np.exp(rng.normal(size=10))
        models = {
            "random": [rng.exponential(size=shape) for _ in range(3)],
            "uniform": [np.ones(shape) for _ in range(3)],
            "fixed": [np.exp(rng.normal(size=10)) for _ in range(3)],
            "truth": [truth * rng.uniform(0.8, 1.2, size=shape) for _ in range(3)],
        }
        for name, values in models.items():
            given = [padded(of_model, view) for of_model in values]
            result = explain.seed_agreement(given, draws=39, seed=seed)
            p_values[name].append(result["p_value"].item())
    raw = explain.seed_agreement([attribution.values for attribution in given], draws=39, seed=seed)
    xr.testing.assert_identical(raw, result.drop_vars("feature"))  # what is 0 in all of them is out of view
    assert np.mean(np.array(p_values.pop("truth")) <= 0.1) > 0.8
    for found in map(np.array, p_values.values()):
        for level in (0.05, 0.2, 0.5):
            assert np.sum(found <= level) <= stats.binom.ppf(0.999, runs, level)


@pytest.mark.backend_independent
def test_means_over_what_is_in_view():
    view = np.array([[True, True, True, True, False], [True, True, False, False, False]])
    uniform = padded(np.ones(view.shape), view)
    result = explain.seed_agreement([uniform, uniform], draws=9)
    np.testing.assert_allclose(result["mean"], [1 / 3, 1 / 3, 1 / 3, 1 / 3, np.nan])  # 3 are in view on average
    assert result.attrs["top_k"] == 1
    one = padded(np.array([[1.0, 2, 3, 4, 0], [4, 1, 0, 0, 0]]), view)
    other = explain.seed_agreement([one, one], draws=9)
    np.testing.assert_allclose(other["mean"] * 3, [(0.4 + 1.6) / 2, (0.8 + 0.4) / 2, 1.2, 1.6, np.nan])
    with pytest.raises(ValueError, match="smaller than the number of features, 4"):
        explain.seed_agreement([one, one], top_k=4)


@pytest.mark.backend_independent
def test_an_overlap_has_an_interval_by_groups():
    rng = np.random.default_rng(0)
    common = rng.random((50, 8)) ** 4
    attributions = [common + 0.2 * rng.random((50, 8)) for _ in range(3)]
    once = explain.seed_agreement(attributions)["interval"].values
    repeated = [np.repeat(attribution, 4, axis=0) for attribution in attributions]
    for said in ({"groups": np.repeat(np.arange(50), 4)}, {"block": 4}):
        np.testing.assert_allclose(explain.seed_agreement(repeated, **said)["interval"], once, atol=0.17)
    assert np.isnan(explain.seed_agreement(repeated, groups=np.zeros(200))["interval"]).all()


@pytest.mark.backend_independent
def test_what_is_out_of_view_is_not_kept():
    """Padding to twice the length changes nothing."""
    model, view = tabular(), np.arange(8) < 4
    shuffled = iter(np.random.default_rng(0).random((100, 60, 4)))

    def attributed(model, x):
        values = next(shuffled)
        return padded(np.concatenate([values, values], axis=1), np.tile(view, (60, 1))) if wide else values

    wide = False
    cropped = explain.parameter_randomization(model, X, method=attributed, draws=4, verbose=0)
    shuffled, wide = iter(np.random.default_rng(0).random((100, 60, 4))), True
    result = explain.parameter_randomization(model, X, method=attributed, draws=4, verbose=0)
    np.testing.assert_allclose(result["distance"], cropped["distance"])
    np.testing.assert_allclose(result["null"].mean("relabeling"), cropped["null"].mean("relabeling"), rtol=0.04)

    named = tabular(names=list("abcdefgh"))
    result = explain.parameter_randomization(named, X, special_tokens=list("bcdefgh"), draws=1, verbose=0)
    assert (result["distance"].item(), np.isnan(result["median_kept"])) == (0, True)


@pytest.mark.backend_independent
def test_the_interval_of_an_overlap_is_that_of_other_samples():
    """In half of the samples the models agree: which features come first depends on the samples that are drawn."""
    rng = np.random.default_rng(0)
    common = rng.random((50, 8)) ** 4
    attributions = [common + 0.2 * rng.random((50, 8)) for _ in range(3)]
    result = explain.seed_agreement(attributions, level=0.1)

    def overlap(index):
        tops = [set(np.argsort(-(one / one.sum(1, keepdims=True))[index].mean(0))[:2]) for one in attributions]
        return np.mean([len(tops[i] & tops[j]) / 2 for i, j in ((0, 1), (0, 2), (1, 2))])

    assert result["overlap"] == overlap(np.arange(50))
    by_hand = np.quantile([overlap(rng.integers(50, size=50)) for _ in range(2000)], [0.05, 0.95])
    np.testing.assert_allclose(result["interval"], by_hand, atol=0.17)  # it moves in steps of 1/6
