"""Attention that is not one of Keras' multi-head layers: written by hand, in other ways, without or with heads."""

import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

from kerasfactory import _backend, explain

X = np.random.default_rng(0).normal(size=(70, 5, 8)).astype("float32")
HEADS = 2


class Written(layers.Layer):
    """Attention as people write it, in one of several ways; `weights` in NumPy is what it should be."""

    def __init__(self, way, **kwargs):
        super().__init__(**kwargs)
        self.way = way
        self.q, self.k, self.v = (layers.Dense(8, use_bias=False, name=name) for name in "qkv")
        self.softmax = layers.Softmax()

    def build(self, shape):
        for dense in (self.q, self.k, self.v):
            dense.build(shape)

    def call(self, x):
        return WAYS[self.way](self, self.q(x), self.k(x), self.v(x))

    def compute_output_shape(self, shape):
        return shape


def split(x):
    return ops.reshape(x, (-1, 5, HEADS, 8 // HEADS))


def joined(x):
    return ops.reshape(x, (-1, 5, 8))


def at_sign(layer, q, k, v):
    return ops.softmax(q @ ops.swapaxes(k, 1, 2)) @ v


def by_matmul(layer, q, k, v):
    return ops.matmul(layer.softmax(ops.matmul(q, ops.swapaxes(k, 1, 2))), v)


def by_einsum(layer, q, k, v):
    weights = ops.softmax(ops.einsum("...qd,...kd->...qk", q, k), axis=-1)
    return ops.einsum("...qk,...kd->...qd", weights, v)


def with_heads(layer, q, k, v):
    weights = ops.softmax(ops.einsum("bqhd,bkhd->bhqk", split(q), split(k)))
    return joined(ops.einsum("bhqk,bkhd->bqhd", weights, split(v)))


def heads_last(layer, q, k, v):
    weights = ops.softmax(ops.einsum("bqhd,bkhd->bqkh", split(q), split(k)), axis=2)
    return joined(ops.einsum("bqkh,bkhd->bqhd", weights, split(v)))


def heads_share_values(layer, q, k, v):
    shared = split(k)[:, :, :1], split(v)[:, :, :1]
    weights = ops.softmax(ops.einsum("bqkgd,bskd->bkgqs", split(q)[:, :, None], shared[0]))
    return joined(ops.einsum("bkgqs,bskd->bqkgd", weights, shared[1]))


def fused(layer, q, k, v):
    return joined(ops.dot_product_attention(split(q), split(k), split(v), scale=1.0))


def fused_and_causal(layer, q, k, v):
    return joined(ops.dot_product_attention(split(q), split(k), split(v), scale=1.0, is_causal=True))


def fused_with_bias(layer, q, k, v):
    bias = ops.reshape(ops.arange(5, dtype="float32"), (1, 1, 1, 5))
    return joined(ops.dot_product_attention(split(q), split(k), split(v), scale=1.0, bias=bias))


def fused_and_grouped(layer, q, k, v):
    return joined(ops.dot_product_attention(split(q), split(k)[:, :, :1], split(v)[:, :, :1], scale=1.0))


def cast_and_zeroed(layer, q, k, v):
    """Weights go through other operations before they meet the values: what meets them counts."""
    weights = ops.cast(ops.softmax(q @ ops.swapaxes(k, 1, 2)), "float32")
    return ops.where(ops.arange(5) < 4, weights, 0.0) @ v


def with_sink(layer, q, k, v):
    logits = q @ ops.swapaxes(k, 1, 2)
    weights = ops.softmax(ops.concatenate([logits, ops.ones_like(logits[:, :, :1])], axis=-1))
    return weights[:, :, :-1] @ v


WAYS = {
    way.__name__: way
    for way in (
        at_sign,
        by_matmul,
        by_einsum,
        with_heads,
        heads_last,
        heads_share_values,
        fused,
        fused_and_causal,
        fused_with_bias,
        fused_and_grouped,
        cast_and_zeroed,
        with_sink,
    )
}
if keras.config.backend() == "tensorflow":
    del WAYS["fused_and_grouped"]  # Keras' own function does not take it there
ONE_HEAD = ("at_sign", "by_matmul", "by_einsum", "cast_and_zeroed", "with_sink")


def model_of(way, **options):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(Written(way, name="written")(inputs)))
    model.compile(**options)
    return model


def right_weights(way, layer):
    """In NumPy, in double precision: (sample, head, query, key)."""
    q, k = (np.einsum("std,de->ste", X, ops.convert_to_numpy(dense.kernel)) for dense in (layer.q, layer.k))
    heads = 1 if way in ONE_HEAD else HEADS
    q, k = (x.astype("float64").reshape(len(X), 5, heads, 8 // heads) for x in (q, k))
    if way in ("heads_share_values", "fused_and_grouped"):
        k = np.repeat(k[:, :, :1], HEADS, axis=2)
    logits = np.einsum("bqhd,bkhd->bhqk", q, k)
    if way == "fused_with_bias":
        logits = logits + np.arange(5)
    if way == "fused_and_causal":
        logits = np.where(np.tri(5, dtype=bool), logits, -np.inf)
    weights = np.exp(logits)
    weights /= weights.sum(axis=-1, keepdims=True) + (np.e if way == "with_sink" else 0)
    return weights * (np.arange(5) < 4) if way == "cast_and_zeroed" else weights


@pytest.mark.parametrize("way", WAYS)
def test_the_weights_are_those_that_the_values_meet(way):
    model = model_of(way)
    before = model.predict(X, verbose=0)
    scores = explain.capture(model, X, verbose=0)  # of several batches: the first is not compiled
    assert list(scores) == ["written"]
    assert scores["written"].dims == ("sample", "head", "query", "key")
    np.testing.assert_allclose(scores["written"], right_weights(way, model.get_layer("written")), atol=2e-6)
    assert explain.recomposition_error(model, X, verbose=0)["written"] < 1e-5
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)


@pytest.mark.parametrize("way", ["at_sign", "heads_last", "fused_with_bias"])
def test_an_eager_model_is_read_as_a_compiled_one(way):
    eager, compiled = model_of(way, run_eagerly=True), model_of(way)
    np.testing.assert_allclose(
        explain.capture(eager, X, verbose=0)["written"], explain.capture(compiled, X, verbose=0)["written"], atol=1e-6
    )


def test_all_of_a_model_is_found_in_order_and_can_be_chosen():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    x = Written("with_heads", name="first")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="of_keras")(x, x)
    x = layers.Attention(name="plain")([x, x])
    x = layers.AdditiveAttention(name="additive")([x, x])
    weights = layers.Softmax()(layers.Dot((2, 2))([x, x]))
    x = layers.Dot((2, 1), name="graph")([weights, x])
    inner = keras.Sequential([keras.Input((5, 8)), Written("fused", name="first")], name="inner")
    model = keras.Model(inputs, inner(x))
    names = ["first", "of_keras", "plain", "additive", "graph", "inner/first"]
    scores = explain.capture(model, X, verbose=0)
    assert list(scores) == names
    assert max(explain.recomposition_error(model, X, verbose=0).values()) < 1e-5
    assert list(explain.capture(model, X, layers=["inner/first", "plain", "of_keras"], verbose=0)) == [
        "of_keras",
        "plain",
        "inner/first",
    ]
    assert list(explain.capture(inner, X, layers="first", verbose=0)) == ["first"]
    with_queries = explain.rollout({name: scores[name] for name in names})
    assert with_queries.shape == (70, 5, 5)


def test_weights_of_keras_own_layers_without_heads_are_those_that_they_return():
    inputs = keras.Input((5, 8))
    for kind in (layers.Attention, layers.AdditiveAttention):
        layer = kind(name="plain")
        model = keras.Model(inputs, layer([inputs, inputs], use_causal_mask=True))
        expected = layer([X, X], return_attention_scores=True, use_causal_mask=True)[1]
        found = explain.capture(model, X, verbose=0)["plain"]
        np.testing.assert_allclose(found[:, 0], ops.convert_to_numpy(expected), atol=1e-6)


def test_summaries_attributions_and_the_monitor_take_it():
    model = model_of("with_heads", loss="mse")
    scores = explain.capture(model, X, verbose=0)["written"]
    summary = explain.summarize(model, X, rows=[2], verbose=0)["written"]
    np.testing.assert_allclose(summary["row"][:, :, 0], scores.values[:, :, 2], atol=1e-6)
    np.testing.assert_allclose(summary["entropy"], -(scores * np.log(np.maximum(scores, 1e-30))).sum("key"), atol=1e-5)
    for method in ("attention", "rollout"):
        assert explain.attribute(model, X, method=method, verbose=0).shape == (70, 5)
    monitor = explain.AttentionMonitor(X[:8])
    model.fit(X, np.zeros((70, 8)), epochs=1, verbose=0, callbacks=[monitor])
    assert explain.head_statistics(scores)["entropy"].shape == (2,)


class Gate(layers.Layer):
    """A mixture of experts: what is contracted is the same for all samples, or nothing is."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.choice, self.kernel = layers.Dense(8), None

    def build(self, shape):
        self.choice.build(shape)
        self.kernel = self.add_weight(shape=(8, 8), name="kernel")

    def call(self, x):
        weights = ops.softmax(self.choice(x))
        return x * weights + ops.matmul(weights, self.kernel)


def test_gates_and_class_probabilities_are_no_attention():
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, layers.Dense(3, "softmax")(Gate(name="gate")(inputs)))
    with pytest.raises(ValueError, match="has no attention that this package can see"):
        explain.capture(model, X, verbose=0)


def test_functions_of_keras_are_as_before_whatever_happens():
    before = [vars(place).get(name) for _, place, name, _ in _backend.all_operations()]

    class Fails(layers.Layer):
        def call(self, x):
            raise ArithmeticError("broken")

        def compute_output_shape(self, shape):
            return shape

    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, Fails()(Written("at_sign")(inputs)))
    with pytest.raises(ArithmeticError, match="broken"):
        explain.capture(model, X, verbose=0)
    explain.capture(model_of("fused"), X, verbose=0)
    assert [vars(place).get(name) for _, place, name, _ in _backend.all_operations()] == before


def test_other_threads_pass_through():
    model, other = model_of("at_sign"), model_of("with_heads")
    expected = other.predict(X, verbose=0)
    results, stop = [], threading.Event()

    def predicting():
        while not stop.is_set():
            results.append(ops.convert_to_numpy(other(X)))

    thread = threading.Thread(target=predicting)
    thread.start()
    try:
        for _ in range(5):
            assert list(explain.capture(model, X, verbose=0)) == ["written"]
    finally:
        stop.set()
        thread.join()
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_layer_that_is_called_twice_has_two_entries():
    inputs = keras.Input((5, 8))
    layer = Written("fused", name="written")
    model = keras.Model(inputs, layer(layer(inputs)))
    assert list(explain.capture(model, X, verbose=0)) == ["written#1", "written#2"]
