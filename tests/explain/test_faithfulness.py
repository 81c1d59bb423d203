"""`faithfulness` and the other tests that an attribution could fail, on models whose truth is known."""

import gc
import weakref

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers, ops
from scipy import stats
from scipy.spatial.distance import jensenshannon

from kerasfactory import explain
from kerasfactory.explain._controls import _distance, _permuted, attention_controls
from kerasfactory.explain._outputs import predictions
from kerasfactory.explain._sanity import randomised_parameters, seed_agreement
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

RNG = np.random.default_rng(3)
X = RNG.normal(size=(40, 8)).astype("float32")
SEQUENCE = RNG.normal(size=(12, 5, 8)).astype("float32")
WEIGHTS = np.array([5, -4, 3, -2, 1, 0.5, 0, 0])


def linear(kernel, activation=None):
    kernel = np.asarray(kernel, "float32").reshape(len(kernel), -1)
    model = keras.Sequential([keras.Input((len(kernel),)), layers.Dense(kernel.shape[1], activation=activation)])
    model.set_weights([kernel, np.full(kernel.shape[1], 0.1, "float32")])
    return model


def attentive(sharpness=1.0, activation=None, outputs=1, **call):
    """A model that is nothing but attention, which looks at single keys if it is sharp."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    attended = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs, **call)
    decided = layers.Dense(outputs, activation=activation)(layers.GlobalAveragePooling1D()(attended))
    model = keras.Model(inputs, decided)
    attention = model.get_layer("attention")
    attention._query_dense.kernel.assign(sharpness * attention._query_dense.kernel)
    return model


@keras.saving.register_keras_serializable("test_faithfulness")
class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.tokens = FeatureTokenizer(8)
        self.attention = InterpretableMultiHeadAttention(4, 2, name="attention")
        self.norm = layers.BatchNormalization()
        self.head = layers.Dense(3, activation="softmax")

    def call(self, x):
        return self.head(layers.Flatten()(self.norm(self.attention(self.tokens(x)))))


def subclassed():
    keras.utils.set_random_seed(0)
    model = Subclassed()
    model(X)
    return model


def largest(values, count):
    """Where the `count` largest of each row are."""
    return np.argsort(np.argsort(-values, axis=1), axis=1) < count


@pytest.mark.parametrize("removal", ["mean", "mask", "marginal"])
def test_aopc_of_a_linear_model_is_what_one_calculates_by_hand(removal):
    attribution = np.abs(WEIGHTS * X) + 1e-3 * RNG.random(X.shape)
    background = RNG.normal(size=(1 if removal == "marginal" else 30, 8)).astype("float32")
    given = {"background": background, "mask_value": 0} if removal != "mask" else {"mask_value": 0.5}
    result = explain.faithfulness(
        linear(WEIGHTS), X, attribution, removal=removal, **given, fractions=[0.5, 0.1, 0.3], draws=3, verbose=0
    )
    baseline = 0.5 if removal == "mask" else background.mean(axis=0)
    parts = WEIGHTS * (X - baseline)
    assert result["fraction"].values.tolist() == [0.1, 0.3, 0.5]
    assert result["removed"].values.tolist() == [1, 2, 4]
    for number, count in enumerate([1, 2, 4]):
        top = largest(attribution, count)
        comprehensiveness = np.abs((parts * top).sum(axis=1))
        sufficiency = np.abs((parts * ~top).sum(axis=1))
        np.testing.assert_allclose(result["comprehensiveness"][:, number], comprehensiveness, atol=1e-4)
        np.testing.assert_allclose(result["sufficiency"][:, number], sufficiency, atol=1e-4)
    assert result["aopc_comprehensiveness"].item() == pytest.approx(result["comprehensiveness"].values.mean())
    assert result["aopc_sufficiency"].item() == pytest.approx(result["sufficiency"].values.mean())
    assert result.attrs["removal"] == removal
    assert result.attrs["change"] == "absolute"
    lower, upper = result["interval"].values
    assert lower < result["aopc_comprehensiveness"] < upper


def test_the_marginal_value_comes_from_the_background_and_from_one_row():
    background = np.repeat(np.arange(1, 6, dtype="float32")[:, None], 8, axis=1)
    kernel = np.array([1, 10, 0, 0, 0, 0, 0, 0])
    first = np.tile([9, 8, 0, 0, 0, 0, 0, 0], (40, 1))
    result = explain.faithfulness(
        linear(kernel), 0 * X, first, background=background, fractions=[0.25], draws=1, verbose=0
    )
    # Both features change to one number from 1 to 5, and the mean over three draws is taken.
    drawn = result["comprehensiveness"].values / 11
    np.testing.assert_allclose(drawn * 3, np.round(drawn * 3), atol=1e-5)
    assert 1 <= drawn.min() < drawn.max() <= 5
    assert result.attrs["background"] == "given, 5 samples"
    assert result.attrs["background_rows"] == 3


@pytest.mark.parametrize(("which", "said"), [({}, "predicted class"), ({"target": 2}, 2), ({"y": "labels"}, "y")])
def test_the_output_that_is_meant(which, said):
    kernel = RNG.normal(size=(8, 3))
    model, labels = linear(kernel), RNG.integers(0, 3, 40)
    which = {"y": labels} if "y" in which else which
    classes = {"predicted class": model.predict(X, verbose=0).argmax(axis=1), 2: np.full(40, 2), "y": labels}[said]
    result = explain.faithfulness(model, X, X, removal="mask", fractions=[0.25], draws=2, verbose=0, **which)
    change = (kernel[:, classes].T * X * largest(X, 2)).sum(axis=1)
    np.testing.assert_allclose(result["comprehensiveness"][:, 0], change, atol=1e-4)
    assert (change < 0).any()
    assert (result.attrs["target"], result.attrs["change"]) == (said, "signed")


def test_positions_with_channels_and_tokens():
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(inputs)))
    attribution = RNG.random((12, 5))
    result = explain.faithfulness(model, SEQUENCE, attribution, removal="mask", fractions=[0.4], draws=2, verbose=0)
    without = np.where(largest(attribution, 2)[..., None], 0, SEQUENCE)
    expected = np.abs(model.predict(SEQUENCE, verbose=0) - model.predict(without, verbose=0))
    np.testing.assert_allclose(result["comprehensiveness"], expected, atol=1e-5)

    ids = RNG.integers(1, 9, (12, 5))
    embedded = keras.Sequential(
        [keras.Input((5,), dtype="int32"), layers.Embedding(10, 4), layers.Flatten(), layers.Dense(1)]
    )
    for removal, mask_value in [("mask", 9), ("marginal", 0)]:
        result = explain.faithfulness(
            embedded, ids, attribution, removal=removal, mask_value=mask_value, fractions=[0.4], draws=2, verbose=0
        )
        if removal == "mask":
            without = np.where(largest(attribution, 2), 9, ids)
            expected = np.abs(embedded.predict(ids, verbose=0) - embedded.predict(without, verbose=0))
            np.testing.assert_allclose(result["comprehensiveness"], expected, atol=1e-5)
            assert result.attrs["mask_value"] == 9


def test_the_truth_is_recognised_and_its_opposite_is_not():
    attribution = xr.DataArray(np.abs(WEIGHTS * X), dims=("sample", "feature"))
    good = explain.faithfulness(linear(WEIGHTS), X, attribution.T, verbose=0)
    assert good["p_value"] < 0.02
    assert good["aopc_comprehensiveness"] > good["aopc_sufficiency"]
    bad = explain.faithfulness(linear(WEIGHTS), X, -attribution, verbose=0)
    assert bad["p_value"] > 0.9
    # One ranking for all samples is enough, if there are rankings enough that it might have been.
    one = explain.faithfulness(linear(WEIGHTS), X, np.broadcast_to(np.abs(WEIGHTS), X.shape), verbose=0)
    assert one["p_value"] < 0.05


@pytest.mark.parametrize("alike", [True, False], ids=["one ranking for all", "one for each sample"])
def test_attributions_that_know_nothing_are_seldom_called_faithful(alike):
    model, attempts, rng = linear(WEIGHTS), 60, np.random.default_rng(0)
    p_values = []
    for seed in range(attempts):
        ranking = rng.random((1, 8)) if alike else rng.random((40, 8))
        result = explain.faithfulness(
            model, X, np.broadcast_to(ranking, X.shape), fractions=[0.25, 0.5], draws=19, verbose=0, seed=seed
        )
        p_values.append(result["p_value"].item())
    for level in (0.05, 0.2, 0.5):
        assert np.sum(np.array(p_values) <= level) <= stats.binom.ppf(0.999, attempts, level)
    assert stats.binom.ppf(0.001, attempts, 0.5) <= np.sum(np.array(p_values) <= 0.5)  # nor is the test deaf


def test_what_changes_nothing():
    constant = X.copy()
    constant[:, 0] = 2  # its removal cannot show, whatever the model makes of it
    result = explain.faithfulness(linear(WEIGHTS), constant, np.eye(8)[np.zeros(40, int)], fractions=[0.1], verbose=0)
    np.testing.assert_array_equal(result["comprehensiveness"], 0)
    assert result["p_value"] == 1
    deaf = explain.faithfulness(linear(np.zeros(8)), X, X, verbose=0)
    assert (deaf["p_value"], deaf["aopc_comprehensiveness"]) == (1, 0)
    even = explain.faithfulness(linear(WEIGHTS), X, np.full(X.shape, 1 / 8), verbose=0)
    assert even["p_value"] > 0.01
    everything_removed = explain.faithfulness(linear(WEIGHTS), X, X, fractions=[1], draws=2, verbose=0)
    np.testing.assert_allclose(everything_removed["sufficiency"], 0, atol=1e-5)


def test_one_sample_has_no_interval():
    result = explain.faithfulness(linear(WEIGHTS), X[:1], X[:1], background=X, draws=9, verbose=0)
    assert np.isnan(result["interval"]).all()
    assert 0.1 <= result["p_value"] <= 1


def test_the_seed_decides_and_samples_for_the_null_are_limited():
    x = RNG.normal(size=(600, 8)).astype("float32")
    one, same, other = (
        explain.faithfulness(linear(WEIGHTS), x, x, draws=5, fractions=[0.5], verbose=0, seed=seed)
        for seed in (1, 1, 2)
    )
    xr.testing.assert_identical(one, same)
    assert not one["comprehensiveness"].equals(other["comprehensiveness"])
    assert one.sizes["sample"] == 600
    # The same row for all, so that the one row of the null is that of the result.
    mean = explain.faithfulness(linear(WEIGHTS), x, x, removal="mean", draws=5, fractions=[0.5], verbose=0)
    assert mean.attrs["null_samples"] == 500
    assert mean.attrs["observed"] == pytest.approx(mean["aopc_comprehensiveness"].item(), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"attribution": X[:, :7]},
            r"`attribution` must have a number for each.*shape \(40, 7\), x of shape \(40, 8\)",
        ),
        ({"attribution": X[0]}, "numpy.broadcast_to"),
        (
            {"attribution": np.where(X > 2, np.nan, X)},
            "`attribution` is NaN or infinite in .* the first of them number",
        ),
        ({"x": np.where(X > 2, np.nan, X)}, "output is NaN or infinite for .* of 40 rows of `x`"),
        ({"background": X * np.nan}, 'features removed by "marginal"'),
        ({"x": X[:, :1], "attribution": X[:, :1], "model": linear([1])}, "one feature: there is nothing to rank"),
        ({"x": X[:1], "attribution": X[:1]}, "holds one sample.*Give a `background`"),
        ({"x": [[1, 2]]}, "`x` must be an array with the features along axis 1"),
        ({"x": X[0]}, "`x` must be an array of numbers"),
        ({"removal": "marginl"}, "Did you mean 'marginal'"),
        ({"removal": 3}, "must be one of 'marginal', 'mean', 'mask'. Received: removal=3"),
        ({"removal": "mask", "background": X}, "`background` is not used"),
        ({"removal": "mean", "x": X.astype(int)}, "as token ids are"),
        ({"background": X[:, :5]}, r"samples like those of `x`. Received: background of shape \(40, 5\)"),
        ({"fractions": [0, 0.5]}, "must lie above 0 and at most at 1"),
        ({"fractions": [1.5]}, "must lie above 0"),
        ({"fractions": []}, "must lie above 0"),
        ({"fractions": [np.nan]}, "must lie above 0"),
        ({"draws": 0}, "`draws` must be a positive integer"),
        ({"level": 5}, "`level` must lie between 0 and 1"),
        ({"target": 1}, "`target` must be the number of an output, from 0 to 0"),
        ({"target": "first"}, "Received: target='first'"),
        ({"y": np.zeros(40)}, "this one has one, leave `y` out"),
        ({"y": np.zeros(40), "target": 0}, "both say which output"),
        ({"y": np.full(40, 3), "model": linear(np.ones((8, 3)))}, "40 integers from 0 to 2"),
        ({"y": np.full(40, 0.5), "model": linear(np.ones((8, 3)))}, "40 integers from 0 to 2"),
        ({"model": layers.Dense(1)}, "must be a keras.Model"),
        ({"verbose": "loud"}, "`verbose` must be"),
    ],
)
def test_errors_tell_the_way_out(arguments, message):
    arguments = {"model": linear(WEIGHTS), "x": X, "attribution": X, "verbose": 0} | arguments
    with pytest.raises(ValueError, match=message):
        explain.faithfulness(**arguments)


def test_progress_is_shown_when_asked_for(capsys):
    explain.faithfulness(linear(WEIGHTS), X, X, draws=4, verbose=1)
    assert "5/5" in capsys.readouterr().out
    explain.faithfulness(linear(WEIGHTS), X, X, draws=4, verbose=0)
    assert capsys.readouterr().out == ""


def test_predictions_are_those_of_predict():
    model = subclassed()
    np.testing.assert_allclose(predictions(model, X, 20), ops.convert_to_numpy(model(X)), atol=1e-6)
    model.set_weights([weight * 0.5 for weight in model.get_weights()])
    np.testing.assert_allclose(predictions(model, X, 20), ops.convert_to_numpy(model(X)), atol=1e-6)
    pair = keras.Model(inputs := keras.Input((8,)), [layers.Dense(1)(inputs), layers.Dense(1)(inputs)])
    with pytest.raises(ValueError, match=r"must have one output.*\(40, 1\), \(40, 1\)"):
        predictions(pair, X)
    with pytest.raises(ValueError, match="`x` is empty"):
        predictions(model, X[:0])


def test_a_model_can_be_forgotten():
    model = subclassed()
    predictions(model, X)
    alive = weakref.ref(model)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert alive() is None


def state(model):
    return [weight.tobytes() for weight in model.get_weights()], [
        dict(vars(layer)) for layer in model._flatten_layers()
    ]


def received(model, x):
    return explain.attribute(model, x, verbose=0)


def by_gradient(model, x):
    return explain.attribute(model, x, "attention_gradient", target=0, verbose=0)


def test_the_model_stays_as_it_was():
    model = subclassed()
    model.predict(X, verbose=0)
    before = state(model)
    x = X.copy()
    attribution = received(model, x)
    explain.faithfulness(model, x, attribution, draws=2, verbose=0)
    attention_controls(model, x, draws=1, steps=2)
    randomised_parameters(model, x, attribution, received, draws=2)
    assert state(model) == before
    np.testing.assert_array_equal(x, X)


def test_uniform_attention_is_that_of_a_query_that_asks_nothing():
    model = attentive(sharpness=20)
    result = attention_controls(model, SEQUENCE, draws=2, steps=1)
    own = model.predict(SEQUENCE, verbose=0)
    attention = model.get_layer("attention")
    attention._query_dense.kernel.assign(0 * attention._query_dense.kernel)
    expected = np.abs(model.predict(SEQUENCE, verbose=0) - own)[:, 0] / own.std()
    np.testing.assert_allclose(result["change"].sel(control="uniform"), expected, rtol=1e-3, atol=1e-5)
    assert result.attrs["change"] == "relative to the standard deviation"
    assert result["median_change"].sel(control="uniform").item() == pytest.approx(np.median(expected), rel=1e-3)
    lower, upper = result["interval"].sel(control="uniform").values
    assert lower <= np.median(expected) <= upper


def test_uniform_keeps_to_the_keys_in_view():
    model = attentive(sharpness=3, use_causal_mask=True)
    own = model.predict(SEQUENCE, verbose=0)
    result = attention_controls(model, SEQUENCE, draws=1, steps=1)
    attention = model.get_layer("attention")
    attention._query_dense.kernel.assign(0 * attention._query_dense.kernel)
    expected = np.abs(model.predict(SEQUENCE, verbose=0) - own)[:, 0] / own.std()
    np.testing.assert_allclose(result["change"].sel(control="uniform"), expected, rtol=1e-3, atol=1e-5)


def test_changes_of_probabilities_are_total_variation():
    model = attentive(sharpness=20, activation="softmax", outputs=3)
    own = model.predict(SEQUENCE, verbose=0)
    whole = attention_controls(model, SEQUENCE, draws=1, steps=1)
    one = attention_controls(model, SEQUENCE, target=1, draws=1, steps=1)
    attention = model.get_layer("attention")
    attention._query_dense.kernel.assign(0 * attention._query_dense.kernel)
    difference = np.abs(model.predict(SEQUENCE, verbose=0) - own)
    uniform = {"control": "uniform"}
    np.testing.assert_allclose(whole["change"].sel(uniform), difference.sum(axis=1) / 2, atol=1e-5)
    np.testing.assert_allclose(one["change"].sel(uniform), difference[:, 1], atol=1e-5)
    assert whole.attrs["change"] == "total variation"


def looks_once(keys):
    """One query, one head, and an output from which its weights can be told if there are two keys."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((keys, 8))
    attended = layers.MultiHeadAttention(1, 8, name="attention")(inputs[:, :1], inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(attended)))


