"""`attention_controls`: a model that runs with other scores than its own, where it is known what that does."""

import functools

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers, ops
from scipy import stats
from scipy.spatial.distance import jensenshannon

from kerasfactory import _backend, explain
from kerasfactory.explain import _controls
from kerasfactory.explain._controls import _distance, _permuted, _share_tests

RNG = np.random.default_rng(3)
SEQUENCE = RNG.normal(size=(12, 5, 8)).astype("float32")
controls_of = functools.partial(explain.attention_controls, verbose=0)


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


def spread(outputs):
    """Their mean distance from the median; of normal numbers, it is their standard deviation."""
    return np.abs(outputs - np.median(outputs, axis=0)).mean(axis=0) / np.sqrt(2 / np.pi)


def test_uniform_attention_is_that_of_a_query_that_asks_nothing():
    model = attentive(sharpness=20)
    result = controls_of(model, SEQUENCE, draws=2, steps=1)
    own = model.predict(SEQUENCE, verbose=0)
    attention = model.get_layer("attention")
    attention._query_dense.kernel.assign(0 * attention._query_dense.kernel)
    expected = np.abs(model.predict(SEQUENCE, verbose=0) - own)[:, 0] / spread(own)
    np.testing.assert_allclose(result["change"].sel(control="uniform"), expected, rtol=1e-3, atol=1e-5)
    assert result.attrs["change"] == "relative to the spread of the output"
    uniform = result.sel(control="uniform")
    assert uniform["median_change"].item() == pytest.approx(np.median(expected), rel=1e-3)
    assert uniform["mean_change"].item() == pytest.approx(expected.mean(), rel=1e-3)
    assert uniform["share"].item() == (expected > 0.02).mean()


def test_uniform_keeps_to_the_keys_in_view():
    model = attentive(sharpness=3, use_causal_mask=True)
    own = model.predict(SEQUENCE, verbose=0)
    result = controls_of(model, SEQUENCE, draws=1, steps=1)
    attention = model.get_layer("attention")
    attention._query_dense.kernel.assign(0 * attention._query_dense.kernel)
    expected = np.abs(model.predict(SEQUENCE, verbose=0) - own)[:, 0] / spread(own)
    np.testing.assert_allclose(result["change"].sel(control="uniform"), expected, rtol=1e-3, atol=1e-5)


def without_attention(model):
    """What the model predicts if its queries ask nothing."""
    kernel = model.get_layer("attention")._query_dense.kernel
    before = ops.convert_to_numpy(kernel)
    kernel.assign(0 * before)
    outputs = model.predict(SEQUENCE, verbose=0)
    kernel.assign(before)
    return outputs


