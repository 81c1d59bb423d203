"""Ways to attend, and what looks like it: each is read, or named with the reason, and no gate is taken for it."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from kerasfactory import explain

X = np.random.default_rng(0).normal(size=(6, 5, 8)).astype("float32")
QUERIES = np.random.default_rng(1).normal(size=(3, 8)).astype("float32")
SCORE = np.random.default_rng(2).normal(size=(8,)).astype("float32")


class Attending(layers.Layer):
    """Attends in a way that a test gives it."""

    def __init__(self, way, **kwargs):
        super().__init__(**kwargs)
        self.way = way
        self.units = {units: layers.Dense(units) for units in (2, 3, 4, 8, 12)}

    def build(self, shape):
        self.table = self.add_weight(shape=(9, 8), name="table")

    def dense(self, units, x, activation=None):
        return keras.activations.get(activation)(self.units[units](x))

    def call(self, x):
        return self.way(self, x)


def logits(x):
    return ops.matmul(x, ops.swapaxes(x, 1, 2))


def energies(x):
    """(batch, key)"""
    return ops.sum(x * ops.convert_to_tensor(SCORE), axis=-1)


def pooled(weights, x):
    return ops.sum(ops.expand_dims(weights, -1) * x, axis=1)


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


OF_SELF = softmax(np.einsum("bqd,bkd->bqk", X, X))[:, None]
OF_POOLING = softmax(X @ SCORE)[:, None, None]
SHARPER = softmax(2 * np.einsum("bqd,bkd->bqk", X, X))[:, None]
HEADS = softmax(np.einsum("bqhd,bkhd->bhqk", *[X.reshape(6, 5, 2, 4)] * 2))


def exp_by_hand(layer, x):
    e = ops.exp(logits(x))
    return (e / ops.sum(e, axis=-1, keepdims=True)) @ x


def exp_by_hand_with_epsilon(layer, x):
    """As in the attention layers that people have copied since Keras 1."""
    e = ops.exp(energies(x))
    weights = e / (ops.sum(e, axis=1, keepdims=True) + 1e-7)
    return ops.sum(x * ops.expand_dims(weights, -1), axis=1)


def log_softmax(layer, x):
    return ops.exp(ops.log_softmax(logits(x))) @ x


def logsumexp(layer, x):
    z = logits(x)
    return ops.exp(z - ops.logsumexp(z, axis=-1, keepdims=True)) @ x


def softmax_of_transposed(layer, x):
    return ops.swapaxes(ops.softmax(logits(x), axis=1), 1, 2) @ x


def heads_folded_after_the_softmax(layer, x):
    heads = ops.transpose(ops.reshape(x, (-1, 5, 2, 4)), (0, 2, 1, 3))
    weights = ops.softmax(ops.matmul(heads, ops.swapaxes(heads, 2, 3)))
    folded = ops.reshape(weights, (-1, 5, 5)) @ ops.reshape(heads, (-1, 5, 4))
    return ops.reshape(ops.transpose(ops.reshape(folded, (-1, 2, 5, 4)), (0, 2, 1, 3)), (-1, 5, 8))


def multiplied_and_summed(layer, x):
    weights = ops.softmax(logits(x))
    return ops.sum(ops.expand_dims(weights, -1) * ops.expand_dims(x, 1), axis=2)


def pooling(layer, x):
    return pooled(ops.softmax(energies(x)), x)


def pooling_by_index(layer, x):
    return ops.sum(ops.softmax(energies(x))[..., None] * x, axis=-2)


def pooling_with_an_axis_of_one(layer, x):
    weights = ops.softmax(ops.expand_dims(energies(x), -1), axis=1)
    return ops.sum(weights * x, axis=1)


def pooling_by_mean(layer, x):
    return ops.mean(ops.expand_dims(ops.softmax(energies(x)), -1) * x, axis=1)


def pooling_by_matmul(layer, x):
    return ops.squeeze(ops.matmul(ops.expand_dims(ops.softmax(energies(x)), 1), x), 1)


def pooling_by_einsum(layer, x):
    return ops.einsum("bk,bkd->bd", ops.softmax(energies(x)), x)


def learned_queries(layer, x):
    weights = ops.softmax(ops.einsum("qd,bkd->bqk", QUERIES, x))
    return ops.einsum("bqk,bkd->bqd", weights, x)


def weights_met_twice(layer, x):
    weights = ops.softmax(logits(x))
    return weights @ x + weights @ (x * 2.0)


def first_of_two_is_used_last(layer, x):
    weights, sharper = ops.softmax(logits(x)), ops.softmax(2 * logits(x))
    return (sharper @ x) + (weights @ x)


# Beside the attention, something else that looks like it, or of which only a part meets the values.


def neighbors_beside(layer, x):
    """A product with another matrix of the same shape."""
    weights, neighbors = ops.softmax(logits(x)), ops.cast(logits(x) > 0, "float32")
    return neighbors @ x + weights @ x


def logits_beside(layer, x):
    z = logits(x)
    weights = ops.softmax(z)
    return z @ x + weights @ x


def masked_beside(layer, x):
    """The weights are masked afterward: what has their shape is not looked at when they have met their values."""
    weights = ops.softmax(logits(x)) * ops.cast(np.arange(5) < 3, "float32")
    return weights / ops.sum(weights, axis=-1, keepdims=True) @ x


def masked_by_sample(layer, x):
    mask = ops.cast(energies(x) > 0, "float32")[:, None]
    weights = ops.softmax(logits(x)) * mask
    return weights / (ops.sum(weights * mask, axis=-1, keepdims=True) + 1e-9) @ x


def with_a_penalty_on_entropy(layer, x):
    weights = ops.softmax(logits(x))
    layer.add_loss(ops.mean(-ops.sum(weights * ops.log(weights + 1e-9), axis=-1)))
    return weights @ x


def of_one_query(layer, x):
    return ops.softmax(logits(x))[:, :1] @ x


def of_one_query_by_number(layer, x):
    return ops.sum(ops.softmax(logits(x))[:, 0, :, None] * x, axis=1)


def head_by_head(layer, x):
    heads = ops.transpose(ops.reshape(x, (-1, 5, 2, 4)), (0, 2, 1, 3))
    weights = ops.softmax(ops.matmul(heads, ops.swapaxes(heads, 2, 3)))
    return weights[:, 0] @ heads[:, 0] + weights[:, 1] @ heads[:, 1]


def unstacked_heads(layer, x):
    heads = ops.transpose(ops.reshape(x, (-1, 5, 2, 4)), (0, 2, 1, 3))
    first, second = ops.unstack(ops.softmax(ops.matmul(heads, ops.swapaxes(heads, 2, 3))), axis=1)
    return first @ heads[:, 0] + second @ heads[:, 1]


def split_queries(layer, x):
    first, second = ops.split(ops.softmax(logits(x)), [2], axis=1)
    return ops.concatenate([first @ x, second @ x], axis=1)


def summed_along_a_list_of_one_axis(layer, x):
    return ops.sum(ops.expand_dims(ops.softmax(energies(x)), -1) * x, axis=[1])


def weights_for_each_channel(layer, x):
    return ops.sum(ops.softmax(x, axis=1) * x, axis=1)


def twenty_at_once(layer, x):
    return sum(weights @ x for weights in [ops.softmax(logits(x)) for _ in range(20)])


KEPT = softmax(np.where(np.arange(5) < 3, np.einsum("bqd,bkd->bqk", X, X), -np.inf))[:, None]
IN_VIEW = (X @ SCORE > 0)[:, None, None]
OF_SAMPLE = OF_SELF * IN_VIEW / ((OF_SELF * IN_VIEW).sum(-1, keepdims=True) + 1e-9)

WAYS = {
    neighbors_beside: [OF_SELF],
    logits_beside: [OF_SELF],
    masked_beside: [KEPT],
    masked_by_sample: [OF_SAMPLE],
    with_a_penalty_on_entropy: [OF_SELF],
    of_one_query: [OF_SELF[:, :, :1]],
    of_one_query_by_number: [OF_SELF[:, :, :1]],
    head_by_head: [HEADS[:, :1], HEADS[:, 1:]],
    unstacked_heads: [HEADS[:, :1], HEADS[:, 1:]],
    split_queries: [OF_SELF[:, :, :2], OF_SELF[:, :, 2:]],
    summed_along_a_list_of_one_axis: [OF_POOLING],
    weights_for_each_channel: [softmax(X, axis=1).transpose(0, 2, 1)[:, :, None]],
    twenty_at_once: [OF_SELF] * 20,
    exp_by_hand: [OF_SELF],
    exp_by_hand_with_epsilon: [OF_POOLING],
    log_softmax: [OF_SELF],
    logsumexp: [OF_SELF],
    softmax_of_transposed: [OF_SELF],
    heads_folded_after_the_softmax: [HEADS.reshape(12, 1, 5, 5)],
    multiplied_and_summed: [OF_SELF],
    pooling: [OF_POOLING],
    pooling_by_index: [OF_POOLING],
    pooling_with_an_axis_of_one: [OF_POOLING],
    pooling_by_mean: [OF_POOLING],
    pooling_by_matmul: [OF_POOLING],
    pooling_by_einsum: [OF_POOLING],
    learned_queries: [softmax(np.einsum("qd,bkd->bqk", QUERIES, X))[:, None]],
    weights_met_twice: [OF_SELF],
    first_of_two_is_used_last: [SHARPER, OF_SELF],
}


def model_of(way, beside=False):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    x = layers.Attention(name="beside")([inputs, inputs]) if beside else inputs
    return keras.Model(inputs, Attending(way, name="attending")(x))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_it_is_read(way):
    model = model_of(way)
    found = explain.capture(model, X, verbose=0)
    expected = WAYS[way]
    several = [f"attending#{number}" for number in range(1, len(expected) + 1)]
    assert list(found) == (["attending"] if len(expected) == 1 else several)
    for scores, right in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(scores, right, atol=3e-6)
    assert max(explain.recomposition_error(model, X, verbose=0).values()) < 1e-5


def bahdanau(x):
    e = layers.Dense(1, name="energy")(layers.Dense(4, "tanh")(x))
    return layers.Dot(axes=1, name="context")([layers.Softmax(axis=1)(e), x]), "context"


def repeated(x):
    """The layer that many tutorials of Keras have."""
    e = layers.Flatten()(layers.Dense(1, name="energy")(x))
    weights = layers.Permute((2, 1))(layers.RepeatVector(8)(layers.Activation("softmax")(e)))
    product = layers.Multiply()([x, weights])
    return layers.Lambda(lambda x: ops.sum(x, axis=1), output_shape=(8,), name="context")(product), "context"


def masked_softmax(x):
    e = layers.Dense(1, name="energy")(x)
    mask = ops.ones_like(e) > 0
    return layers.Dot(axes=(1, 1), name="context")([layers.Softmax(axis=1)(e, mask=mask), x]), "context"


def luong(x):
    e = layers.Dot(axes=(2, 2))([layers.Dense(8, name="energy")(x), x])
    return layers.Dot(axes=(2, 1), name="context")([layers.Activation("softmax")(e), x]), "context"


def in_the_model_itself(x):
    e = ops.squeeze(layers.Dense(1, name="energy")(x), -1)
    return ops.sum(ops.expand_dims(ops.softmax(e), -1) * x, axis=1), "functional"


@pytest.mark.parametrize(
    "graph", [bahdanau, repeated, masked_softmax, luong, in_the_model_itself], ids=lambda graph: graph.__name__
)
def test_a_graph_of_plain_layers_is_named_by_the_layer_that_contracts(graph):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    outputs, name = graph(inputs)
    model = keras.Model(inputs, outputs, name="functional")
    energy = keras.Model(inputs, model.get_layer("energy").output).predict(X, verbose=0)
    z = np.einsum("bqd,bkd->bqk", energy, X) if graph is luong else energy.transpose(0, 2, 1)
    found = explain.capture(model, X, verbose=0)
    assert list(found) == [name]
    heads = 8 if graph is repeated else 1  # there the weights are written out for each of 8 features
    np.testing.assert_allclose(found[name], np.repeat(softmax(z)[:, None], heads, axis=1), atol=2e-6)
    assert explain.recomposition_error(model, X, verbose=0)[name] < 1e-5


# What is no attention, or cannot be told to be: it is not read, and no layer of these is named.


def experts(layer, x):
    parts = ops.stack([layer.dense(8, x * number) for number in (1.0, 2.0, 3.0)], axis=2)
    return ops.sum(layer.dense(3, x, "softmax")[..., None] * parts, axis=2)


def experts_by_einsum(layer, x):
    parts = ops.stack([layer.dense(8, x * number) for number in (1.0, 2.0, 3.0)], axis=1)
    return ops.einsum("bte,betd->btd", ops.softmax(layer.dense(3, x)), parts)


def experts_by_matmul(layer, x):
    parts = ops.stack([layer.dense(8, x[:, 0] * number) for number in (1.0, 2.0, 3.0)], axis=1)
    return ops.matmul(ops.softmax(layer.dense(3, x[:, 0]))[:, None], parts)


def best_experts(layer, x):
    parts = ops.stack([layer.dense(8, x * number) for number in (1.0, 2.0, 3.0)], axis=2)
    best, which = ops.top_k(layer.dense(3, x), 2)
    taken = ops.take_along_axis(parts, which[..., None], axis=2)
    return ops.einsum("btk,btkd->btd", ops.softmax(best), taken)


def squeeze_and_excite(layer, x):
    return x * layer.dense(8, layer.dense(2, ops.mean(x, axis=1, keepdims=True)), "sigmoid")


def gated_linear_unit(layer, x):
    return ops.sigmoid(layer.dense(8, x)) * layer.dense(8, x)


def tied_vocabulary(layer, x):
    return ops.softmax(ops.matmul(x, ops.transpose(layer.table))) @ ops.convert_to_tensor(layer.table)


def mixture_of_softmaxes(layer, x):
    words = ops.softmax(ops.reshape(layer.dense(12, x), (-1, 5, 3, 4)))
    return ops.sum(layer.dense(3, x, "softmax")[..., None] * words, axis=2)


def cosine_similarity(layer, x):
    one = x / ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True))
    return ops.matmul(one, ops.swapaxes(one, 1, 2))


def feature_softmax(layer, x):
    """A query's softmax over its features, in linear attention."""
    q, k = ops.softmax(layer.dense(4, x)), ops.elu(layer.dense(4, x)) + 1.0
    return ops.matmul(q, ops.matmul(ops.swapaxes(k, 1, 2), x))


