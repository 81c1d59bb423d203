"""Integrated gradients of a model's tokens, against closed forms."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from kerasfactory import explain
from kerasfactory.explain._engine.tokens import TokenScaler, integral
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

RNG = np.random.default_rng(4)
TABLE = RNG.normal(size=(9, 5)).astype("float32")
SEQUENCE = RNG.normal(size=(9, 5, 8)).astype("float32")
WORDS = RNG.integers(1, 20, (9, 5))
WORDS[:5, 3:] = 0
METHOD = {"method": "integrated_gradients", "task": "classification", "verbose": 0}


def randomized(model):
    for variable in model.trainable_variables:  # biases are not to be 0
        variable.assign(np.random.default_rng(2).normal(scale=0.5, size=variable.shape))
    return model


def uniform_attention(attention):
    """Queries of 0 attend alike to all keys in view: the layer is linear in its values."""
    weights = attention.get_weights()
    attention.set_weights([weights[0] * 0, weights[1] * 0, *weights[2:]])


def transformed(attention, tokens):
    """What each token adds to the output of attention with a weight of 1."""
    value, output = (ops.convert_to_numpy(dense.kernel) for dense in (attention._value_dense, attention._output_dense))
    return np.einsum("skf,fhd,hdo->sko", tokens, value, output)


class Positions(layers.Layer):
    """Adds an embedding of positions, which is the same in all samples."""

    def __init__(self, length, size):
        super().__init__()
        self.length, self.embedding = length, layers.Embedding(length, size)

    def call(self, tokens):
        return tokens + self.embedding(ops.arange(self.length))


KINDS = {
    "table": (TABLE, lambda: (FeatureTokenizer(8), keras.Input((5,)))),
    "words": (WORDS, lambda: (layers.Embedding(20, 8), keras.Input((5,), dtype="int32"))),
    "sequence": (SEQUENCE, lambda: (layers.Identity(), keras.Input((5, 8)))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_linear_model_they_are_token_times_coefficient(kind):
    data, make = KINDS[kind]
    entrance, inputs = make()
    tokens = entrance(inputs)
    placed = Positions(5, 8)(tokens)
    attended = layers.Add()([placed, layers.MultiHeadAttention(2, 4, name="attention")(placed, placed)])
    pooled = layers.GlobalAveragePooling1D()(attended)
    model = randomized(keras.Model(inputs, layers.Dense(2, name="output")(pooled)))
    attention, (kernel, _) = model.get_layer("attention"), model.get_layer("output").get_weights()
    uniform_attention(attention)

    result = explain.attribute(model, data, target=1, batch_size=4, **METHOD)
    values = keras.Model(inputs, tokens).predict(data, verbose=0)
    expected = ((values + transformed(attention, values)) / 5) @ kernel[:, 1]
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-5)
    assert (result < 0).any()
    assert result.attrs["completeness_error"] < 1e-5
    assert result.attrs["query"] == "any"
    # The positions stay: without tokens the model says what they say.
    change = model.predict(data, verbose=0)[:, 1] - result.sum("feature").values
    np.testing.assert_allclose(change, change[0], rtol=1e-3)


@pytest.mark.parametrize("drops_the_mask", [False, True])
def test_padding_gets_nothing_also_where_its_mask_is_lost(drops_the_mask):
    inputs = keras.Input((5,), dtype="int32")
    embedding = layers.Embedding(20, 8, mask_zero=True)
    tokens = embedding(inputs)
    attention = layers.MultiHeadAttention(2, 4, name="attention")
    attended = attention(tokens, tokens)
    both = tokens + attended if drops_the_mask else layers.Add()([tokens, attended])
    model = randomized(keras.Model(inputs, layers.Dense(1, name="output")(layers.GlobalAveragePooling1D()(both))))
    uniform_attention(attention)
    result = explain.attribute(model, WORDS, **METHOD)

    kernel = model.get_layer("output").get_weights()[0][:, 0]
    values, in_view = embedding.get_weights()[0][WORDS], WORDS != 0
    number = in_view.sum(axis=1, keepdims=True)
    added = transformed(attention, values) @ kernel
    if drops_the_mask:  # padded queries take the mean of all keys, and are pooled
        expected = (values @ kernel + added + (5 - number) * added / 5) / 5
    else:
        expected = (values @ kernel + added) / number
    np.testing.assert_allclose(result, np.where(in_view, expected, 0), rtol=1e-3, atol=1e-5)
    assert result.attrs["completeness_error"] < 1e-5


class ClassToken(layers.Layer):
    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="normal")

    def call(self, tokens):
        return ops.concatenate([ops.repeat(self.token, ops.shape(tokens)[0], axis=0), tokens], axis=1)


def test_what_padding_would_get_does_not_ask_for_more_nodes():
    in_view, calls = np.array([[True, True, False]]), []

    def gradient(batch, scale, weights):
        calls.append(scale)
        return ops.ones_like(scale)

    scaler = TokenScaler(lambda batch, scale: ops.sum(ops.convert_to_tensor(scale), axis=1), gradient)
    found = integral(scaler, (), in_view, ops.sum)
    np.testing.assert_allclose(found.values, [[1, 1, 0]], rtol=1e-6)
    assert len(calls) == 32


def test_a_class_token_is_no_feature():
    inputs = keras.Input((5,))
    tokens = ClassToken()(FeatureTokenizer(8)(inputs))
    attended = layers.MultiHeadAttention(2, 4, name="attention")(tokens, tokens)
    model = randomized(keras.Model(inputs, layers.Dense(1)(attended[:, 0])))
    result = explain.attribute(model, TABLE, feature_names=["class", *"abcde"], **METHOD)
    assert (result.sel(feature="class") == 0).all()
    assert (np.abs(result).max("sample")[1:] > 0.01).all()
    assert result.attrs["completeness_error"] < 0.01
    # The change from no tokens is that of the model that starts at them.
    of_tokens = keras.Model(model.layers[1].output, model.outputs)
    values = keras.Model(inputs, model.layers[1].output).predict(TABLE, verbose=0)
    change = of_tokens.predict(values, verbose=0) - of_tokens.predict(values * 0, verbose=0)
    np.testing.assert_allclose(result.sum("feature"), change[:, 0], rtol=1e-3, atol=1e-4)


def test_embeddings_that_are_added_count_together_and_those_of_other_sequences_do_not():
    # What is asked is of the same length, by chance.
    inputs = {name: keras.Input((5,), dtype="int32", name=name) for name in ("words", "segments", "asked")}
    words, segments = layers.Embedding(20, 8), layers.Embedding(2, 8)
    tokens = words(inputs["words"]) + segments(inputs["segments"])
    queries = words(inputs["asked"])  # with the same layer
    attention = layers.MultiHeadAttention(2, 4, name="attention")
    pooled = layers.GlobalAveragePooling1D()(layers.Add()([queries, attention(queries, tokens)]))
    model = randomized(keras.Model(inputs, layers.Dense(1, name="output")(pooled)))
    uniform_attention(attention)
    data = {"words": WORDS, "segments": RNG.integers(2, size=(9, 5)), "asked": RNG.integers(20, size=(9, 5))}
    result = explain.attribute(model, data, **METHOD)
    values = words.get_weights()[0][WORDS] + segments.get_weights()[0][data["segments"]]
    kernel = model.get_layer("output").get_weights()[0][:, 0]
    np.testing.assert_allclose(result, transformed(attention, values) @ kernel / 5, rtol=1e-3, atol=1e-5)


def test_the_predicted_class_is_that_of_the_sample_all_along_the_path():
    inputs = keras.Input((5, 8))
    attended = InterpretableMultiHeadAttention(4, 2)(inputs)
    pooled = layers.GlobalAveragePooling1D()(attended)
    model = randomized(keras.Model(inputs, layers.Dense(3, activation="softmax")(pooled)))
    data = 3 * SEQUENCE
    classes, at_the_start = (model.predict(x, verbose=0).argmax(axis=1) for x in (data, 0 * data))
    assert (classes != at_the_start).any()
    result = explain.attribute(model, data, **METHOD)
    for target in set(classes):
        of_one = explain.attribute(model, data, target=int(target), **METHOD)
        np.testing.assert_allclose(result[classes == target], of_one[classes == target], atol=1e-5)


class Labels(keras.Model):
    """Predicts labels, as some models do that go into production."""

    def predict_step(self, *args):
        outputs = super().predict_step(*args)
        if keras.config.backend() == "jax":
            return ops.argmax(outputs[0], axis=-1), outputs[1]
        return ops.argmax(outputs, axis=-1)


def rounded(model):
    return keras.Model(model.inputs, ops.round(10 * model.outputs[0]) / 10)


def labeled(model):
    return Labels(model.inputs, model.outputs)


@pytest.mark.parametrize("method", ["integrated_gradients", "attention_gradient"])
@pytest.mark.parametrize("without_gradient", [rounded, labeled])
def test_where_no_gradient_arrives_it_says_so_and_the_advice_works(without_gradient, method):
    inputs = keras.Input((5, 8))
    attended = layers.Flatten()(InterpretableMultiHeadAttention(4, 2)(inputs))
    model = randomized(keras.Model(inputs, layers.Dense(3, name="classes")(attended)))
    with pytest.warns(
        UserWarning,
        match=r"The gradient is 0 .*rounded output or a label.*Explain a model that",
    ):
        result = explain.attribute(without_gradient(model), SEQUENCE, method=method, task="classification", verbose=0)
    assert (result == 0).all()
    right = explain.attribute(model, SEQUENCE, method=method, target=0, verbose=0)
    silent = without_gradient(model)
    if without_gradient is labeled:
        mended = keras.Model(silent.inputs, silent.outputs)
    else:
        mended = keras.Model(silent.inputs, silent.get_layer("classes").output)
    np.testing.assert_allclose(explain.attribute(mended, SEQUENCE, method=method, target=0, verbose=0), right)


def test_without_tokens_it_says_where_to_start_and_the_advice_works():
    inputs = keras.Input((10,))
    tokens = layers.Dense(8, name="tokens")(layers.Reshape((5, 2))(inputs))
    attended = layers.MultiHeadAttention(2, 4, name="attention")(tokens, tokens)
    model = randomized(keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(attended))))
    x = RNG.normal(size=(9, 10)).astype("float32")
    with pytest.raises(ValueError, match=r"becomes one of the 5 keys\. Explain the part behind its tokens"):
        explain.attribute(model, x, **METHOD)
    tokens = model.get_layer("tokens").output
    behind = keras.Model(tokens, model.outputs)
    result = explain.attribute(behind, keras.Model(model.inputs, tokens).predict(x, verbose=0), **METHOD)
    assert result.attrs["completeness_error"] < 0.01
    assert (result != 0).all()


def test_an_integral_that_misses_the_change_is_warned_of():
    inputs = keras.Input((5, 8))
    pooled = layers.GlobalAveragePooling1D()(layers.MultiHeadAttention(2, 4)(inputs, inputs))
    steps = ops.round(4 * pooled) + 0.1 * pooled  # most of the output passes no gradient on
    model = randomized(keras.Model(inputs, layers.Dense(1)(steps)))
    with pytest.warns(UserWarning, match=r"miss it by up to.*Compare with another method"):
        assert explain.attribute(model, SEQUENCE, **METHOD).attrs["completeness_error"] > 0.05
