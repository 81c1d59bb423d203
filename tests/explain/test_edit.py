"""A model run with other scores than its own."""

import contextlib
import operator
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from kerasfactory import explain
from kerasfactory.explain._engine.edit import editor
from kerasfactory.layers import InterpretableMultiHeadAttention

X = np.random.default_rng(0).normal(size=(3, 5, 8)).astype("float32")


def batch(x=X):
    return (ops.convert_to_tensor(x),)


def two_layers(attention):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    once = attention("first")
    x = once(once(inputs, inputs), inputs)
    x = attention("second")(x, x)
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))


ATTENTIONS = {
    "keras": lambda name: layers.MultiHeadAttention(2, 4, name=name),
    "ours": lambda name: InterpretableMultiHeadAttention(4, 2, name=name),
    "grouped": lambda name: layers.GroupQueryAttention(4, 4, 2, name=name),
}


def scaled_heads(name, scores, given):
    return scores * given[name][None, :, None, None]


def replaced(name, scores, given):
    return given[name]


def added(name, scores, given):
    return scores + given[name]


def second_output(model, outputs, more):
    return ops.sum(outputs[:, 1])


def numbers(tensor):
    return ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_head_without_scores_is_a_head_without_output_kernel(kind):
    model = two_layers(ATTENTIONS[kind])
    edit = editor(model, batch(), None)
    assert set(edit.shapes) == {"first#1", "first#2", "second"}
    masks = {name: np.ones(shape[0], "float32") for name, shape in edit.shapes.items()}
    np.testing.assert_allclose(
        numbers(edit.predict(batch(), scaled_heads, masks)), model.predict(X, verbose=0), atol=1e-6
    )

    masks["second"][1] = 0
    ablated = numbers(edit.predict(batch(), scaled_heads, masks))
    attention = edit.found["second"].layer
    kernel = numbers(attention._output_dense.kernel).copy()
    kernel[1] = 0
    attention._output_dense.kernel.assign(kernel)
    np.testing.assert_allclose(ablated, model.predict(X, verbose=0), atol=1e-6)


def test_scores_of_another_run_make_its_output():
    model = two_layers(ATTENTIONS["keras"])
    edit = editor(model, batch(), None)
    own = {name: scores.values for name, scores in explain.capture(model, X, verbose=0).items()}
    np.testing.assert_allclose(numbers(edit.predict(batch(), replaced, own)), model.predict(X, verbose=0), atol=1e-6)
    uniform = {name: np.full_like(scores, 1 / 5) for name, scores in own.items()}
    assert np.abs(numbers(edit.predict(batch(), replaced, uniform)) - model.predict(X, verbose=0)).max() > 1e-3


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_gradients_are_finite_differences(kind):
    model = two_layers(ATTENTIONS[kind])
    edit = editor(model, batch(), None)
    deltas = {name: np.zeros((3, *shape), "float32") for name, shape in edit.shapes.items()}
    gradients, outputs, scores = edit.gradient(batch(), added, deltas, (second_output,))
    np.testing.assert_allclose(numbers(outputs), model.predict(X, verbose=0), atol=1e-6)
    for name, captured in explain.capture(model, X, verbose=0).items():
        np.testing.assert_allclose(numbers(scores[name]), captured, atol=1e-6)
        for where in [(0, 0, 1, 2), (2, 1, 4, 0)]:
            step = 0.05
            ends = []
            for sign in (1, -1):
                deltas[name][where] = sign * step
                ends.append(numbers(edit.predict(batch(), added, deltas))[:, 1].sum())
            deltas[name][where] = 0
            np.testing.assert_allclose(
                numbers(gradients[name])[where], (ends[0] - ends[1]) / (2 * step), rtol=0.05, atol=1e-4
            )