def entropy_of_experts(layer, x):
    weights = layer.dense(3, x, "softmax")
    layer.add_loss(-ops.mean(ops.sum(weights * ops.log(weights + 1e-9), axis=-1)))
    return weights


def entropy_of_features(layer, x):
    weights = ops.softmax(x)
    return ops.sum(weights * ops.log(weights), axis=-1)


NO_ATTENTION = [
    entropy_of_experts,
    entropy_of_features,
    experts,
    experts_by_einsum,
    experts_by_matmul,
    best_experts,
    squeeze_and_excite,
    gated_linear_unit,
    tied_vocabulary,
    mixture_of_softmaxes,
    cosine_similarity,
    feature_softmax,
]


@pytest.mark.parametrize("way", NO_ATTENTION, ids=lambda way: way.__name__)
def test_gates_and_the_like_are_no_attention(way):
    """No warning either: every warning is an error in these tests."""

    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, Attending(way, name="block")(layers.Attention(name="beside")([inputs, inputs])))
    assert list(explain.capture(model, X, verbose=0)) == ["beside"]


def dropped(layer, x):
    weights = ops.softmax(logits(x))
    return (weights * ops.cast(np.arange(5) % 2, "float32") * 2.0) @ x


def test_what_is_no_distribution_is_said():
    model = model_of(dropped)
    with pytest.warns(UserWarning, match="layer 'attending' are not weights: rows over the keys sum to up to 2"):
        scores = explain.capture(model, X, verbose=0)["attending"]
    np.testing.assert_allclose(scores, OF_SELF * 2 * (np.arange(5) % 2), atol=3e-6)