def test_the_adversary_finds_other_scores_where_there_are_any():
    determined = attention_controls(looks_once(2), SEQUENCE[:, :2], tolerance=0.01, steps=10)
    idle = looks_once(5)
    output = idle.get_layer("attention")._output_dense
    output.kernel.assign(1e-4 * output.kernel)
    pooled = layers.Dense(3)(layers.GlobalAveragePooling1D()(idle.input))
    idle = keras.Model(idle.input, idle.output + pooled)
    scores = explain.capture(idle, SEQUENCE, verbose=0)["attention"].values[:, 0, 0]
    idle = attention_controls(idle, SEQUENCE, steps=30)
    for result in (determined, idle):
        assert (result["change"].sel(control="adversarial") <= result.attrs["tolerance"]).all()
        assert ((result["jsd"] >= 0) & (result["jsd"] <= 1)).all()
    assert determined["jsd"].sel(control="adversarial").max() < 0.01
    farthest = jensenshannon(scores, np.eye(5)[scores.argmin(axis=1)], base=2, axis=1) ** 2  # all on the lightest key
    reached = idle["jsd"].sel(control="adversarial") / farthest
    assert 0.85 < reached.min() <= reached.max() < 1 + 1e-6  # it climbs one of several hills
    assert idle["median_change"].sel(control="uniform") < 0.01 < determined["median_change"].sel(control="uniform")


