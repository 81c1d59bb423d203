"""Whichever way attention is computed, the answer is the same; and scores belong to their call."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

from kerasfactory.layers import InterpretableMultiHeadAttention, _attention

BACKEND = keras.config.backend()
BATCH, QUERIES, KEYS, WIDTH = 2, 10, 7, 6
ATOL = {"float32": 2e-6, "mixed_float16": 4e-3, "mixed_bfloat16": 3e-2}

PADDING = np.arange(KEYS) < np.array([[3], [KEYS]])
SOME = np.random.default_rng(1).random((BATCH, QUERIES, KEYS)) < 0.5
MASKS = {
    "none": {},
    "causal": {"use_causal_mask": True},
    "padded keys": {"key_mask": PADDING},
    "padded keys, causal": {"key_mask": PADDING, "use_causal_mask": True},
    "nothing in view": {"key_mask": np.array([[False] * KEYS, [True] * KEYS])},
    "a mask for each pair": {"attention_mask": SOME & (np.arange(QUERIES) != 4)[:, None]},
    "a mask for all samples": {"attention_mask": SOME[0]},
    "a mask for each head": {"attention_mask": np.stack([SOME, ~SOME], axis=1)},
    "window": {"sliding_window": 3},
    "window, causal, padded": {"sliding_window": 3, "use_causal_mask": True, "key_mask": PADDING},
}
if "sliding_window" not in inspect.signature(keras.layers.MultiHeadAttention).parameters:  # Keras 3.14 has none
    MASKS = {name: mask for name, mask in MASKS.items() if "sliding_window" not in mask}

CAUSAL_IN_KERAS = "use_causal_mask" in inspect.signature(keras.layers.MultiHeadAttention._compute_attention).parameters


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def blockwise(monkeypatch):
    """Attention of every length goes block by block, in blocks that do not divide it."""
    monkeypatch.setattr(_attention, "_BLOCKWISE_FROM", 1)
    monkeypatch.setattr(_attention, "_BLOCK", 4)


@pytest.fixture
def fused(monkeypatch):
    """Keras' fused kernel, as on an accelerator."""
    monkeypatch.setattr(_attention._backend, "on_cpu", lambda tensor: False)


