"""What `capture` and `summarize` return of attention that is not Keras' own: sinks, names, stores, half precision."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from kerasfactory import explain

BACKEND = keras.config.backend()
LENGTH, HEADS, SIZE = 6, 4, 4
X = np.random.default_rng(0).normal(size=(7, LENGTH, HEADS * SIZE)).astype("float32")
MASK = np.random.default_rng(1).random((LENGTH, LENGTH)) < 0.6
MASK[2] = False  # a query without a key


class Attends(layers.Layer):
    """Attention without weights of its own: `way(query, key, value)`, each (batch, position, head, size)."""

    def __init__(self, way, factor=1.0, before=None, **kwargs):
        super().__init__(**kwargs)
        self.way, self.factor, self.before = way, factor, before

    def call(self, x):
        if self.before is not None:
            self.before()
        split = ops.reshape(x, (-1, x.shape[1], HEADS, SIZE))
        return ops.reshape(self.way(split * self.factor, split, split), (-1, *x.shape[1:]))


def sink(query, key, value):
    logits = ops.einsum("bqhd,bkhd->bhqk", query, key)
    logits = ops.concatenate([logits, 0.5 * ops.ones_like(logits[..., :1])], axis=-1)
    return ops.einsum("bhqk,bkhd->bqhd", ops.softmax(logits)[..., :-1], value)


def masked_sink(query, key, value):
    logits = ops.where(MASK, ops.einsum("bqhd,bkhd->bhqk", query, key), -1e9)
    logits = ops.concatenate([logits, 0.5 * ops.ones_like(logits[..., :1])], axis=-1)
    return ops.einsum("bhqk,bkhd->bqhd", ops.softmax(logits)[..., :-1], value)


def sink_that_stays(query, key, value):
    key, value = (ops.concatenate([x, ops.zeros_like(x[:, :1])], axis=1) for x in (key, value))
    return ops.einsum("bhqk,bkhd->bqhd", ops.softmax(ops.einsum("bqhd,bkhd->bhqk", query, key)), value)


def by_one(query, key, value):
    """Softmax-off-by-one, with the exponentials written out."""
    exponentials = ops.exp(ops.einsum("bqhd,bkhd->bhqk", query, key))
    return ops.einsum("bhqk,bkhd->bqhd", exponentials / (1 + ops.sum(exponentials, -1, keepdims=True)), value)


def formed(query, key, value):
    return ops.einsum("bhqk,bkhd->bqhd", ops.softmax(ops.einsum("bqhd,bkhd->bhqk", query, key) / 2), value)


def windows(query, key, value):
    """Two windows of the sequence, on an axis of their own."""
    query, key, value = (ops.reshape(x, (-1, 2, x.shape[1] // 2, HEADS, SIZE)) for x in (query, key, value))
    weights = ops.softmax(ops.einsum("bwqhd,bwkhd->bwhqk", query, key) / 2)
    return ops.einsum("bwhqk,bwkhd->bwqhd", weights, value)


def two_softmaxes(query, key, value):
    """Both are taken before the values are met, in the other order."""
    first = ops.softmax(ops.einsum("bqhd,bkhd->bhqk", query, key) / 2)
    second = ops.softmax(-ops.einsum("bqhd,bkhd->bhqk", query, key) / 2)
    return ops.einsum("bhqk,bkhd->bqhd", second, value) - ops.einsum("bhqk,bkhd->bqhd", first, value)


def fused(query, key, value, **options):
    return ops.dot_product_attention(query, key, value, **options)


def causal(query, key, value):
    return fused(query, key, value, is_causal=True, scale=1.5)


def masked(query, key, value):
    return fused(query, key, value, mask=ops.convert_to_tensor(MASK[None, None]), flash_attention=False)


def masked_and_causal(query, key, value):
    return fused(query, key, value, mask=ops.convert_to_tensor(MASK[None, None]), is_causal=True)


def masked_by_head(query, key, value):
    heads = np.arange(HEADS * LENGTH * LENGTH).reshape(1, HEADS, LENGTH, LENGTH) % 3 > 0
    return fused(query, key, value, mask=ops.convert_to_tensor(heads))


def grouped(query, key, value):
    return fused(query, key[:, :, ::2], value[:, :, ::2])


def cross(query, key, value):
    return fused(query[:, :4], key, value)


def biased(query, key, value):
    return fused(query, key, value, bias=ops.reshape(ops.arange(LENGTH, dtype=query.dtype), (1, 1, 1, LENGTH)))


FUSED = {
    way.__name__: way for way in (fused, causal, masked, masked_and_causal, masked_by_head, grouped, cross, biased)
}


class Crosses(Attends):
    """The first four positions alone ask."""

    def call(self, x):
        split = ops.reshape(x, (-1, x.shape[1], HEADS, SIZE))
        return ops.reshape(self.way(split, split, split), (-1, 4, HEADS * SIZE))


def model_of(way, length=LENGTH, kind=Attends, **options):
    inputs = keras.Input((length, HEADS * SIZE))
    attended = kind(way, name="attends", **options)(inputs)
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(attended))


def logits_of(x=X):
    split = x.reshape(len(x), -1, HEADS, SIZE).astype("float64")
    return np.einsum("bqhd,bkhd->bhqk", split, split)


def softmax(logits, sink=0.0):
    exponentials = np.exp(logits)
    return exponentials / (exponentials.sum(axis=-1, keepdims=True) + sink)


# Sinks.


@pytest.mark.parametrize("way", [sink, masked_sink])
def test_what_went_to_the_sink_is_a_coordinate(way, tmp_path):
    logits = np.where(MASK, logits_of(), -np.inf) if way is masked_sink else logits_of()
    expected = softmax(logits, sink=np.exp(0.5))
    model = model_of(way)
    scores = explain.capture(model, X, batch_size=3, verbose=0)["attends"]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores["sink"].dims == ("sample", "head", "query")
    assert scores["sink"].dtype == "float32"
    np.testing.assert_allclose(scores["sink"], 1 - expected.sum(axis=-1), atol=1e-6)
    if way is masked_sink:  # a query without a key leaves all to the sink
        np.testing.assert_array_equal(scores["sink"][:, :, 2], 1)
    for _ in range(2):  # written, and opened again
        stored = explain.capture(model, X, batch_size=3, store=tmp_path / "scores.zarr", verbose=0)["attends"]
        assert stored.identical(scores)
    summary = explain.summarize(model, X, verbose=0)["attends"]
    np.testing.assert_allclose(summary["sink"], scores["sink"], atol=1e-6)
    np.testing.assert_allclose(
        summary["received"].sum("key"), expected.sum(-1).sum(-1) / expected.any(-1).sum(-1), atol=1e-5
    )


def test_a_sink_in_half_precision_has_a_weight_from_0_to_1():
    for dtype in ("float16", "bfloat16", "mixed_float16"):
        scores = explain.capture(model_of(sink, dtype=dtype), X, verbose=0)["attends"]
        assert scores.dtype == scores["sink"].dtype == "float32"
        np.testing.assert_allclose(scores["sink"], 1 - softmax(logits_of(), np.exp(0.5)).sum(-1), atol=0.02)
        assert scores["sink"].min() >= 0 and scores["sink"].max() <= 1


def test_what_has_no_sink_has_no_such_coordinate():
    assert "sink" not in explain.capture(model_of(fused), X, verbose=0)["attends"].coords
    stays = explain.capture(model_of(sink_that_stays), X, verbose=0)["attends"]  # it is a key like others
    assert stays.sizes["key"] == LENGTH + 1
    np.testing.assert_allclose(stays.sum("key"), 1, atol=1e-5)


class OffByOneAttention(Attends):
    pass


def test_a_softmax_that_is_not_seen_is_named():
    with pytest.raises(ValueError, match="attends: it is a `OffByOneAttention`: no softmax over keys was seen in it"):
        explain.capture(model_of(by_one, kind=OffByOneAttention), X, verbose=0)