def test_the_adversary_finds_mixtures_that_give_the_same_number():
    """A sharp model is not safe from it: what one key says, two others say together."""
    inputs = keras.Input((5, 2))  # a number and a mark; attention is on the marked number, and the output is the number
    attended = layers.MultiHeadAttention(1, 2, name="attention", use_bias=False)(ops.ones_like(inputs[:, :1]), inputs)
    model = keras.Model(inputs, layers.Flatten()(attended)[:, :1])
    to_mark, to_number = np.array([[0, 0], [9, 9]]), np.array([[1, 0], [0, 0]])
    kernels = [np.ones((2, 2)), to_mark, to_number, np.eye(2)]
    shapes = [weight.shape for weight in model.get_weights()]
    model.set_weights([kernel.reshape(shape) for kernel, shape in zip(kernels, shapes, strict=True)])
    numbers = np.array([[0.0, -1, 1, -2, 2], [0.5, -1, 1, -2, 2], [3, -1, 1, -2, 2], [2, -1, 1, -2, 1.5]])
    x = np.stack([numbers, np.eye(5)[np.zeros(4, int)]], axis=-1).astype("float32")
    np.testing.assert_allclose(model.predict(x, verbose=0)[:, 0], numbers[:, 0], atol=1e-3)
    reached = attention_controls(model, x, steps=50)["jsd"].sel(control="adversarial").values
    assert (reached[:2] > 0.9).all()  # in reach of the others
    assert (reached[2:] < 0.2).all()  # the largest of all numbers


