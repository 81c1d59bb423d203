"""`summarize` against the full matrix that `capture` gives."""

import concurrent.futures
import inspect
import tracemalloc
import warnings

import keras
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops

from kerasfactory import explain
from kerasfactory.explain import _summary
from kerasfactory.explain._engine import store as _store
from kerasfactory.explain._engine.data import batch_size_of
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

BACKEND = keras.config.backend()
RNG = np.random.default_rng(3)
SEQUENCE = RNG.normal(size=(5, 11, 8)).astype("float32")
WORDS = np.where(np.arange(11) < [[11], [7], [2], [1], [0]], RNG.integers(1, 9, size=(5, 11)), 0)
HAS_WINDOW = "sliding_window" in inspect.signature(layers.MultiHeadAttention).parameters


@pytest.fixture(autouse=True)
def float32_afterward():
    yield
    keras.config.set_dtype_policy("float32")


def outputs_of(inputs, x):
    return keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(x)))


def self_attention(attention=None, **arguments):
    inputs = keras.Input((None, 8))
    attention = attention or layers.MultiHeadAttention(2, 4, name="attention")
    return outputs_of(inputs, attention(inputs, inputs, **arguments))


def everything(model):
    """All that observation must leave as it is."""
    return {
        "attributes": [{name: id(value) for name, value in vars(layer).items()} for layer in model._flatten_layers()],
        "losses": [[id(loss) for loss in layer._losses] for layer in model._flatten_layers()],
        "variables": [(id(v), ops.convert_to_numpy(v.value).tobytes()) for v in model.variables],
        "modes": [module.training for module in model.modules()] if BACKEND == "torch" else None,
    }


def check(summary, full, rounding=2e-6):
    """The summary of scores, computed of all of them at once."""
    p = full.values.astype("float64")
    queries, keys = p.shape[2:]
    looks = p.any(axis=-1)
    np.testing.assert_allclose(p.sum(-1)[looks], 1, atol=1e-5 + rounding)
    size = np.log(keys + 1)
    np.testing.assert_allclose(
        summary["entropy"], -(p * np.log(np.where(p > 0, p, 1))).sum(-1), atol=10 * size * rounding
    )
    distance = np.abs(np.arange(queries)[:, None] - np.arange(keys))
    np.testing.assert_allclose(summary["distance"], (p * distance).sum(-1), atol=max(queries, keys) * rounding)
    counts = np.maximum(looks.sum(-1), 1)
    np.testing.assert_allclose(summary["received"], p.sum(-2) / counts[..., None], atol=rounding)

    top_key, top_weight = summary["top_key"].values, summary["top_weight"].values
    k = top_key.shape[-1]
    np.testing.assert_allclose(top_weight, -np.sort(-p, axis=-1)[..., :k], atol=rounding)
    found = np.where(top_key < 0, 0, np.take_along_axis(p, np.maximum(top_key, 0), axis=-1))
    np.testing.assert_allclose(top_weight, found, atol=rounding)
    assert (np.diff(top_weight, axis=-1) <= 0).all()
    for row in top_key.reshape(-1, k):
        assert len(set(row[row >= 0])) == (row >= 0).sum()
    assert ((top_key >= 0).any(-1) == looks).all()

    edges = [np.append(summary[f"{kind}_bin"], summary[f"{kind}_bin_end"][-1]) for kind in ("query", "key")]
    for number, (start, stop) in enumerate(zip(edges[0], edges[0][1:], strict=False)):
        mean = p[:, :, start:stop].sum(2) / np.maximum(looks[:, :, start:stop].sum(2), 1)[..., None]
        binned = np.add.reduceat(mean, edges[1][:-1], axis=-1)
        np.testing.assert_allclose(summary["map"][:, :, number], binned, atol=rounding)
    if "row" in summary:
        np.testing.assert_allclose(summary["row"], p[:, :, summary["position"].values], atol=rounding)


def fused():
    """A dropout of 0 makes Keras use its fused kernel; but JAX has none for half precision on a CPU."""
    return 0.1 if BACKEND == "jax" and keras.config.dtype_policy().compute_dtype != "float32" else 0.0