def several_axes(layer, x):
    """The keys lie on a grid of 2 by 2."""
    keys = ops.reshape(x[:, :4], (-1, 2, 2, 8))
    weights = layers.Softmax(axis=(2, 3))(ops.einsum("bqd,bijd->bqij", x, keys))
    return ops.einsum("bqij,bijd->bqd", weights, keys)


def sigmoid(layer, x):
    return ops.sigmoid(logits(x)) @ x


def relu(layer, x):
    return ops.relu(logits(x)) @ x


def linear(layer, x):
    phi = ops.elu(x) + 1.0
    return phi @ (ops.swapaxes(phi, 1, 2) @ x)


class SomeAttention(Attending):
    """What its class is called is all that tells that it attends."""


UNREAD = {several_axes: "several axes", sigmoid: "no softmax", relu: "no softmax", linear: "no softmax"}


@pytest.mark.parametrize("way", UNREAD, ids=lambda way: way.__name__)
def test_what_cannot_be_read_is_named_with_the_reason(way):
    inputs = keras.Input((5, 8))
    x = layers.Attention(name="beside")([inputs, inputs])
    model = keras.Model(inputs, SomeAttention(way, name="some_attention")(x))
    with pytest.warns(UserWarning, match=rf"not captured:\n  some_attention: .*{UNREAD[way]}"):
        assert list(explain.capture(model, X, verbose=0)) == ["beside"]
