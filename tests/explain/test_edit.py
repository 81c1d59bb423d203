"""A model run with other scores than its own."""

import contextlib
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


def second_output(outputs, more):
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
    gradients, outputs, scores = edit.gradient(batch(), added, deltas, second_output)
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
    edit.gradient(batch(), scaled_heads, {"second": np.ones(2, "float32")}, second_output)
    edit.predict(batch(), scaled_heads, {"second": np.zeros(2, "float32")})
    assert [dict(vars(layer)) for layer in model._flatten_layers()] == before


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_gradients_are_compiled_once_for_all_sizes_of_batches_and_what_else_changes(run_eagerly):
    model = two_layers(ATTENTIONS["keras"])
    model.compile(run_eagerly=run_eagerly)
    edit = editor(model, batch(), None)
    runs = []

    def weighted(outputs, more):
        runs.append(outputs)
        return ops.sum(more["weights"] * outputs[:, 1])

    for size in (3, 2, 3, 1, 2):
        weights = np.arange(1.0, size + 1, dtype="float32")
        deltas = {name: np.zeros((size, *shape), "float32") for name, shape in edit.shapes.items()}
        gradients, outputs, _ = edit.gradient(batch(X[:size]), added, deltas, weighted, {"weights": weights})
        plain, _, _ = edit.gradient(batch(X[:size]), added, deltas, second_output, once=True)
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

    def by_values(outputs, more):
        with warnings.catch_warnings():  # of NumPy to Keras
            warnings.simplefilter("ignore", DeprecationWarning)
            return ops.sum(outputs[:, int(numbers(more)[0])])

    compiles = keras.config.backend() != "torch"
    for warns in (compiles, False):  # once
        with pytest.warns(UserWarning, match="eagerly.*The cause was") if warns else contextlib.nullcontext():
            gradients, _, _ = edit.gradient(batch(), added, deltas, by_values, np.array([1, 0]))
        expected, _, _ = edit.gradient(batch(), added, deltas, second_output)
        for name in edit.shapes:
            np.testing.assert_allclose(numbers(gradients[name]), numbers(expected[name]), rtol=1e-4, atol=1e-6)


class Twisted(layers.MultiHeadAttention):
    def _compute_attention(self, *args, **kwargs):
        output, scores = super()._compute_attention(*args[:5], return_attention_scores=True)
        return ops.flip(output, axis=-1), scores


def test_outputs_that_are_not_made_of_scores_are_refused():
    model = two_layers(lambda name: Twisted(2, 4, name=name))
    with pytest.raises(ValueError, match=r"are not made of its attention scores.*Leave out layers"):
        editor(model, batch(), None)