def test_more_steps_take_the_adversary_further():
    model = attentive(sharpness=2)
    few, many = (attention_controls(model, SEQUENCE, draws=1, steps=steps)["jsd"] for steps in (1, 20))
    adversarial = {"control": "adversarial"}
    assert (many.sel(adversarial) >= few.sel(adversarial) - 1e-6).all()
    assert many.sel(adversarial).median() > few.sel(adversarial).median() + 0.05


def test_permuted_weights_stay_in_view():
    scores = RNG.random((3, 2, 4, 6)).astype("float32")
    scores[:, :, :, 4:] = 0
    scores[0, 0, 0] = 0
    permuted = _permuted(scores, scores > 0, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(permuted), np.sort(scores))
    np.testing.assert_array_equal(permuted > 0, scores > 0)
    assert (permuted != scores)[scores > 0].mean() > 0.5


def test_the_distance_is_scipys():
    one, other = RNG.dirichlet(np.ones(6), (2, 3, 2, 4))
    one[..., -1], other[..., 0] = 0, 0
    one, other = (scores / scores.sum(axis=-1, keepdims=True) for scores in (one, other))
    expected = (jensenshannon(one, other, base=2, axis=-1) ** 2).mean(axis=(1, 2))
    np.testing.assert_allclose(_distance({"a": one}, {"a": other}), expected, atol=1e-6)
    blind = np.concatenate([one, 0 * one], axis=2), np.concatenate([other, 0 * other], axis=2)
    np.testing.assert_allclose(_distance({"a": blind[0]}, {"a": blind[1]}), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0}, "`tolerance` must be above 0"),
        ({"draws": 0}, "`draws` must be"),
        ({"target": 4}, "from 0 to 0"),
        ({"x": SEQUENCE[:1]}, "at least 2 samples"),
        ({"x": SEQUENCE * np.nan}, "NaN or infinite"),
        ({"layers": "atention"}, "Did you mean 'attention'"),
        ({"x": iter([SEQUENCE])}, "must be an array"),
    ],
)
def test_controls_refuse_what_they_cannot_test(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_controls(**({"model": attentive(), "x": SEQUENCE, "steps": 1} | arguments))


def test_an_attribution_without_the_learned_weights():
    model = subclassed()
    for weight in model.attention.weights:
        weight.assign(weight * 8)  # as if it had learned something
    attribution = received(model, X)
    result = randomised_parameters(model, X, attribution, received, draws=4)
    assert (result["distance"] > 0).all()
    assert result["interval"][0] < result["mean_distance"] < result["interval"][1]
    assert (result["sample_distance"] >= result["distance"] - 1e-9).all()
    gradient = randomised_parameters(model, X, by_gradient(model, X), by_gradient, draws=1)
    assert gradient["distance"] > 0
    assert np.isnan(gradient["interval"]).all()
    whole = randomised_parameters(model, X, attribution, received, weights="all", draws=2)
    assert not np.allclose(whole["distance"], result["distance"][:2])

    blind = randomised_parameters(model, X, np.abs(X), lambda model, x: np.abs(x), draws=2)
    np.testing.assert_array_equal(blind["distance"], 0)
    assert (blind["halves"] > 0).all()
    with pytest.raises(ValueError, match='"attention" or "all"'):
        randomised_parameters(model, X, attribution, received, weights="none")
    with pytest.raises(ValueError, match="of the shape of `attribution`"):
        randomised_parameters(model, X, attribution, lambda model, x: x[:, :2])


def test_models_that_agree_and_models_that_do_not():
    names = {"feature": list("abcdefgh")}
    truth = np.broadcast_to(np.arange(1.0, 9), (40, 8))
    alike = [xr.DataArray(truth * (1 + 0.01 * k), names, ("sample", "feature")) for k in range(3)]
    result = seed_agreement(alike)
    assert result["overlap"] == 1
    assert result["p_value"] < 0.05
    np.testing.assert_allclose(result["mean"], np.arange(1, 9) / 36)
    np.testing.assert_allclose(result["spread"], 0, atol=1e-12)
    assert result["mean"].sel(feature="h") == result["mean"].max()
    assert result["null"].mean().item() == pytest.approx(2 / 8, abs=0.05)  # two of eight are in a top of two by chance

    apart = seed_agreement([truth, truth[:, ::-1]])
    assert (apart["overlap"], apart["p_value"]) == (0, 1)
    assert seed_agreement([truth, truth], top_k=5).attrs["top_k"] == 5
    with pytest.raises(ValueError, match="at least 2 models"):
        seed_agreement([truth])
    with pytest.raises(ValueError, match="same samples and features"):
        seed_agreement([truth, truth[:, 1:]])
    with pytest.raises(ValueError, match="same samples and features"):
        seed_agreement([alike[0], alike[0].assign_coords(feature=list("hgfedcba"))])
    with pytest.raises(ValueError, match="smaller than the number of features"):
        seed_agreement([truth, truth], top_k=8)