def test_changes_of_probabilities_are_those_of_their_logits():
    model = attentive(sharpness=20, activation="softmax", outputs=3)
    logits = keras.Model(model.inputs, layers.Dense(3)(model.layers[-1].input))
    logits.layers[-1].set_weights(model.layers[-1].get_weights())
    own, changed = (
        values - values.mean(axis=1, keepdims=True)
        for values in (logits.predict(SEQUENCE, verbose=0), without_attention(logits))
    )
    expected = np.abs(changed - own) / spread(own)
    model.compile(loss="sparse_categorical_crossentropy")
    logits.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for one in (model, logits):
        whole, of_class = (controls_of(one, SEQUENCE, target=target, draws=1, steps=1) for target in (None, 1))
        np.testing.assert_allclose(whole["change"].sel(control="uniform"), expected.max(axis=1), rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(of_class["change"].sel(control="uniform"), expected[:, 1], rtol=2e-3, atol=1e-4)
        assert whole.attrs["change"] == "relative to the spread of the logits"
        assert whole.attrs["task"] == "classification"


def test_a_shift_and_a_unit_change_nothing():
    model = attentive(sharpness=20)
    moved = keras.Model(model.inputs, model.outputs[0] * 0.01 + 1.5)
    one, other = (controls_of(each, SEQUENCE, draws=2, steps=3) for each in (model, moved))
    xr.testing.assert_allclose(one.drop_sel(control="adversarial"), other.drop_sel(control="adversarial"), rtol=2e-3)


def test_what_is_drawn_does_not_depend_on_the_batches():
    model = attentive(sharpness=2)
    one, other = (controls_of(model, SEQUENCE, draws=2, steps=3, batch_size=size) for size in (5, 12))
    xr.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def decides(read=lambda value: value, loss="mse"):
    """A model whose one query attends to the marked key, and whose output is made of that key's value."""
    inputs = keras.Input((5, 2))
    attended = layers.MultiHeadAttention(1, 2, name="attention", use_bias=False)(ops.ones_like(inputs[:, :1]), inputs)
    model = keras.Model(inputs, read(layers.Flatten()(attended)[:, 1:]))
    kernels = [np.ones((2, 2)), [[9, 9], [0, 0]], [[0, 0], [0, 1]], np.eye(2)]
    shapes = [weight.shape for weight in model.get_weights()]
    model.set_weights([np.reshape(kernel, shape) for kernel, shape in zip(kernels, shapes, strict=True)])
    model.compile(loss=loss)
    return model


def marked(values, rng):
    mark = np.eye(5)[rng.integers(5, size=len(values))]
    return np.stack([mark, values], axis=-1).astype("float32"), (mark * values).sum(axis=1)


def rows_of(kind, rng, samples=400):
    """Values of five keys. Those of the marked one are the output, and what others would give differs in some rows."""
    values = rng.normal(size=(samples, 5))
    if kind == "heavy tails":
        values = rng.standard_cauchy((samples, 5))
    if kind == "40% of rows":
        same = rng.random(samples) > 0.4
        values[same] = values[same][:, :1]
    if kind == "2% of rows":
        values[rng.random(samples) > 0.02] = 0
    if kind == "identical values":
        values = np.tile(values[:, :1], 5)
    return marked(values, rng)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("kind", "matters"),
    [("heavy tails", True), ("40% of rows", True), ("2% of rows", None), ("identical values", False)],
)
def test_attention_that_decides_is_found_wherever_it_does(kind, matters):
    model, rng = decides(), np.random.default_rng(0)
    for seed in range(5):
        x, y = rows_of(kind, rng)
        result = controls_of(model, x, y, draws=3, steps=1, seed=seed)
        both = result.sel(control=["uniform", "permuted"])
        if matters:
            assert (both["p_value"] < 0.001).all()
        elif matters is None:  # too few rows for the share, but what they change is much: this refutes nothing
            assert (both["mean_change"] > 0.2).all()
        else:
            assert (both["p_opposite"] < 0.001).all()
            assert (both["change"] < 1e-4).all()
            assert result["p_opposite_loss"] < 0.001
        assert (result["p_opposite_loss"] > 0.05) == (matters is not False)


@pytest.mark.backend_independent
def test_attention_that_decides_a_rare_class_is_found():
    model = decides(lambda value: ops.sigmoid(8 * (value - 2.3)), "binary_crossentropy")
    rng = np.random.default_rng(1)
    x, values = marked(rng.normal(size=(400, 5)), rng)
    y = (values > 2.3).astype(int)
    assert 0.005 < y.mean() < 0.02
    result = controls_of(model, x, y, draws=3, steps=1)
    assert (result.sel(control=["uniform", "permuted"])["p_value"] < 0.001).all()
    assert result["p_value_loss"] < 0.05
    assert result["mean_interval"][0] > 0