@st.composite
def cases(draw):
    queries, keys = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    batch = draw(st.integers(1, 3))
    return {
        "shape": (batch, queries, keys),
        "heads": draw(st.integers(1, 3)),
        "layer": draw(st.sampled_from(["keras", "dropout", "ours", "grouped"])),
        "dtype": draw(st.sampled_from(["float32", "float32", "mixed_bfloat16"])),
        "scale": draw(st.sampled_from([0, 1, 1, 1e2])),  # the last makes logits of 1e4
        "padding": draw(st.booleans()),
        "explicit": draw(st.sampled_from([None, None, 3, 4])),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, None, 1, 5])) if HAS_WINDOW else None,
        "top_k": draw(st.integers(1, 20)),
        "map_size": draw(st.integers(1, 50)),
        "block": draw(st.sampled_from([1, 64, 500, 2**20])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


# Keras, of queries with one key, and of the parts of grouped attention that get a query with a mask.
@pytest.mark.filterwarnings("ignore:You are using a softmax over axis:UserWarning")
@pytest.mark.filterwarnings("ignore:Layer 'query' .* does not support masking:UserWarning")
@given(cases())
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_it_says_what_the_full_matrix_says(case):
    rng = np.random.default_rng(case["seed"])
    batch, queries, keys = case["shape"]
    keras.config.set_dtype_policy(case["dtype"])
    x = [rng.normal(size=(batch, length, 8)).astype("float32") for length in (queries, keys)]
    window = {"sliding_window": case["window"]} if case["window"] else {}
    heads = case["heads"]
    if case["layer"] == "grouped":
        layer = layers.GroupQueryAttention(4, 2 * heads, 2, name="attention", **window)
        heads *= 2
    elif case["layer"] == "ours":
        layer = InterpretableMultiHeadAttention(4, heads, name="attention", **window)
    elif case["layer"] == "keras":
        layer = layers.MultiHeadAttention(heads, 4, dropout=fused(), name="attention", **window)
    else:  # not fused, for which JAX wants values as wide as keys
        layer = layers.MultiHeadAttention(heads, 4, value_dim=3, dropout=0.1, name="attention", **window)

    inputs = [keras.Input((queries, 8)), keras.Input((keys, 8))]
    query, arguments = inputs[0], {"use_causal_mask": case["causal"]}
    if case["padding"]:
        x[0][rng.random((batch, queries)) < 0.3] = 0
        query = layers.Masking()(query)
        inputs.append(keras.Input((keys,), dtype="bool"))
        x.append(rng.random((batch, keys)) < 0.7)
        arguments["value_mask"] = inputs[-1]
    if case["explicit"]:
        # Of a mask for each head, Keras sets the heads against the samples of other masks.
        shape = (heads, queries, keys) if case["explicit"] == 4 and not case["padding"] else (queries, keys)
        inputs.append(keras.Input(shape, dtype="bool"))
        x.append(rng.random((batch, *shape)) < 0.5)
        arguments["attention_mask"] = inputs[-1]
    model = keras.Model(inputs, layer(query, inputs[1], **arguments))
    scaled = [weight * (case["scale"] if weight.ndim > 1 else 1) for weight in model.get_weights()]
    model.set_weights(scaled)

    full = explain.capture(model, x, verbose=0)
    rows = sorted({0, queries // 2, queries - 1})
    before = _summary._BLOCK
    _summary._BLOCK = case["block"]
    with warnings.catch_warnings():
        if case["scale"] > 1:  # in logits of 1e4, rounding alone makes a difference that it warns of
            warnings.filterwarnings("ignore", "The output of layer 'attention' differs from softmax attention")
        try:
            summary = explain.summarize(
                model, x, top_k=case["top_k"], map_size=case["map_size"], rows=rows, batch_size=2, verbose=0
            )
        finally:
            _summary._BLOCK = before

    assert list(summary) == list(full)
    (name,) = full
    assert summary[name].attrs == full[name].attrs | {
        "prediction_difference": summary[name].attrs["prediction_difference"]
    }
    logits = 10 * case["scale"] ** 2 if case["scale"] > 1 else 1
    half = case["dtype"] != "float32"
    if not half:
        assert summary[name].attrs["prediction_difference"] <= 1e-6 * logits
        check(summary[name], full[name], 2e-6 * logits)
    elif case["scale"] <= 1:
        check(summary[name], full[name], 2e-2)


def nested():
    inputs = keras.Input((5,))
    encoder = keras.Sequential([keras.Input((5,)), FeatureTokenizer(8, feature_names=list("abcde"))], name="encoder")
    inner = keras.Input((5, 8))
    decoder = keras.Model(inner, InterpretableMultiHeadAttention(4, 2, name="attention")(inner), name="decoder")
    return outputs_of(inputs, decoder(encoder(inputs)))


def called_twice():
    inputs = keras.Input((11, 8))
    attention = layers.MultiHeadAttention(2, 4, dropout=0.1, name="attention")
    return outputs_of(inputs, attention(attention(inputs, inputs), inputs))


def padded():
    inputs = keras.Input((11,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(inputs)
    x = layers.MultiHeadAttention(2, 4, name="first")(x, x)
    return outputs_of(inputs, layers.MultiHeadAttention(2, 4, name="second")(x, x, use_causal_mask=True))


def gated():
    return self_attention(layers.MultiHeadAttention(2, 4, use_gate=True, name="attention"))


def folded():
    inputs = keras.Input((8, 8))
    windows = layers.Lambda(lambda x: ops.reshape(x, (-1, 4, 8)), output_shape=(4, 8))(inputs)
    attended = layers.MultiHeadAttention(2, 4, name="attention")(windows, windows)
    return keras.Model(inputs, layers.Lambda(lambda x: ops.reshape(x, (-1, 8, 8)), output_shape=(8, 8))(attended))


class Scaled(layers.MultiHeadAttention):
    """A subclass that computes scores in its own way."""

    def _compute_attention(self, query, key, value, attention_mask=None, training=None, *args, **kwargs):
        return super()._compute_attention(query * 3, key, value, attention_mask, training, True)


class Sharp(layers.MultiHeadAttention):
    """A subclass that has its own softmax."""

    def _masked_softmax(self, attention_scores, attention_mask=None):
        return super()._masked_softmax(attention_scores * 5, attention_mask)


class NextOnly(layers.MultiHeadAttention):
    """A subclass that has its own mask."""

    def _compute_attention_mask(self, query, value, **kwargs):
        return ops.eye(query.shape[1], k=1, dtype="bool")[None]


MODELS = {
    nested: RNG.normal(size=(5, 5)).astype("float32"),
    called_twice: SEQUENCE,
    padded: WORDS,
    gated: SEQUENCE,
    folded: SEQUENCE[:, :8],
    lambda: self_attention(layers.MultiHeadAttention(2, 4, dropout=0.1), use_causal_mask=True): SEQUENCE,
    lambda: self_attention(InterpretableMultiHeadAttention(4, 2), use_causal_mask=True): SEQUENCE,
    lambda: self_attention(Scaled(2, 4, name="attention")): SEQUENCE,
    lambda: self_attention(Scaled(2, 4, name="attention"), use_causal_mask=True): SEQUENCE,
    lambda: self_attention(Sharp(2, 4, dropout=0.1, name="attention")): SEQUENCE,
    lambda: self_attention(NextOnly(2, 4, dropout=0.1, name="attention")): SEQUENCE,
}


@pytest.mark.filterwarnings("error::UserWarning:kerasfactory")
@pytest.mark.parametrize("build", MODELS)
def test_every_model_is_summarized_and_left_as_it_was(build, monkeypatch):
    x, model = MODELS[build], build()
    model(x)
    full, predicted, before = explain.capture(model, x, verbose=0), model.predict(x, verbose=0), everything(model)
    monkeypatch.setattr(_summary, "_BLOCK", 50)

    summary = explain.summarize(model, x, batch_size=2, top_k=3, verbose=0)

    assert everything(model) == before
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)
    assert list(summary) == list(full)
    for name in full:
        check(summary[name], full[name])
        assert summary[name]["entropy"].dims == full[name].dims[:3]
        for dim in full[name].coords:
            np.testing.assert_array_equal(summary[name][dim], full[name][dim])


@pytest.mark.parametrize("store", [None, "summary.zarr"])
def test_no_matrix_is_formed(monkeypatch, tmp_path, store):
    length = 8192  # long beside what the blocks take, 16 MB, which does not grow with it
    inputs = keras.Input((length, 8))
    first = layers.MultiHeadAttention(1, 4, dropout=0.1, name="first")(inputs, inputs, use_causal_mask=True)
    mask = inputs[..., 0] > 0
    second = layers.MultiHeadAttention(1, 4, name="second")(first, first, value_mask=mask)
    model = outputs_of(inputs, InterpretableMultiHeadAttention(4, 1, name="third")(second, key_mask=mask))
    x = np.random.default_rng(0).normal(size=(1, length, 8)).astype("float32")

    def forbidden(*args, **kwargs):
        raise AssertionError("a mask as large as the scores")

    monkeypatch.setattr(layers.MultiHeadAttention, "_compute_causal_mask", forbidden)
    forbidden.__module__ = "keras.src.layers.attention.multi_head_attention"
    asked = []
    softmax = layers.Softmax.call
    monkeypatch.setattr(layers.Softmax, "call", lambda *a, **k: asked.append(a[1].shape) or softmax(*a, **k))
    tracemalloc.start()
    summary = explain.summarize(model, x, layers="second", verbose=0, store=store and tmp_path / store)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert list(summary) == ["second"]
    assert peak < length**2  # bytes: a quarter of the scores, and no more than a mask
    assert all(np.prod(shape) <= 64 * length for shape in asked)


@pytest.mark.backend_independent
def test_the_samples_in_a_batch_become_fewer_as_they_become_longer():
    tables = [((5, 8), 1024), ((5, 30), 546), ((5, 0), 1024), ((5,), 1024)]
    sequences = [((9, 30, 8), 546), ((9, 256, 8), 64), ((9, 512, 8), 16), ((9, 4096, 8), 1)]
    sizes = [*tables, *sequences, ((9, 128, 128, 3), 32)]  # of pictures a model makes patches
    assert [batch_size_of(np.empty(shape, "bool")) for shape, _ in sizes] == [size for _, size in sizes]
    assert batch_size_of({"table": np.empty((3, 16384)), "label": np.empty(3)}) == 1
    assert batch_size_of(np.array(["some words", "and more"])) == 32
    assert batch_size_of(iter([SEQUENCE])) is None


def test_data_in_batches_of_their_own():
    model = self_attention()
    expected = explain.summarize(model, SEQUENCE, verbose=0)["attention"]
    summary = explain.summarize(model, (SEQUENCE[start : start + 2] for start in range(0, 5, 2)), verbose=0)
    for name in expected:
        np.testing.assert_allclose(summary["attention"][name], expected[name], atol=1e-5)


@pytest.mark.filterwarnings("error::UserWarning:kerasfactory")
@pytest.mark.parametrize("build", [called_twice, padded, nested, folded])
def test_what_is_stored_is_what_is_summarized_in_memory(build, tmp_path, monkeypatch):
    monkeypatch.setattr(_store, "_WRITTEN_AT_ONCE", 1)
    x, model = MODELS[build], build()
    arguments = {"batch_size": 2, "top_k": 3, "map_size": 4, "rows": [3, 0], "verbose": 0}
    expected = explain.summarize(model, x, **arguments)

    class Killed(BaseException):
        pass

    write, left = _store.Store._write, iter(range(2))

    def killed_at_the_third(self):
        if next(left, None) is None:
            raise Killed
        return write(self)

    with monkeypatch.context() as patch:
        patch.setattr(_store.Store, "_write", killed_at_the_third)
        with pytest.raises(Killed):
            explain.summarize(model, x, store=tmp_path / "summary.zarr", **arguments)
    for _ in range(2):  # continued; complete
        stored = explain.summarize(model, x, store=tmp_path / "summary.zarr", **arguments)
        assert list(stored) == list(expected)
        for name in expected:
            xr.testing.assert_identical(stored[name].compute(), expected[name])
    with pytest.raises(ValueError, match="belongs to another call, which differs in: top_k"):
        explain.summarize(model, x, store=tmp_path / "summary.zarr", **arguments | {"top_k": 2})
    with pytest.raises(ValueError, match="belongs to another call, which differs in: function"):
        explain.capture(model, x, batch_size=2, verbose=0, store=tmp_path / "summary.zarr")


def test_keys_whose_weights_underflow_are_in_order():
    model = self_attention(layers.MultiHeadAttention(1, 8, use_bias=False, name="attention"))
    model(SEQUENCE)
    eye = np.eye(8).reshape(8, 1, 8)
    model.set_weights([eye, eye, eye, eye.reshape(1, 8, 8), *model.get_weights()[4:]])
    x = np.zeros((1, 6, 8), "float32")
    x[0, :, 0] = [1, 2, 3, 4, 5, 6]
    summary = explain.summarize(model, x * 100, verbose=0)["attention"]
    assert (summary["top_key"].values == [5, 4, 3, 2, 1, 0]).all()
    assert (summary["top_weight"].values == [1, 0, 0, 0, 0, 0]).all()


def test_scores_that_the_model_asks_for_stay_the_models():
    inputs = keras.Input((11, 8))
    output, scores = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs, return_attention_scores=True)
    model = outputs_of(inputs, layers.Flatten()(scores)[:, :8, None] + output[:, :8])
    check(
        explain.summarize(model, SEQUENCE, verbose=0)["attention"],
        explain.capture(model, SEQUENCE, verbose=0)["attention"],
    )


def test_two_threads_at_once():
    model = called_twice()
    model(SEQUENCE)
    expected = explain.capture(model, SEQUENCE, verbose=0)
    predicted, before = model.predict(SEQUENCE, verbose=0), everything(model)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        summaries = [pool.submit(explain.summarize, model, SEQUENCE, batch_size=1, verbose=0) for _ in range(2)]
        plain = [pool.submit(lambda: ops.convert_to_numpy(model(SEQUENCE))) for _ in range(5)]
    for future in summaries:
        for name, summary in future.result().items():
            check(summary, expected[name])
    for future in plain:
        np.testing.assert_allclose(future.result(), predicted, atol=1e-5)
    assert everything(model) == before


def test_nan_inputs_are_told():
    x = SEQUENCE.copy()
    x[[2, 4], 3] = np.nan
    with pytest.warns(UserWarning, match="NaN in 2 of 5 samples, the first of them number 2") as warned:
        summary = explain.summarize(self_attention(), x, batch_size=2, verbose=0)["attention"]
    assert warned[0].filename == __file__
    np.testing.assert_array_equal(np.isnan(summary["entropy"]).any(["head", "query"]), np.isnan(x).any(axis=(1, 2)))


def test_a_layer_that_does_something_else_is_told():
    model = self_attention()
    model(SEQUENCE)
    softmax = model.get_layer("attention")._softmax
    softmax.call = lambda inputs, mask=None: ops.sigmoid(inputs)
    model.get_layer("attention")._dropout = 0.1  # not fused
    with pytest.warns(UserWarning, match="'attention' differs from softmax attention") as warned:
        explain.summarize(model, SEQUENCE, verbose=0)
    assert warned[0].filename == __file__


def two_axes():
    inputs = keras.Input((3, 4, 8))
    return keras.Model(inputs, layers.MultiHeadAttention(2, 4, attention_axes=(1, 2), name="attention")(inputs, inputs))


def one_axis_of_two():
    inputs = keras.Input((3, 4, 8))
    return keras.Model(inputs, layers.MultiHeadAttention(2, 4, attention_axes=1, name="attention")(inputs, inputs))


IMAGE = RNG.normal(size=(2, 3, 4, 8)).astype("float32")


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (self_attention, {"top_k": 0}, "`top_k` must be a positive integer. Received: top_k=0"),
        (self_attention, {"map_size": 2.5}, "`map_size` must be a positive integer. Received: map_size=2.5"),
        (self_attention, {"rows": []}, r"`rows` must be a list of positions.*Received: rows=\[\]"),
        (self_attention, {"rows": [-1]}, r"counted from 0. Received: rows=\[-1\]"),
        (self_attention, {"rows": 3}, "Received: rows=3"),
        (self_attention, {"rows": [0, 11]}, r"has 11 queries: 0 to 10.*Received: rows=\[0, 11\]"),
        (self_attention, {"feature_names": ["a", "b"]}, "'attention' attends over 11 keys.* Received 2 names"),
        (self_attention, {"layers": "atention"}, "Did you mean 'attention'?"),
        (self_attention, {"x": SEQUENCE[:0]}, "`x` is empty"),
        (self_attention, {"x": None}, "`x` must be an array"),
        (self_attention, {"x": iter([SEQUENCE, SEQUENCE[:, :5]])}, "differ in length"),
        (two_axes, {"x": IMAGE}, r"over several axes.*but `capture` can.*Received: attention_axes=\(1, 2\)"),
        (one_axis_of_two, {"x": IMAGE}, r"beside the one it attends over.*Received: attention_axes=\(1,\)"),
        (lambda: layers.Dense(2), {}, "`model` must be a keras.Model"),
    ],
)
def test_errors_tell_the_way_out(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        explain.summarize(**{"model": build(), "x": SEQUENCE, "verbose": 0} | arguments)
