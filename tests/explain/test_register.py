"""Adapters that users register, for layers that fold axes into the batch or hide their kernel."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

from kerasfactory import explain

X = np.random.default_rng(0).normal(size=(10, 12, 8)).astype("float32")
WINDOW = 4


class Folding(layers.Layer):
    """What derives from this folds windows into the batch."""


class InWindows(Folding):
    """Attends within windows of 4 positions, which it folds into the batch."""

    def call(self, x):
        windows = ops.reshape(x, (-1, WINDOW, 8))
        weights = ops.softmax(ops.matmul(windows, ops.swapaxes(windows, 1, 2)))
        return ops.reshape(ops.matmul(weights, windows), (-1, 12, 8))


class AroundKeras(layers.Layer):
    """The same, by a layer of Keras."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(2, 4, name="inner")

    def build(self, shape):
        self.attention.build((None, WINDOW, 8), (None, WINDOW, 8))

    def call(self, x):
        windows = ops.reshape(x, (-1, WINDOW, 8))
        return ops.reshape(self.attention(windows, windows), (-1, 12, 8))


class HiddenAttention(layers.Layer):
    """Attends by a computation that is not seen: the logarithms are added, and the backend's functions are not used."""

    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, query, context, causal=False):
        return hidden(query, context, self.scale, causal)

    def compute_output_shape(self, query_shape, context_shape):
        return query_shape


def hidden(query, context, scale, causal):
    """Written out, key by key."""
    numerator, denominator = 0.0, 0.0
    for key in range(12):
        e = ops.exp(scale * ops.sum(query * context[:, key : key + 1], axis=-1, keepdims=True))
        if causal:
            e = e * ops.cast(ops.arange(12)[:, None] >= key, "float32")
        numerator, denominator = numerator + e * context[:, key : key + 1], denominator + e
    return numerator / denominator


def by_window(layer, scores, x):
    return ops.reshape(scores, (-1, 12 // WINDOW, *scores.shape[1:]))


def of_hidden(layer, scores, query, context, causal=False):
    assert scores is None
    logits = layer.scale * ops.matmul(query, ops.swapaxes(context, 1, 2))
    if causal:
        logits = ops.where(ops.arange(12)[:, None] >= ops.arange(12), logits, -1e9)
    weights = ops.softmax(logits)
    return weights[:, None], ops.matmul(weights, context)


@pytest.fixture(autouse=True)
def nothing_registered():
    yield
    for kind in (Folding, InWindows, AroundKeras, HiddenAttention):
        explain.register_attention(kind, None)


def windowed(kind, **options):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12, 8))
    model = keras.Model(inputs, kind(name="windows")(inputs))
    model.compile(**options)
    return model


def softmax(logits):
    weights = np.exp(logits)
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", [InWindows, AroundKeras])
def test_windows_that_are_folded_into_the_batch_get_their_own_axis(kind):
    model = windowed(kind)
    before = explain.capture(model, X, batch_size=4, verbose=0)
    assert next(iter(before.values())).dims == ("sequence", "head", "query", "key")
    explain.register_attention(kind, by_window)
    found = explain.capture(model, X, batch_size=4, verbose=0)
    assert list(found) == ["windows"]
    assert found["windows"].dims == ("sample", "axis_2", "head", "query", "key")
    np.testing.assert_allclose(
        found["windows"].values.reshape(next(iter(before.values())).shape), next(iter(before.values())), atol=1e-6
    )
    if kind is InWindows:
        windows = X.reshape(10, 3, 4, 8)
        expected = softmax(np.einsum("bwqd,bwkd->bwqk", windows, windows))
        np.testing.assert_allclose(found["windows"][:, :, 0], expected, atol=1e-6)
    assert explain.recomposition_error(model, X, verbose=0)["windows"] < 1e-5
    explain.register_attention(kind, None)
    assert next(iter(explain.capture(model, X, verbose=0).values())).dims[0] == "sequence"


def test_scores_of_all_positions_can_be_attributed():
    """An adapter that writes the windows into one map gives each sample its own row of features."""

    def whole_map(layer, scores, x):
        weights = ops.reshape(scores, (-1, 3, WINDOW, 1, WINDOW))
        same = ops.reshape(ops.eye(3), (1, 3, 1, 3, 1))
        return ops.reshape(weights * same, (-1, 1, 12, 12))

    explain.register_attention(InWindows, whole_map)
    model = windowed(InWindows)
    attribution = explain.attribute(model, X, verbose=0)
    windows = X.reshape(10, 3, 4, 8)
    received = softmax(np.einsum("bwqd,bwkd->bwqk", windows, windows)).sum(axis=2) / 12
    np.testing.assert_allclose(attribution, received.reshape(10, 12), atol=1e-6)
    summary = explain.summarize(model, X, verbose=0)["windows"]
    np.testing.assert_allclose(summary["received"][:, 0], received.reshape(10, 12), atol=1e-6)
    assert summary.attrs["read_from"] == "adapter"
    with pytest.raises(ValueError, match=r"windows are those that a registered adapter returns"):
        explain.attribute(model, X, method="attention_gradient", target=0, task="regression", verbose=0)
    with pytest.raises(ValueError, match="values of layer 'windows' are not known"):
        explain.attribute(model, X, method="value_norm", verbose=0)


def hidden_model(**options):
    query, context = keras.Input((12, 8), name="query"), keras.Input((12, 8), name="context")
    model = keras.Model([query, context], HiddenAttention(0.5, name="hidden")(query, context, causal=True))
    model.compile(**options)
    return model


