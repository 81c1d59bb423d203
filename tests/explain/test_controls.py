"""`attention_controls`: a model that runs with other scores than its own, where it is known what that does."""

import functools

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers, ops
from scipy.spatial.distance import jensenshannon

from kerasfactory import _backend, explain
from kerasfactory.explain import _controls
from kerasfactory.explain._controls import _distance, _permuted

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


def test_uniform_attention_is_that_of_a_query_that_asks_nothing():
    model = attentive(sharpness=20)
    result = controls_of(model, SEQUENCE, draws=2, steps=1)
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
    result = controls_of(model, SEQUENCE, draws=1, steps=1)
    attention = model.get_layer("attention")
    attention._query_dense.kernel.assign(0 * attention._query_dense.kernel)
    expected = np.abs(model.predict(SEQUENCE, verbose=0) - own)[:, 0] / own.std()
    np.testing.assert_allclose(result["change"].sel(control="uniform"), expected, rtol=1e-3, atol=1e-5)


def test_changes_of_probabilities_are_total_variation():
    model = attentive(sharpness=20, activation="softmax", outputs=3)
    own = model.predict(SEQUENCE, verbose=0)
    whole = controls_of(model, SEQUENCE, draws=1, steps=1)
    one = controls_of(model, SEQUENCE, target=1, draws=1, steps=1)
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
    traced, output_change = [], _controls.output_change

    def counted(*args):
        change, unit = output_change(*args)

        def count(one, other):
            if _backend.concrete(one) is None:
                traced.append(one)
            return change(one, other)

        return count, unit

    monkeypatch.setattr(_controls, "output_change", counted)
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
    permuted = _permuted(scores, scores > 0, np.random.default_rng(0))
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
        ({"x": SEQUENCE[:1]}, "at least 2 samples"),
        ({"x": SEQUENCE * np.nan}, "NaN or infinite"),
        ({"layers": "atention"}, "Did you mean 'attention'"),
        ({"x": iter([SEQUENCE])}, "must be an array"),
    ],
)
def test_controls_refuse_what_they_cannot_test(arguments, message):
    with pytest.raises(ValueError, match=message):
        controls_of(**({"model": attentive(), "x": SEQUENCE, "steps": 1} | arguments))
