"""Attention that is computed by the backend's own functions, past Keras. What can be read is, the rest is named."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from kerasfactory import explain

BACKEND = keras.config.backend()
X = np.random.default_rng(0).normal(size=(6, 5, 8)).astype("float32")
HEADS = 2
BIAS = np.linspace(-1, 1, 25).reshape(5, 5).astype("float32")
ALLOWED = np.tri(5, dtype=bool)


class Past(layers.Layer):
    """Attends in one of the ways below, with queries and keys that are the input."""

    def __init__(self, way, **kwargs):
        super().__init__(**kwargs)
        self.way = way

    def call(self, x):
        return WAYS[self.way](x)

    def compute_output_shape(self, shape):
        return shape


def with_heads(x):
    return ops.reshape(x, (-1, 5, HEADS, 4))


def heads_first(x):
    return ops.transpose(with_heads(x), (0, 2, 1, 3))


def swapped(x):
    return ops.swapaxes(x, 1, 2)


def right(bias=0.0, heads=1, scale=1.0):
    x = X.astype("float64").reshape(6, 5, heads, 8 // heads)
    weights = np.exp(np.einsum("bqhd,bkhd->bhqk", x, x) * scale + bias)
    return weights / weights.sum(axis=-1, keepdims=True)


CAUSAL = np.where(ALLOWED, 0, -np.inf)
HALF = 4**-0.5  # the scale of a head of size 4

if BACKEND == "torch":
    import torch
    from torch.nn import functional
    from torch.nn.functional import scaled_dot_product_attention as fused_attention

    WAYS = {
        "matmul": lambda x: torch.matmul(functional.softmax(torch.matmul(x, x.transpose(1, 2)), dim=-1), x),
        "bmm": lambda x: torch.bmm(torch.softmax(torch.bmm(x, x.mT), -1), mat2=x),
        "methods": lambda x: x.matmul(x.mT).softmax(dim=-1).bmm(x),
        "einsum": lambda x: torch.einsum("bqk,bkd->bqd", [torch.softmax(x @ x.mT, 2), x]),
        "fused": lambda x: functional.scaled_dot_product_attention(*[heads_first(x)] * 3),
        "fused_by_name": lambda x: fused_attention(*[heads_first(x)] * 3),
        "fused_causal": lambda x: functional.scaled_dot_product_attention(*[heads_first(x)] * 3, is_causal=True),
        "fused_masked": lambda x: functional.scaled_dot_product_attention(*[heads_first(x)] * 3, torch.tensor(ALLOWED)),
        "fused_biased": lambda x: functional.scaled_dot_product_attention(
            x, x, x, attn_mask=torch.tensor(BIAS), scale=1.0
        ),
        "fused_grouped": lambda x: functional.scaled_dot_product_attention(
            heads_first(x), heads_first(x)[:, :1], heads_first(x)[:, :1], enable_gqa=True
        ),
    }
elif BACKEND == "jax":
    import jax
    import jax.numpy as jnp
    from jax.nn import softmax

    WAYS = {
        "matmul": lambda x: jnp.matmul(jax.nn.softmax(jnp.matmul(x, swapped(x))), x),
        "einsum": lambda x: jnp.einsum("bqk,bkd->bqd", softmax(x @ swapped(x), axis=2), x),
        "fused": lambda x: jax.nn.dot_product_attention(*[with_heads(x)] * 3),
        "fused_causal": lambda x: jax.nn.dot_product_attention(*[with_heads(x)] * 3, is_causal=True),
        "fused_masked": lambda x: jax.nn.dot_product_attention(*[with_heads(x)] * 3, mask=ALLOWED[None, None]),
        "fused_biased": lambda x: jax.nn.dot_product_attention(*[x[:, :, None]] * 3, BIAS[None, None], scale=1.0),
    }
else:
    import tensorflow as tf

    WAYS = {
        "matmul": lambda x: tf.matmul(tf.nn.softmax(tf.matmul(x, x, transpose_b=True)), x),
        "transposed": lambda x: tf.linalg.matmul(
            tf.nn.softmax(tf.linalg.matmul(x, x, transpose_b=True), axis=1), x, transpose_a=True
        ),
        "einsum": lambda x: tf.einsum("bqk,bkd->bqd", tf.nn.softmax(x @ tf.transpose(x, (0, 2, 1)), axis=2), x),
    }

RIGHT = {
    **dict.fromkeys(("fused", "fused_by_name"), right(heads=2, scale=HALF)),
    "fused_causal": right(CAUSAL, 2, HALF),
    "fused_masked": right(CAUSAL, 2, HALF),
    "fused_biased": right(BIAS),
}


def attending(way):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(layers.Reshape((5, 8))(Past(way, name="past")(inputs))))


@pytest.mark.parametrize("way", WAYS)
def test_functions_of_the_backend_are_read(way):
    model = attending(way)
    before = model.predict(X, verbose=0)
    found = explain.capture(model, X, batch_size=4, verbose=0)
    assert list(found) == ["past"]
    expected = RIGHT.get(way, right())
    if way == "fused_grouped":
        x = X.astype("float64").reshape(6, 5, 2, 4)
        expected = np.exp(np.einsum("bqhd,bkd->bhqk", x, x[:, :, 0]) * HALF)
        expected /= expected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found["past"], expected, atol=2e-6)
    assert explain.recomposition_error(model, X, verbose=0)["past"] < 1e-5
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)


def unread(x):
    """A way to call the backend's fused function whose scores cannot be computed again."""
    if BACKEND == "torch":
        return functional.scaled_dot_product_attention(*[x[:, None, None]] * 3)[:, 0, 0]
    lengths = jnp.full(x.shape[:1], 3)
    return joined(jax.nn.dot_product_attention(*[with_heads(x)] * 3, key_value_seq_lengths=lengths))


def joined(x):
    return ops.reshape(x, (-1, 5, 8))


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow has no fused function")
def test_a_call_that_cannot_be_read_is_named_with_the_reason(monkeypatch):
    monkeypatch.setitem(WAYS, "unread", unread)
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, Past("unread", name="past")(layers.Attention(name="read")([inputs, inputs])))
    with pytest.warns(UserWarning, match=r"past: it calls `.*dot_product_attention` with (tensors of 5|`key_value_se)"):
        assert list(explain.capture(model, X, verbose=0)) == ["read"]


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch")
@pytest.mark.parametrize("kind", ["attention", "encoder"])
def test_modules_of_pytorch_are_read_though_they_would_take_one_kernel(kind):
    torch.manual_seed(0)
    if kind == "attention":
        module = torch.nn.MultiheadAttention(8, HEADS, batch_first=True)

        def call(wrapped, x):
            return wrapped(x, x, x, need_weights=False)[0]
    else:
        module = torch.nn.TransformerEncoderLayer(8, HEADS, 16, batch_first=True, dropout=0.1)

        def call(wrapped, x):
            return wrapped(x)

    class Wrapping(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.wrapped = layers.TorchModuleWrapper(module, name="module")

        def call(self, x):
            return call(self.wrapped, x)

    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, Wrapping(name="wrapping")(inputs))
    found = explain.capture(model, X, verbose=0)["module"]
    attention = (module if kind == "attention" else module.self_attn).eval()
    x = torch.tensor(X)
    with torch.no_grad():
        expected = attention(x, x, x, average_attn_weights=False)[1]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert explain.recomposition_error(model, X, verbose=0)["module"] < 1e-5
    assert torch.backends.mha.get_fastpath_enabled()
