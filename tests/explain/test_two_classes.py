"""Two classes with one output are what they are with two: the same network as a sigmoid and as a softmax."""

import keras
import numpy as np
import pytest
from keras import layers

from kerasfactory import explain

X = np.random.default_rng(0).normal(size=(120, 6, 4)).astype("float32")
WEIGHTS = np.array([3, -3, 2, 0, 0, 0])


def model_of(last, loss, task=None):
    """Whose logit for the second class is z; that for the first, if there are two, is 0."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 4))
    tokens = inputs + layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    model = keras.Model(inputs, last(layers.Flatten()(tokens)))
    model.compile(loss=loss)
    kernel = np.zeros((24, model.layers[-1].units))
    kernel[:, -1] = np.repeat(WEIGHTS, 4) * np.tile([1.0, -0.5, 0.5, 0.2], 6)
    model.layers[-1].set_weights([kernel, np.zeros(kernel.shape[1])])
    return model


def sigmoid():
    return model_of(layers.Dense(1, "sigmoid"), "binary_crossentropy")


def softmax():
    return model_of(layers.Dense(2, "softmax"), "sparse_categorical_crossentropy")


def logit():
    return model_of(layers.Dense(1), keras.losses.BinaryCrossentropy(from_logits=True))


@pytest.mark.parametrize("method", ["integrated_gradients", "attention_gradient"])
def test_one_output_is_attributed_as_two(method):
    one, two = (explain.attribute(model, X, method=method, verbose=0) for model in (sigmoid(), softmax()))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    second = sigmoid().predict(X, verbose=0)[:, 0] > 0.5
    assert 20 < second.sum() < 100
    of_second = explain.attribute(sigmoid(), X, method=method, target=0, verbose=0)
    np.testing.assert_allclose(one[second], of_second[second], rtol=1e-4, atol=1e-5)
    if method == "integrated_gradients":
        np.testing.assert_allclose(one[~second], -of_second[~second], rtol=1e-4, atol=1e-5)


def test_one_output_is_tested_as_two():
    attribution = explain.attribute(softmax(), X, method="integrated_gradients", verbose=0)
    one, two = (explain.faithfulness(model, X, attribution, verbose=0) for model in (sigmoid(), softmax()))
    for name in ("comprehensiveness", "sufficiency"):
        np.testing.assert_allclose(one[name], two[name], atol=1e-5)
    assert one["p_value"] == two["p_value"]
    assert one["p_value"] < 0.02
    assert one.attrs["target"] == two.attrs["target"] == "predicted class"
    assert one.attrs["change"] == two.attrs["change"] == "signed"


def test_a_logit_below_0_predicts_the_first_class():
    model = logit()
    first = model.predict(X, verbose=0)[:, 0] < 0
    attribution = explain.attribute(model, X, method="integrated_gradients", verbose=0)
    of_output = explain.attribute(model, X, method="integrated_gradients", target=0, verbose=0)
    np.testing.assert_allclose(attribution, np.where(first[:, None], -of_output, of_output), rtol=1e-4, atol=1e-5)
    assert explain.faithfulness(model, X, attribution, verbose=0)["p_value"] < 0.02


def test_signs_are_directions_where_changes_have_none():
    model = model_of(layers.Dense(1), "mse")
    signed = explain.attribute(model, X, method="integrated_gradients", verbose=0)
    assert (signed < 0).any()
    for given in (sigmoid, logit):
        of_output = explain.attribute(given(), X, method="integrated_gradients", target=0, verbose=0)
        found, size = (explain.faithfulness(given(), X, of, target=0, verbose=0) for of in (of_output, abs(of_output)))
        assert found.attrs["change"] == "absolute"
        assert found["p_value"] == size["p_value"]
    found, size = (explain.faithfulness(model, X, of, verbose=0) for of in (signed, abs(signed)))
    np.testing.assert_array_equal(found["comprehensiveness"], size["comprehensiveness"])
    assert found["p_value"] < 0.02
    low = explain.faithfulness(model, X, -abs(signed), verbose=0)  # one sign alone is an order
    assert low["p_value"] > 0.5


def test_an_output_of_which_nothing_is_known_is_taken_as_it_is():
    class Unknown(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = sigmoid()

        def call(self, x):
            return self.inner(x)

    found, of_output = (
        explain.attribute(Unknown(), X, method="integrated_gradients", task="classification", target=target, verbose=0)
        for target in (None, 0)
    )
    np.testing.assert_array_equal(found, of_output)
    tested = explain.faithfulness(Unknown(), X, found, task="classification", verbose=0)
    assert tested.attrs["change"] == "absolute"


def test_claims_take_the_size_of_a_signed_attribution():
    x = np.random.default_rng(1).normal(size=(300, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model.compile(loss="mse")
    model.set_weights([np.array([[2.0], [-2.0], [0], [0]]), np.zeros(1)])
    y = x @ [2, -2, 0, 0] + np.random.default_rng(2).normal(size=300)
    shares = x * [2, -2, 0.1, 0]
    claims = explain.feature_claims(model, x, y, shares, draws=20, verbose=0)
    np.testing.assert_allclose(claims["attribution"], np.abs(shares).mean(axis=0), rtol=1e-6)
    assert claims["claimed"].values.tolist() == [True, True, False, False]
    assert claims["verdict"].values[:2].tolist() == ["supported", "supported"]