def test_only_the_named_layers_are_edited_and_the_model_stays_as_it_was():
    model = two_layers(ATTENTIONS["ours"])
    model(X)
    before = [dict(vars(layer)) for layer in model._flatten_layers()]
    edit = editor(model, batch(), "second")
    assert set(edit.shapes) == {"second"}
    edit.gradient(batch(), scaled_heads, {"second": np.ones(2, "float32")}, (second_output,))
    edit.predict(batch(), scaled_heads, {"second": np.zeros(2, "float32")})
    assert [dict(vars(layer)) for layer in model._flatten_layers()] == before


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_gradients_are_compiled_once_for_all_sizes_of_batches_and_what_else_changes(run_eagerly):
    model = two_layers(ATTENTIONS["keras"])
    model.compile(run_eagerly=run_eagerly)
    edit = editor(model, batch(), None)
    runs = []

    def weighted(model, outputs, more):
        runs.append(outputs)
        return ops.sum(more["weights"] * outputs[:, 1])

    for size in (3, 2, 3, 1, 2):
        weights = np.arange(1.0, size + 1, dtype="float32")
        deltas = {name: np.zeros((size, *shape), "float32") for name, shape in edit.shapes.items()}
        gradients, outputs, _ = edit.gradient(batch(X[:size]), added, deltas, (weighted,), {"weights": weights})
        plain, _, _ = edit.gradient(batch(X[:size]), added, deltas, (second_output,), once=True)
        for name in edit.shapes:
            expected = weights[:, None, None, None] * numbers(plain[name])
            np.testing.assert_allclose(numbers(gradients[name]), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(numbers(outputs), model.predict(X[:size], verbose=0), atol=1e-6)
    compiled = {"tensorflow": 1, "jax": 3}.get(keras.config.backend(), 5)  # `jax.jit` is for one size
    assert len(runs) == (5 if run_eagerly else compiled)


def test_what_cannot_be_compiled_runs_as_it_is():
    model = two_layers(ATTENTIONS["keras"])
    edit = editor(model, batch(), None)
    deltas = {name: np.zeros((3, *shape), "float32") for name, shape in edit.shapes.items()}

    def by_values(model, outputs, more):
        with warnings.catch_warnings():  # of NumPy to Keras
            warnings.simplefilter("ignore", DeprecationWarning)
            return ops.sum(outputs[:, int(numbers(more)[0])])

    compiles = keras.config.backend() != "torch"
    for warns in (compiles, False):  # once
        with pytest.warns(UserWarning, match="eagerly.*The cause was") if warns else contextlib.nullcontext():
            gradients, _, _ = edit.gradient(batch(), added, deltas, (by_values,), np.array([1, 0]))
        expected, _, _ = edit.gradient(batch(), added, deltas, (second_output,))
        for name in edit.shapes:
            np.testing.assert_allclose(numbers(gradients[name]), numbers(expected[name]), rtol=1e-4, atol=1e-6)


WORDS = np.random.default_rng(1).integers(1, 20, (12, 6))
WORDS[:, 4:] = 0


def leaking(kind, add=operator.add):
    """Padded queries attend to no key, and `+` drops their mask: what Keras gives them reaches the pooling."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), dtype="int32")
    tokens = layers.Embedding(20, 8, mask_zero=True)(inputs)
    pooled = layers.GlobalAveragePooling1D()(add(tokens, ATTENTIONS[kind]("attention")(tokens, tokens)))
    model = keras.Model(inputs, layers.Dense(1, name="output")(pooled))
    for variable in model.trainable_variables:  # biases are not to be 0
        variable.assign(np.random.default_rng(2).normal(scale=0.5, size=variable.shape))
    model.compile(loss="mse")
    return model


@pytest.mark.filterwarnings("ignore:Layer '[a-z]*' .of type EinsumDense")  # of Keras' grouped layer
@pytest.mark.parametrize("kind", ["keras", "grouped"])
def test_queries_without_a_key_keep_what_keras_gives_them(kind):
    model = leaking(kind)
    assert (explain.capture(model, WORDS, verbose=0)["attention"][:, :, 4:] == 0).all()
    intact = model.predict(WORDS, verbose=0)[:, 0]

    # A gradient by the scores, from the weights: the model is linear in them.
    attention, (kernel, _) = model.get_layer("attention"), model.get_layer("output").get_weights()
    tokens = model.layers[1].get_weights()[0][WORDS]
    value, bias = (numbers(weight) for weight in (attention._value_dense.kernel, attention._value_dense.bias))
    value = np.einsum("skf,fhd->shkd", tokens, value) + bias[:, None]
    value = np.repeat(value, 4 // value.shape[1], axis=1) if kind == "grouped" else value
    slopes = np.einsum("shkd,hdo,op->shk", value, numbers(attention._output_dense.kernel), kernel) / 6
    scores = explain.capture(model, WORDS, verbose=0)["attention"].values
    expected = np.maximum(scores * slopes[:, :, None], 0).mean(1)[:, :4].mean(1)
    relevance = explain.attribute(model, WORDS, method="attention_gradient", verbose=0)
    np.testing.assert_allclose(relevance, expected, rtol=1e-4, atol=1e-6)
    assert (relevance[:, 4:] == 0).all()
    assert (relevance[:, :4] > 0).any()

    # Queries that are 0 attend alike to all keys in view.
    controls = explain.attention_controls(model, WORDS, steps=1, draws=1, verbose=0)
    weights = attention.get_weights()
    attention.set_weights([weights[0] * 0, weights[1] * 0, *weights[2:]])
    uniform = model.predict(WORDS, verbose=0)[:, 0]
    change = np.abs(uniform - intact) / (np.sqrt(np.pi / 2) * np.abs(intact - np.median(intact)).mean())
    np.testing.assert_allclose(controls["change"].sel(control="uniform"), change, rtol=1e-3, atol=1e-5)
    assert change.max() > 0.05
    attention.set_weights(weights)

    importance = explain.head_importance(model, WORDS, np.zeros(12), verbose=0)["attention"]
    for head in importance["head"].values:
        without = [weight.copy() for weight in weights]
        without[-2][head] = 0
        attention.set_weights(without)
        rise = (model.predict(WORDS, verbose=0) ** 2).mean() - (intact**2).mean()
        np.testing.assert_allclose(importance["ablation"][head], rise, rtol=1e-3, atol=1e-5)
    assert np.abs(importance["ablation"]).max() > 1e-3


@pytest.mark.skipif(keras.config.backend() != "torch", reason="rounding of PyTorch's fused kernel")
def test_in_half_precision_queries_without_a_key_are_refused_and_the_advice_works():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = leaking("keras")
        mended = leaking("keras", add=lambda tokens, attended: layers.Add()([tokens, attended]))
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(ValueError, match=r"padding in half precision.*`keras.layers.Add\(\)\(\[tokens, attended\]\)`"):
        editor(model, batch(WORDS), None)
    edit = editor(mended, batch(WORDS), None)
    outputs = edit.predict(batch(WORDS), lambda name, scores, given: scores, {})
    np.testing.assert_allclose(numbers(outputs), mended.predict(WORDS, verbose=0), rtol=2e-2, atol=1e-2)


class Twisted(layers.MultiHeadAttention):
    def _compute_attention(self, *args, **kwargs):
        output, scores = super()._compute_attention(*args[:5], return_attention_scores=True)
        return ops.flip(output, axis=-1), scores


def test_outputs_that_are_not_made_of_scores_are_refused():
    model = two_layers(lambda name: Twisted(2, 4, name=name))
    with pytest.raises(ValueError, match=r"do not follow from its attention scores.*Leave out layers"):
        editor(model, batch(), None)
