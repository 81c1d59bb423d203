"""In a `keras.RematScope` the layer does what Keras' own does, and its scores are still those of the latest call."""

import keras
import numpy as np
import pytest
from keras import ops

from kerasfactory import _backend
from kerasfactory.layers import InterpretableMultiHeadAttention

BACKEND = keras.config.backend()
SCOPES = {
    "full": {"mode": "full"},
    "activations": {"mode": "activations"},
    "larger_than, as it is": {"mode": "larger_than", "output_size_threshold": 10},
    "larger_than, as it is not": {"mode": "larger_than", "output_size_threshold": 10_000},
    "list_of_layers, with this": {"mode": "list_of_layers", "layer_names": ["attention"]},
    "list_of_layers, with a part": {"mode": "list_of_layers", "layer_names": ["mha", "query"]},
    "none": {"mode": None},
}
in_every_scope = pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((4, 6, 8), dtype="float32")


def ours(x, **arguments):
    return built(InterpretableMultiHeadAttention(4, 2, 0.0, name="attention", **arguments), x)


def keras_attention(x, **arguments):
    return built(keras.layers.MultiHeadAttention(2, 4, name="attention", **arguments), x)


def built(layer, x):
    """With the same weights whichever layer it is."""
    layer.build(x.shape, x.shape)
    rng = np.random.default_rng(1)
    layer.set_weights([rng.standard_normal(weight.shape) for weight in layer.get_weights()])
    return layer


def numbers(tensor):
    return ops.convert_to_numpy(tensor)


def assert_equal(one, other):
    np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-5, atol=1e-5)


@in_every_scope
def test_output_and_gradients_are_those_of_keras(x, scope):
    inputs = [ops.convert_to_tensor(x[:, :5]), ops.convert_to_tensor(2 * x), ops.convert_to_tensor(x[::-1].copy())]
    mask = ops.convert_to_tensor(np.random.default_rng(2).random((4, 5, 6)) < 0.7)

    with keras.RematScope(**scope):
        layer, other = ours(x), keras_attention(x)

        def loss(query_key_value):
            output = layer(*query_key_value, attention_mask=mask)
            return ops.sum(output**2), output

        def loss_of_keras(query_key_value):
            query, key, value = query_key_value
            output = other(query, value, key, attention_mask=mask)
            return ops.sum(output**2), output

        gradients, output = _backend.gradient(loss, inputs)
        expected_gradients, expected = _backend.gradient(loss_of_keras, inputs)

    assert_equal(output, expected)
    for gradient, of_keras in zip(gradients, expected_gradients, strict=True):
        assert np.abs(numbers(gradient)).max() > 0.1
        np.testing.assert_allclose(numbers(gradient), numbers(of_keras), rtol=1e-4, atol=1e-3)


@in_every_scope
def test_training_is_that_of_keras(x, scope):
    weights = []
    for make in (ours, keras_attention):
        with keras.RematScope(**scope):
            inputs = keras.Input(x.shape[1:])
            layer = make(x)
            model = keras.Model(inputs, layer(inputs, inputs))
            # In a graph of TensorFlow, Keras rematerializes nothing that takes keywords, as a model does.
            model.compile(keras.optimizers.SGD(1e-2), "mse", run_eagerly=BACKEND == "tensorflow")
            model.fit(x, x, epochs=2, shuffle=False, verbose=0)
            assert np.isfinite(model.predict(x, verbose=0)).all()
        weights.append(layer.get_weights())
    for weight, of_keras in zip(*weights, strict=True):
        assert_equal(weight, of_keras)


@in_every_scope
def test_scores_of_an_eager_call_are_its_own(x, scope):
    layer = ours(x)
    expected = [(numbers(layer(data)), numbers(layer.attention_scores)) for data in (x, 2 * x)]
    with keras.RematScope(**scope):
        layer = ours(x)
        for data, (output, scores) in zip((x, 2 * x), expected, strict=True):
            assert_equal(layer(data), output)
            assert_equal(layer.attention_scores, scores)


if BACKEND != "jax":  # which does not run, but trace, the calls whose gradients it computes

    @in_every_scope
    @pytest.mark.parametrize("axes", [None, (1, 2)])
    def test_the_calls_that_gradients_repeat_are_not_the_latest(x, scope, axes):
        x = np.stack([x, 2 * x], axis=1) if axes else x
        expected = ours(x, attention_axes=axes)
        expected(2 * x)
        with keras.RematScope(**scope):
            layer = ours(x, attention_axes=axes)
            _backend.gradient(lambda x: (ops.sum(layer(x)) + ops.sum(layer(2 * x)), ()), ops.convert_to_tensor(x))
        assert_equal(layer.attention_scores, expected.attention_scores)


@in_every_scope
def test_scores_of_a_trained_model_can_be_read(x, scope):
    with keras.RematScope(**scope):
        inputs = keras.Input(x.shape[1:])
        layer = ours(x)
        model = keras.Model(inputs, layer(inputs))
        model.compile("sgd", "mse", run_eagerly=BACKEND == "tensorflow")
        model.fit(x, x, verbose=0)
        model.predict(x, verbose=0)
        scores = layer.attention_scores
    if not ops.is_tensor(scores):  # a tensor is from the latest batch of a model that ran eagerly
        scores = keras.Model(inputs, scores).predict(x, verbose=0)
    np.testing.assert_allclose(numbers(scores).sum(-1), 1, atol=1e-5)


@in_every_scope
def test_masks_and_flags_count_as_elsewhere(scope):
    tokens = np.array([[1, 2, 3, 0, 0, 0], [4, 3, 2, 1, 1, 0]])
    embedding = keras.layers.Embedding(5, 8, mask_zero=True)
    x = embedding(tokens)
    layer = ours(x)
    expected = layer(x, use_causal_mask=True, return_attention_scores=True, training=True)
    with keras.RematScope(**scope):
        layer = ours(x)
        output, scores = layer(x, use_causal_mask=True, return_attention_scores=True, training=True)

    assert_equal(output, expected[0])
    assert_equal(scores, expected[1])
    assert_equal(layer.attention_scores, expected[1])
    assert np.abs(numbers(scores)[0, ..., 3:]).max() == 0
    assert _backend.get_keras_mask(x) is not None


if BACKEND == "jax":

    @in_every_scope
    def test_scores_can_be_read_in_a_function_that_jax_traces(x, scope):
        import jax

        expected = ours(x)
        expected(x)
        with keras.RematScope(**scope):
            layer = ours(x)

            def loss(x):
                output = layer(x)
                return ops.sum(output**2), layer.attention_scores

            for function in (jax.grad(loss, has_aux=True), jax.jit(loss)):
                assert_equal(function(x)[1], expected.attention_scores)
                with pytest.raises(RuntimeError, match="are not available"):
                    print(layer.attention_scores)


@in_every_scope
def test_scores_read_in_the_scope_know_the_masks(scope):
    tokens = np.array([[1, 2, 3, 0, 0], [4, 4, 1, 2, 3]])

    def graph():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5,), dtype="int32")
        layer = InterpretableMultiHeadAttention(4, 2, 0.0, name="attention")
        layer(keras.layers.Embedding(9, 8, mask_zero=True)(inputs))
        return inputs, layer.attention_scores

    with keras.RematScope(**scope):
        inputs, scores = graph()
    model, plain = keras.Model(inputs, scores), keras.Model(*graph())
    plain.set_weights(model.get_weights())
    assert_equal(model(tokens), plain(tokens))
    np.testing.assert_allclose(numbers(model(tokens))[0, :, 0, 3:], 0)