@pytest.mark.backend_independent
def test_the_loss_without_attention_is_that_of_other_weights():
    model = attentive(sharpness=20)
    model.compile(loss="mae")
    y = RNG.normal(size=12)
    result = controls_of(model, SEQUENCE, y, draws=1, steps=1)
    own, changed = (
        np.abs(outputs[:, 0] - y) for outputs in (model.predict(SEQUENCE, verbose=0), without_attention(model))
    )
    counts = result["change"].sel(control="uniform").values > 0.02  # a smaller change is none
    assert result["loss_increase"].item() == pytest.approx(((changed - own) * counts).mean(), abs=1e-5)
    assert result.attrs["loss_value"] == pytest.approx(own.mean(), abs=1e-5)
    assert result.attrs["loss"] == "mae"
    lower, upper = result["mean_interval"].values
    assert lower < result["loss_increase"] < upper
    assert result["p_opposite_loss"] >= 0.98**12  # 12 rows do not show what 2% of them do


@pytest.mark.backend_independent
def test_shares_have_the_interval_of_clopper_and_pearson():
    changes = np.array([np.r_[np.ones(30), np.zeros(170)], np.zeros(200), np.r_[np.ones(100), np.full(100, np.nan)]])
    one, groups = (_share_tests(changes, 0.5, clusters, 0.05) for clusters in (np.arange(200), np.arange(200) // 4))
    assert one["share"][1] == [0.15, 0, 1]
    for tests, sizes in ((one, [200, 200, 100]), (groups, [50, 50, 25])):
        for number, (share, size) in enumerate(zip([0.15, 0, 1], sizes, strict=True)):
            if (share * size) % 1:
                continue  # 7.5 of 50
            expected = stats.binomtest(int(share * size), size, 0.02, alternative="two-sided").proportion_ci(0.95)
            np.testing.assert_allclose(tests["interval"][1][number], [expected.low, expected.high], atol=1e-9)
            for name, side in (("p_value", "greater"), ("p_opposite", "less")):
                p_value = stats.binomtest(int(share * size), size, 0.02, alternative=side).pvalue
                assert tests[name][1][number] == pytest.approx(p_value, abs=1e-12)
    assert one["interval"][1][0][1] < groups["interval"][1][0][1]


@pytest.mark.backend_independent
def test_the_adversary_runs_on_some_of_the_samples(monkeypatch):
    monkeypatch.setattr(_controls, "_ADVERSARIAL_SAMPLES", 7)
    result = controls_of(attentive(), SEQUENCE, draws=1, steps=1, batch_size=4)
    ran = ~np.isnan(result["change"].values)
    assert ran.sum(axis=1).tolist() == [12, 12, 7]
    assert not np.isnan(result["median_change"]).any()
    np.testing.assert_array_equal(result["sample"], np.arange(12))


def looks_once(keys):
    """One query, one head, and an output from which its weights can be told if there are two keys."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((keys, 8))
    attended = layers.MultiHeadAttention(1, 8, name="attention")(inputs[:, :1], inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(attended)))


def test_the_adversary_finds_other_scores_where_there_are_any():
    determined = controls_of(looks_once(2), SEQUENCE[:, :2], tolerance=0.01, steps=10)
    idle = looks_once(5)
    output = idle.get_layer("attention")._output_dense
    output.kernel.assign(1e-4 * output.kernel)
    pooled = layers.Dense(3)(layers.GlobalAveragePooling1D()(idle.input))
    idle = keras.Model(idle.input, idle.output + pooled)
    scores = explain.capture(idle, SEQUENCE, verbose=0)["attention"].values[:, 0, 0]
    idle = controls_of(idle, SEQUENCE, steps=30)
    for result in (determined, idle):
        assert (result["change"].sel(control="adversarial") <= result.attrs["tolerance"]).all()
        assert ((result["jsd"] >= 0) & (result["jsd"] <= 1)).all()
    assert determined["jsd"].sel(control="adversarial").max() < 0.01
    farthest = jensenshannon(scores, np.eye(5)[scores.argmin(axis=1)], base=2, axis=1) ** 2  # all on the lightest key
    reached = idle["jsd"].sel(control="adversarial") / farthest
    assert reached.max() < 1 + 1e-6
    assert (reached > 0.85).sum() >= 11  # of 12: it climbs one of several hills, and not always the highest
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
    reached = controls_of(model, x, steps=50)["jsd"].sel(control="adversarial").values
    assert (reached[:2] > 0.9).all()  # in reach of the others
    assert (reached[2:] < 0.2).all()  # the largest of all numbers


def test_more_steps_take_the_adversary_further():
    model = attentive(sharpness=2)
    few, many = (controls_of(model, SEQUENCE, draws=1, steps=steps)["jsd"] for steps in (1, 20))
    adversarial = {"control": "adversarial"}
    assert (many.sel(adversarial) >= few.sel(adversarial) - 1e-6).all()
    assert many.sel(adversarial).median() > few.sel(adversarial).median() + 0.05


def test_the_adversarys_steps_are_compiled_once_for_all_batches(monkeypatch):
    traced, on_linear_scale = [], _controls.on_linear_scale

    def counted(found, values, rounding):
        if _backend.concrete(values) is None:
            traced.append(values)
        return on_linear_scale(found, values, rounding)

    monkeypatch.setattr(_controls, "on_linear_scale", counted)
    model = attentive(sharpness=2)
    compiled = controls_of(model, SEQUENCE, draws=1, steps=3, batch_size=5)  # 5, 5 and 2 samples
    assert len(traced) == {"tensorflow": 1, "jax": 2}.get(keras.config.backend(), 0)  # `jax.jit` is for one size
    model.compile(run_eagerly=True)
    eager = controls_of(model, SEQUENCE, draws=1, steps=3, batch_size=5)
    xr.testing.assert_allclose(compiled, eager, rtol=1e-3, atol=1e-5)


def test_permuted_weights_stay_in_view():
    scores = RNG.random((3, 2, 4, 6)).astype("float32")
    scores[:, :, :, 4:] = 0
    scores[0, 0, 0] = 0
    permuted = _permuted(scores, scores > 0, np.random.default_rng(0).spawn(3))
    np.testing.assert_array_equal(np.sort(permuted), np.sort(scores))
    np.testing.assert_array_equal(permuted > 0, scores > 0)
    assert (permuted != scores)[scores > 0].mean() > 0.5


@pytest.mark.backend_independent
def test_the_distance_is_scipys():
    one, other = RNG.dirichlet(np.ones(6), (2, 3, 2, 4))
    one[..., -1], other[..., 0] = 0, 0
    one, other = (scores / scores.sum(axis=-1, keepdims=True) for scores in (one, other))
    expected = (jensenshannon(one, other, base=2, axis=-1) ** 2).mean(axis=(1, 2))
    np.testing.assert_allclose(_distance({"a": one}, {"a": other}), expected, atol=1e-6)
    blind = np.concatenate([one, 0 * one], axis=2), np.concatenate([other, 0 * other], axis=2)
    np.testing.assert_allclose(_distance({"a": blind[0]}, {"a": blind[1]}), expected, atol=1e-6)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0}, "`tolerance` must be above 0"),
        ({"draws": 0}, "`draws` must be"),
        ({"target": 4}, "from 0 to 0"),
        ({"task": "classify"}, "`task` must be one of 'classification'"),
        ({"y": np.zeros(12)}, "The model has no loss"),
        ({"y": np.zeros(5)}, "one label for each of the 12 samples"),
        ({"groups": np.zeros(5)}, "one label for each of the 12 samples"),
        ({"groups": np.zeros(12), "block": 2}, "Leave one of them out"),
        ({"x": 0 * SEQUENCE}, "the same for all samples"),
        ({"x": SEQUENCE[:1]}, "at least 2 samples"),
        ({"x": SEQUENCE * np.nan}, "NaN or infinite"),
        ({"layers": "atention"}, "Did you mean 'attention'"),
        ({"x": iter([SEQUENCE])}, "must be an array"),
    ],
)
def test_controls_refuse_what_they_cannot_test(arguments, message):
    with pytest.raises(ValueError, match=message):
        controls_of(**({"model": attentive(), "x": SEQUENCE, "steps": 1} | arguments))