def numbers(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def numpy_scores(layer, query, key, mask):
    """The formula, in float64."""
    kernels = {v.path.rsplit("mha/", 1)[1]: numbers(v) for v in layer.mha.weights}
    project = {n: np.einsum("btf,fhd->bhtd", x, kernels[f"{n}/kernel"]) for n, x in [("query", query), ("key", key)]}
    projected = {n: x + kernels[f"{n}/bias"][:, None] for n, x in project.items()}
    logits = np.einsum("bhtd,bhsd->bhts", projected["query"], projected["key"]) / np.sqrt(layer.d_model)
    allowed = np.ones(logits.shape, bool)
    if "key_mask" in mask:
        allowed &= mask["key_mask"][:, None, None]
    if "attention_mask" in mask:
        given = mask["attention_mask"]
        allowed &= given if given.ndim == 4 else np.broadcast_to(given, (BATCH, QUERIES, KEYS))[:, None]
    distance = np.arange(QUERIES)[:, None] - np.arange(KEYS)
    if "use_causal_mask" in mask:
        allowed &= distance >= 0
    if "sliding_window" in mask:
        allowed &= abs(distance) < mask["sliding_window"]
    logits = np.where(allowed, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True, initial=-1e30))
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("way", ["scores", "default", "fused", "blockwise"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_way_gives_the_same(rng, request, dtype, way, mask):
    if way == "fused" and BACKEND == "jax" and dtype == "mixed_float16":
        dtype = "mixed_bfloat16"  # XLA has no float16 product on CPUs, and so Keras no fused kernel there
    mask = dict(MASKS[mask])
    window = {"sliding_window": mask.pop("sliding_window")} if "sliding_window" in mask else {}
    query = rng.standard_normal((BATCH, QUERIES, WIDTH), dtype="float32")
    key = rng.standard_normal((BATCH, KEYS, WIDTH), dtype="float32")
    layer = InterpretableMultiHeadAttention(4, 2, dropout_rate=0, dtype=dtype, **window)
    expected, scores = layer(query, key, return_attention_scores=True, **mask)
    if way in ("fused", "blockwise"):
        request.getfixturevalue(way)

    output = expected if way == "scores" else layer(query, key, **mask)

    np.testing.assert_allclose(numbers(output), numbers(expected), rtol=0, atol=ATOL[dtype])
    read = numbers(layer.attention_scores)
    np.testing.assert_allclose(read, numbers(scores), rtol=0, atol=1e-7)
    exact = numpy_scores(layer, query, key, mask | window)
    np.testing.assert_allclose(read, exact, rtol=0, atol=ATOL[dtype])
    np.testing.assert_array_equal(read == 0, exact == 0)


@pytest.mark.parametrize("way", ["default", "blockwise"])
def test_large_logits_do_not_overflow_half_precision(rng, request, way):
    query = 100 * rng.standard_normal((BATCH, QUERIES, WIDTH), dtype="float32")
    layer = InterpretableMultiHeadAttention(16, 2, dtype="mixed_float16")
    expected, _scores = layer(query, return_attention_scores=True)
    if way == "blockwise":
        request.getfixturevalue(way)

    output = numbers(layer(query))

    assert np.abs(numbers(layer.mha._query_dense(query))).max() > 60  # 16 products of such are too many
    assert np.isfinite(output).all()
    assert np.isfinite(numbers(layer.attention_scores)).all()
    np.testing.assert_allclose(output, numbers(expected), rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("way", ["scores", "default", "blockwise"])
def test_a_nan_under_the_mask_reaches_the_output_and_not_the_scores(rng, request, way):
    query = rng.standard_normal((1, QUERIES, WIDTH), dtype="float32")
    key = rng.standard_normal((1, KEYS, WIDTH), dtype="float32")
    key[0, 2] = np.nan
    mask = {"key_mask": (np.arange(KEYS) != 2)[None]}
    layer = InterpretableMultiHeadAttention(4, 2)
    if way == "blockwise":
        request.getfixturevalue(way)

    output = layer(query, key, return_attention_scores=way == "scores", **mask)
    output = output[0] if way == "scores" else output

    assert np.isnan(numbers(output)).all()
    scores = numbers(layer.attention_scores)
    assert np.isfinite(scores).all()
    assert (scores[..., 2] == 0).all()


def test_scores_are_those_of_the_call_whatever_becomes_of_the_weights(rng):
    x = rng.standard_normal((BATCH, QUERIES, WIDTH), dtype="float32")
    layer = InterpretableMultiHeadAttention(4, 2)
    _, expected = layer(x, return_attention_scores=True)
    layer(x)
    layer.set_weights([0 * weight for weight in layer.get_weights()])

    np.testing.assert_allclose(numbers(layer.attention_scores), numbers(expected), atol=1e-7)


def test_gradients_are_the_same_with_scores_and_without(rng):
    x = rng.standard_normal((8, QUERIES, WIDTH), dtype="float32")
    y = rng.standard_normal((8, QUERIES, WIDTH), dtype="float32")
    mask = np.arange(QUERIES) < np.arange(1, 9)[:, None] - 1  # one sample is all padding
    weights = []
    for return_scores in (True, False):
        inputs, masked = keras.Input((QUERIES, WIDTH)), keras.Input((QUERIES,), dtype="bool")
        layer = InterpretableMultiHeadAttention(4, 2, 0.0, kernel_initializer=keras.initializers.GlorotUniform(seed=3))
        output = layer(inputs, key_mask=masked, return_attention_scores=return_scores)
        model = keras.Model([inputs, masked], output[0] if return_scores else output)
        model.compile(keras.optimizers.SGD(0.5), "mse")
        model.fit([x, mask], y, epochs=3, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for with_scores, without in zip(*weights, strict=True):
        assert np.isfinite(without).all()
        np.testing.assert_allclose(with_scores, without, atol=1e-5)


def work(model, x):
    """Of a training step: matrix products on TensorFlow, floating-point operations on the other two."""
    if BACKEND == "tensorflow":
        import tensorflow

        step = tensorflow.function(lambda x: model.train_step((x, x)), autograph=False)
        operations = step.get_concrete_function(tensorflow.constant(x)).graph.get_operations()
        return sum(operation.type in ("Einsum", "BatchMatMulV2", "MatMul") for operation in operations)
    if BACKEND == "jax":
        import jax

        def loss(weights):
            state = [v.value for v in model.non_trainable_variables]
            return model.stateless_call(weights, state, x, training=True)[0].sum()

        weights = [v.value for v in model.trainable_variables]
        return jax.jit(jax.grad(loss)).lower(weights).compile().cost_analysis()["flops"]
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model.train_on_batch(x, x)
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [64, 192])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_scores_that_nobody_reads_are_no_work(dropout, length):
    x = np.ones((BATCH, length, 32), "float32")
    # PyTorch does not count what is inside its fused kernel, which is not used for short sequences.
    with_scores = BACKEND == "torch" and length == 64
    done = []
    for attention, arguments in (
        (InterpretableMultiHeadAttention(16, 2, dropout), {}),
        (keras.layers.MultiHeadAttention(2, 16, dropout=dropout), {"return_attention_scores": with_scores}),
    ):
        inputs = keras.Input((length, 32))
        output = attention(inputs, inputs, **arguments)
        model = keras.Model(inputs, output[0] if isinstance(output, tuple) else output)
        model.compile("sgd", "mse", jit_compile=False)
        done.append(work(model, x))
    assert 0 < done[0] <= done[1]


@pytest.mark.parametrize("explicit", [None, SOME[0, :KEYS]])
@pytest.mark.parametrize("return_scores", [False, True])
def test_causal_attention_can_be_asked_for_after_the_masks(rng, explicit, return_scores):
    """Keras 3.15 asks `_compute_attention` itself where no other mask is given; older ones know only the mask."""
    projected = [rng.standard_normal((BATCH, KEYS, 2, 4), dtype="float32") for _ in range(3)]
    query, key, value = map(ops.convert_to_tensor, projected)
    ours, theirs = _attention.Attention(2, 4), keras.layers.MultiHeadAttention(2, 4)
    for layer in (ours, theirs):
        layer.build((BATCH, KEYS, WIDTH), (BATCH, KEYS, WIDTH))
    mask = None if explicit is None else ours._compute_attention_mask(query[..., 0], key, attention_mask=explicit)

    output, scores = ours._compute_attention(query, key, value, mask, False, return_scores, use_causal_mask=True)

    causal = np.tril(np.ones((KEYS, KEYS), bool)) & (True if explicit is None else explicit)
    expected = [theirs._compute_attention(query, key, value, ops.convert_to_tensor(causal[None]), False, True)]
    if CAUSAL_IN_KERAS:
        given = None if explicit is None else ops.convert_to_tensor(explicit[None])
        expected.append(theirs._compute_attention(query, key, value, given, False, True, use_causal_mask=True))
    for expected_output, expected_scores in expected:
        if return_scores or scores is not None:  # a fused kernel has none
            np.testing.assert_allclose(numbers(scores), numbers(expected_scores), atol=2e-6)
        in_view = causal.any(-1)  # of the others, Keras makes a mean
        np.testing.assert_allclose(numbers(output)[:, in_view], numbers(expected_output)[:, in_view], atol=2e-6)


if CAUSAL_IN_KERAS:

    def test_causal_attention_over_several_axes_is_that_of_keras(rng):
        shape = (BATCH, 3, 3, 2, 4)
        query, key, value = (ops.convert_to_tensor(rng.standard_normal(shape, dtype="float32")) for _ in range(3))
        results = []
        for attention in (_attention.Attention, keras.layers.MultiHeadAttention):
            layer = attention(2, 4, attention_axes=(2,))
            layer.build((BATCH, 3, 3, WIDTH), (BATCH, 3, 3, WIDTH))
            results.append(layer._compute_attention(query, key, value, None, False, True, use_causal_mask=True))
        for ours, theirs in zip(*results, strict=True):
            np.testing.assert_allclose(numbers(ours), numbers(theirs), atol=1e-7)
        assert np.abs(np.triu(numbers(results[0][1]), 1)).max() == 0