@pytest.mark.parametrize("eager", [False, True])
def test_a_hidden_kernel_is_read_as_the_adapter_says_and_proven_by_its_output(eager):
    model, other = hidden_model(run_eagerly=eager), X[::-1].copy()
    with pytest.raises(ValueError, match="hidden: it is a `HiddenAttention`: no softmax over keys was seen"):
        explain.capture(model, [X, other], verbose=0)
    explain.register_attention(HiddenAttention, of_hidden)
    found = explain.capture(model, [X, other], batch_size=4, verbose=0)["hidden"]
    logits = np.where(np.tri(12, dtype=bool), 0.5 * np.einsum("bqd,bkd->bqk", X, other), -np.inf)
    np.testing.assert_allclose(found[:, 0], softmax(logits), atol=1e-6)
    assert explain.recomposition_error(model, [X, other], verbose=0)["hidden"] < 1e-5

    def wrong(layer, scores, query, context, causal):
        return of_hidden(layer, scores, query, context, False)

    explain.register_attention(HiddenAttention, wrong)
    assert explain.recomposition_error(model, [X, other], verbose=0)["hidden"] > 0.1


@pytest.mark.skipif(keras.config.backend() != "jax", reason="of JAX")
def test_a_kernel_with_a_gradient_of_its_own_is_read_as_the_adapter_says():
    import jax

    @jax.custom_vjp
    def kernel(x):
        return jax.nn.softmax(x @ ops.swapaxes(x, 1, 2)) @ x

    kernel.defvjp(lambda x: (kernel(x), x), lambda x, gradient: (gradient,))

    class Kernel(InWindows):
        def call(self, x):
            return kernel(x)

    def again(layer, scores, x):
        assert scores is None
        weights = ops.softmax(ops.matmul(x, ops.swapaxes(x, 1, 2)))
        return weights[:, None], ops.matmul(weights, x)

    model = windowed(Kernel)
    with pytest.raises(ValueError, match="windows: its scores stay inside"):
        explain.capture(model, X, verbose=0)
    explain.register_attention(Kernel, again)
    found = explain.capture(model, X, verbose=0)["windows"]
    np.testing.assert_allclose(found[:, 0], softmax(np.einsum("bqd,bkd->bqk", X, X)), atol=1e-6)
    assert explain.recomposition_error(model, X, verbose=0)["windows"] < 1e-5


def test_where_nothing_can_be_compared_that_is_said():
    explain.register_attention(HiddenAttention, lambda *args, **kwargs: of_hidden(*args, **kwargs)[0])
    assert list(explain.capture(hidden_model(), [X, X], verbose=0)) == ["hidden"]
    with pytest.raises(ValueError, match=r"nothing to compare in layer 'hidden'.*Let it return a pair"):
        explain.recomposition_error(hidden_model(), [X, X], verbose=0)


def test_the_nearest_class_counts():
    class Nearer(InWindows):
        pass

    model = windowed(Nearer)
    explain.register_attention(Folding, lambda layer, scores, x: 1 / 0)
    explain.register_attention(InWindows, by_window)
    assert explain.capture(windowed(InWindows), X, layers="windows", verbose=0)["windows"].ndim == 5
    assert explain.capture(model, X, layers="windows", verbose=0)["windows"].ndim == 5
    explain.register_attention(Nearer, lambda layer, scores, x: by_window(layer, scores, x)[:, 1])
    assert explain.capture(model, X, layers="windows", verbose=0)["windows"].shape == (10, 1, 4, 4)


def test_arguments_and_results_are_checked():
    with pytest.raises(ValueError, match=r"must be a subclass of keras.layers.Layer. Give its class, not a layer"):
        explain.register_attention(InWindows(), by_window)
    with pytest.raises(ValueError, match="must be a subclass"):
        explain.register_attention("InWindows", by_window)
    with pytest.raises(ValueError, match="`adapter` must be a function"):
        explain.register_attention(InWindows, "by_window")
    explain.register_attention(InWindows, lambda layer, scores, x: scores[:, 0])
    with pytest.raises(ValueError, match=r"for `InWindows` must return.*'windows' it returned: shape \(30, 4, 4\)"):
        explain.capture(windowed(InWindows, run_eagerly=True), X, verbose=0)
    explain.register_attention(InWindows, lambda layer, scores, x: None)
    with pytest.raises(ValueError, match="'windows' it returned: type NoneType"):
        explain.capture(windowed(InWindows), X, verbose=0)
    explain.register_attention(InWindows, lambda layer, scores: scores)  # `call` has an argument more
    with pytest.raises(TypeError) as caught:
        explain.capture(windowed(InWindows), X, verbose=0)
    assert caught.value.__notes__[0] == "Raised by the adapter that is registered for `InWindows`, in layer 'windows'."


def test_an_array_is_taken_as_a_tensor_is():
    explain.register_attention(InWindows, lambda layer, scores, x: np.full((10, 1, 12, 12), 1 / 12))
    np.testing.assert_allclose(explain.capture(windowed(InWindows), X, verbose=0)["windows"], 1 / 12)


def test_neither_layer_nor_model_is_kept():
    explain.register_attention(InWindows, by_window)
    model = windowed(InWindows)
    explain.capture(model, X, verbose=0)
    layer = model.get_layer("windows")
    assert "call" not in vars(layer)
    references = [weakref.ref(model), weakref.ref(layer)]
    del model, layer
    gc.collect()
    assert not [reference() for reference in references if reference() is not None]
