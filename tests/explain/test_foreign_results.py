"""What `capture` and `summarize` return of attention that is not Keras' own: sinks, names, stores, half precision."""

import concurrent.futures
import threading
import tracemalloc

import keras
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from keras import layers, ops

from kerasfactory import _backend, explain
from kerasfactory.explain._engine import foreign
from kerasfactory.explain._engine import store as stores

BACKEND = keras.config.backend()
LENGTH, HEADS, SIZE = 6, 4, 4
X = np.random.default_rng(0).normal(size=(7, LENGTH, HEADS * SIZE)).astype("float32")
MASK = np.random.default_rng(1).random((LENGTH, LENGTH)) < 0.6
MASK[2] = False  # a query without a key


class Attends(layers.Layer):
    """Attention without weights of its own: `way(query, key, value)`, each (batch, position, head, size)."""

    def __init__(self, way, **kwargs):
        super().__init__(**kwargs)
        self.way, self.before = way, None

    def call(self, x):
        if self.before is not None:
            self.before()
        split = ops.reshape(x, (-1, x.shape[1], HEADS, SIZE))
        return ops.reshape(self.way(split, split, split), (-1, *x.shape[1:]))

    def compute_output_shape(self, shape):
        return shape


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


FUSED = {way.__name__: way for way in (fused, causal, masked, masked_and_causal, masked_by_head, grouped)}


class Crosses(Attends):
    """The first four positions alone ask."""

    def call(self, x):
        split = ops.reshape(x, (-1, x.shape[1], HEADS, SIZE))
        return ops.reshape(self.way(split, split, split), (-1, 4, HEADS * SIZE))

    def compute_output_shape(self, shape):
        return (shape[0], 4, shape[2])


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
    to_keys = expected.sum((-2, -1)) / expected.any(axis=-1).sum(axis=-1)
    np.testing.assert_allclose(summary["received"].sum("key"), to_keys, atol=1e-5)


def test_a_sink_in_half_precision_has_a_weight_from_0_to_1():
    for dtype in ("float16", "bfloat16", "mixed_float16"):
        scores = explain.capture(model_of(sink, dtype=dtype), X, verbose=0)["attends"]
        assert scores.dtype == scores["sink"].dtype == "float32"
        np.testing.assert_allclose(scores["sink"], 1 - softmax(logits_of(), np.exp(0.5)).sum(-1), atol=0.02)
        assert scores["sink"].min() >= 0
        assert scores["sink"].max() <= 1


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


# Summaries.


def in_numpy(scores):
    """Entropy, received and distance of the scores of `capture`, in double precision."""
    weights = scores.values.astype("float64")
    attends = weights.any(axis=-1)
    logs = np.log(np.where(weights > 0, weights, 1))
    distances = np.abs(np.arange(weights.shape[-2])[:, None] - np.arange(weights.shape[-1]))
    received = weights.sum(axis=-2) / np.maximum(attends.sum(axis=-1), 1)[..., None]
    return {
        "entropy": -(weights * logs).sum(axis=-1),
        "received": received,
        "distance": (weights * distances).sum(axis=-1),
        "map": weights,
        "row": weights[..., [2], :],
        "top_weight": -np.sort(-weights, axis=-1),
    }


def assert_summarizes(summary, scores):
    for name, expected in in_numpy(scores).items():
        np.testing.assert_allclose(summary[name], expected, atol=3e-6, err_msg=name)
    for name in ("layer", "class", "masks", "read_from"):
        assert summary.attrs[name] == scores.attrs[name]


@pytest.fixture
def forms_no_scores(monkeypatch):
    """The function that computes the scores again must not be called."""

    def formed(sight):
        raise AssertionError("scores were formed")

    fused = foreign._fused
    monkeypatch.setattr(foreign, "_fused", lambda *args: fused(*args)._replace(scores=lambda: formed(args)))


@pytest.mark.parametrize("way", FUSED)
def test_summaries_of_fused_attention_are_those_of_its_scores(way, request):
    model = model_of(FUSED[way])
    scores = explain.capture(model, X, verbose=0)["attends"]
    request.getfixturevalue("forms_no_scores")
    summary = explain.summarize(model, X, rows=[2], batch_size=3, verbose=0)["attends"]
    assert_summarizes(summary, scores)
    assert scores.attrs["read_from"] == "dot_product_attention"
    assert 0 < summary.attrs["prediction_difference"] < 1e-5
    if way == "masked":
        assert not scores[:, :, 2].any()
        assert (summary["top_key"][:, :, 2] == -1).all()


@pytest.mark.parametrize("way", [formed, masked_sink, biased])
def test_summaries_of_what_is_formed_are_those_of_its_scores(way):
    model = model_of(way)
    scores = explain.capture(model, X, verbose=0)["attends"]
    assert_summarizes(explain.summarize(model, X, rows=[2], verbose=0)["attends"], scores)


def test_other_lengths_and_axes_are_summarized_too():
    crossed = model_of(cross, kind=Crosses)
    assert_summarizes(
        explain.summarize(crossed, X, rows=[2], verbose=0)["attends"], explain.capture(crossed, X, verbose=0)["attends"]
    )
    split = model_of(windows)
    scores = explain.capture(split, X, verbose=0)["attends"]
    summary = explain.summarize(split, X, rows=[2], feature_names=["a", "b", "c"], verbose=0)["attends"]
    assert scores.dims == ("sample", "axis_2", "axis_3", "head", "query", "key")
    assert summary["map"].dims == ("sample", "axis_2", "axis_3", "head", "query_bin", "key_bin")
    assert_summarizes(summary, scores)
    assert list(summary["received"]["key"].values) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="Layer 'attends' has 3 queries: 0 to 2"):
        explain.summarize(split, X, rows=[3], verbose=0)


def test_of_layers_that_are_not_asked_for_no_scores_are_formed_either(forms_no_scores):
    inputs = keras.Input((LENGTH, HEADS * SIZE))
    x = Attends(fused, name="first")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="of_keras")(x, x)
    inner = keras.Sequential([keras.Input((LENGTH, HEADS * SIZE)), Attends(causal, name="first")], name="inner")
    model = keras.Model(inputs, inner(x))
    assert list(explain.summarize(model, X, verbose=0)) == ["first", "of_keras", "inner/first"]
    assert list(explain.summarize(model, X, layers="inner/first", verbose=0)) == ["inner/first"]
    assert list(explain.summarize(model, X, layers=["first"], verbose=0)) == ["first", "inner/first"]


def test_a_long_sequence_is_summarized_in_little_memory(forms_no_scores):
    length = 4096  # one matrix of scores would be 64 MiB, those of all heads 256 MiB
    x = np.random.default_rng(0).normal(size=(1, length, HEADS * SIZE)).astype("float32")
    model = model_of(causal, length)
    tracemalloc.start()
    try:
        explain.summarize(model, x, top_k=2, map_size=8, verbose=0)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_bfloat16"])
def test_summaries_in_half_precision(dtype):
    # JAX multiplies no float16 on a CPU in its fused function.
    model = model_of(formed if dtype == "float16" and BACKEND == "jax" else causal, dtype=dtype)
    scores = explain.capture(model, X, verbose=0)["attends"]
    summary = explain.summarize(model, X, rows=[2], verbose=0)["attends"]
    np.testing.assert_allclose(summary["map"], scores, atol=0.02)


# With everything else that there is.


def two_layers(first=fused, second=formed):
    inputs = keras.Input((LENGTH, HEADS * SIZE))
    inner = keras.Sequential([keras.Input((LENGTH, HEADS * SIZE)), Attends(second, name="deep")], name="inner")
    x = inner(Attends(first, name="first")(layers.Dense(HEADS * SIZE, name="dense")(inputs)))
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(x))


def test_layers_are_chosen_by_name_path_and_end_of_path():
    model = two_layers()
    outer = keras.Sequential([keras.Input((LENGTH, HEADS * SIZE)), model], name="outer")
    all_of_them = explain.capture(outer, X, verbose=0)
    assert list(all_of_them) == ["first", "deep"]
    for entry in ("deep", f"{model.name}/inner/deep", "inner/deep", ["deep"]):
        found = explain.capture(outer, X, layers=entry, verbose=0)
        assert list(found) == ["deep"]
        np.testing.assert_array_equal(found["deep"], all_of_them["deep"])
        assert list(explain.summarize(outer, X, layers=entry, verbose=0)) == ["deep"]
    with pytest.raises(ValueError, match="Did you mean"):
        explain.capture(outer, X, layers="deeep", verbose=0)
    with pytest.raises(ValueError, match="dense: the model did not call it, or it has no softmax"):
        explain.capture(outer, X, layers="dense", verbose=0)


class OverColumns(layers.Layer):
    """Each column is a token."""

    def __init__(self, way, **kwargs):
        super().__init__(**kwargs)
        self.attends = Attends(way, name="attends")

    def call(self, x):
        return self.attends(ops.repeat(ops.expand_dims(x, -1), HEADS * SIZE, axis=-1))

    def compute_output_shape(self, shape):
        return (*shape, HEADS * SIZE)


@pytest.mark.parametrize("way", [causal, sink])
def test_names_go_onto_queries_and_keys(way):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(OverColumns(way)(inputs)))
    table = pd.DataFrame(X[:, 0, :3], index=list("abcdefg"), columns=["age", "pulse", "weight"])
    scores = explain.capture(model, table, batch_size=3, verbose=0)["attends"]
    named = explain.capture(model, table.to_numpy(), feature_names=["u", "v", "w"], verbose=0)["attends"]
    np.testing.assert_allclose(scores.values, named.values, atol=1e-6)
    assert list(scores["query"].values) == list(scores["key"].values) == ["age", "pulse", "weight"]
    assert list(scores["sample"].values) == list("abcdefg")
    assert list(named["query"].values) == list(named["key"].values) == ["u", "v", "w"]
    if way is sink:
        assert scores["sink"].sel(sample="c", query="age").dims == ("head",)
    summary = explain.summarize(model, table, verbose=0)["attends"]
    assert list(summary["received"]["key"].values) == ["age", "pulse", "weight"]
    with pytest.raises(ValueError, match=r"must hold one name for each key\. Layer 'attends' attends over 3 keys"):
        explain.capture(model, table, feature_names=["u", "v"], verbose=0)


def test_a_batch_that_calls_another_layer_is_an_error():
    class Changes(keras.Model):
        def __init__(self):
            super().__init__()
            self.of_three, self.of_others = Attends(fused, name="of_three"), Attends(fused, name="of_others")
            self.built = True

        def call(self, x):
            return self.of_three(x) if x.shape[0] == 3 else self.of_others(x)

    assert list(explain.capture(Changes(), X[:3], verbose=0)) == ["of_three"]
    for function in (explain.capture, explain.summarize):
        with pytest.raises(
            RuntimeError, match=r"In batch \d the model called other attention layers than in the first"
        ):
            function(Changes(), X, batch_size=3, verbose=0)


class Stops(keras.utils.PyDataset):
    """Batches of two, and an interruption."""

    def __init__(self, stop_at):
        super().__init__()
        self.stop_at = stop_at

    def __len__(self):
        return 3

    def __getitem__(self, number):
        if number == self.stop_at:
            raise KeyboardInterrupt
        return X[2 * number : 2 * number + 2]


@pytest.mark.parametrize("function", [explain.capture, explain.summarize])
def test_a_store_goes_on_after_a_stop_and_knows_its_weights(function, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "_WRITTEN_AT_ONCE", 0)
    model, path = two_layers(sink, causal), tmp_path / "results.zarr"
    expected = function(model, X[:6], batch_size=2, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        function(model, Stops(2), store=path, verbose=0)
    for _ in range(2):  # goes on, and opens what is complete
        stored = function(model, Stops(None), store=path, verbose=0)
        for name, result in expected.items():
            xr.testing.assert_allclose(stored[name].load(), result)
            assert stored[name].attrs == result.attrs
    model.get_layer("dense").kernel.assign(model.get_layer("dense").kernel + 1)
    with pytest.raises(ValueError, match="belongs to another call, which differs in: weights"):
        function(model, Stops(None), store=path, verbose=0)


def test_scores_of_nan_are_warned_of():
    x = X.copy()
    x[4, 2] = np.nan
    for way in (fused, formed, sink):
        for function in (explain.capture, explain.summarize):
            with pytest.warns(UserWarning, match="'attends' are NaN in 1 of 7 samples, the first of them number 4"):
                result = function(model_of(way), x, verbose=0)["attends"]
            assert ("sink" in result.coords or "sink" in result) == (way is sink)
            assert np.isnan(result["sink"][4]).any() if way is sink else True


def test_a_layer_for_each_time_step_has_sequences():
    inputs = keras.Input((2, LENGTH, HEADS * SIZE))
    model = keras.Model(inputs, layers.TimeDistributed(Attends(fused, name="attends"), name="steps")(inputs))
    x = np.stack([X, 2 * X], axis=1)
    scores = explain.capture(model, x, batch_size=3, verbose=0)
    expected = np.stack([softmax(logits_of() / 2), softmax(logits_of(2 * X) / 2)], axis=1)
    found = np.stack([scores[name] for name in scores], axis=1) if len(scores) > 1 else scores["attends"].values
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-5)


class Inside(layers.Layer):
    """Attends within something that computes it elsewhere."""

    def __init__(self, around, way, **kwargs):
        super().__init__(**kwargs)
        self.around, self.attends = around, Attends(way, name="attends")

    def call(self, x):
        return self.around(self.attends, x)

    def compute_output_shape(self, shape):
        return shape


def mapped(layer, x):
    return ops.map(lambda one: layer(one[None])[0], x)


def scanned(layer, x):
    return ops.scan(lambda carry, one: (carry, layer(one[None])[0]), ops.zeros(()), x)[1]


def looped(layer, x):
    return ops.while_loop(lambda number, _: number < 2, lambda number, x: (number + 1, layer(x)), (0, x))[1]


def compiled_by_itself(layer, x):
    if BACKEND == "jax":
        import jax

        return jax.jit(lambda x: layer(x))(x)  # the layer itself would be traced once
    import tensorflow

    return tensorflow.function(layer)(x)


def model_with(around, way):
    inputs = keras.Input((LENGTH, HEADS * SIZE))
    x = Inside(around, way)(Attends(fused, name="outside")(inputs))
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(x))


NAMED = {
    "jax": [(mapped, fused), (scanned, formed), (looped, fused), (compiled_by_itself, formed)],
    "tensorflow": [(compiled_by_itself, fused), (compiled_by_itself, formed)],
}


@pytest.mark.parametrize(("around", "way"), NAMED.get(BACKEND, []))
def test_what_stays_inside_a_loop_or_a_function_is_named(around, way):
    model = model_with(around, way)
    for function in (explain.capture, explain.summarize):
        with pytest.warns(UserWarning, match="attends: its scores stay inside a loop"):
            assert list(function(model, X, verbose=0)) == ["outside"]
    with pytest.raises(ValueError, match="attends: its scores stay inside a loop"):
        explain.capture(model, X, layers="attends", verbose=0)


@pytest.mark.skipif(BACKEND == "jax", reason="its loops are always compiled")
@pytest.mark.parametrize("around", [mapped, looped])
def test_a_loop_that_runs_eagerly_is_read(around):
    model = model_with(around, formed)
    scores = explain.capture(model, X[:2], verbose=0)
    assert {"outside", "attends#1", "attends#2"} <= set(scores)
    assert max(explain.recomposition_error(model, X[:2], verbose=0).values()) < 1e-5
    if BACKEND == "tensorflow":  # later batches are compiled
        with pytest.raises(RuntimeError, match="In batch 2 the model called other attention layers"):
            explain.capture(model, X, batch_size=2, verbose=0)


def test_layers_that_are_computed_again_in_training_are_read_or_named():
    with keras.RematScope(mode="full"):
        model = model_of(formed)
    if BACKEND == "jax":  # `jax.checkpoint` keeps them
        with pytest.raises(ValueError, match="attends: its scores stay inside a loop, a `vmap` or a function"):
            explain.capture(model, X, verbose=0)
        return
    scores = explain.capture(model, X, verbose=0)["attends"]
    np.testing.assert_allclose(scores, softmax(logits_of() / 2), atol=1e-6)


@pytest.mark.parametrize("way", [fused, formed])
def test_another_thread_with_the_same_model_sees_no_change(way):
    results, here = [], threading.get_ident()

    def meanwhile():
        if threading.get_ident() == here:
            results.append(pool.submit(lambda: ops.convert_to_numpy(model(X))).result())

    model = model_of(way)
    model.get_layer("attends").before = meanwhile
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        expected = pool.submit(lambda: ops.convert_to_numpy(model(X))).result()
        for function in (explain.capture, explain.summarize):
            assert list(function(model, X, batch_size=3, verbose=0)) == ["attends"]
    assert results
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-6)


def test_a_capture_in_the_middle_of_another():
    inner, results = model_of(formed), []

    def capture():
        if len(results) < 2:
            results.append(None)
            results[-1] = explain.capture(inner, X[:2], verbose=0)["attends"]

    outer = model_of(fused)
    outer.compile(run_eagerly=True)  # a function that is being traced has no values
    outer.get_layer("attends").before = capture
    scores = explain.capture(outer, X, verbose=0)
    assert list(scores) == ["attends"]
    np.testing.assert_allclose(scores["attends"], softmax(logits_of() / 2), atol=1e-6)
    for result in results:
        np.testing.assert_allclose(result, softmax(logits_of() / 2)[:2], atol=1e-6)


def test_functions_of_keras_come_back_after_an_error_in_a_summary():
    def fails():
        raise ArithmeticError("broken")

    before = [vars(place).get(name) for _, place, name, _ in _backend.all_operations()]
    inputs = keras.Input((LENGTH, HEADS * SIZE))
    model = keras.Model(inputs, Attends(fused)(Attends(fused)(inputs)))
    model.layers[-1].before = fails
    for function in (explain.summarize, explain.capture, explain.recomposition_error):
        with pytest.raises(ArithmeticError, match="broken"):
            function(model, X, verbose=0)
    assert [vars(place).get(name) for _, place, name, _ in _backend.all_operations()] == before


def test_two_softmaxes_that_are_taken_first_and_contracted_later():
    scores = explain.capture(model_of(two_softmaxes), X, verbose=0)
    np.testing.assert_allclose(scores["attends#1"], softmax(-logits_of() / 2), atol=1e-6)
    np.testing.assert_allclose(scores["attends#2"], softmax(logits_of() / 2), atol=1e-6)


def test_a_soft_cap_of_the_logits_is_applied(monkeypatch):
    """Only JAX on a TPU takes it: here a function that takes it stands in the place of Keras' own."""
    module = next(place for _, place, name, _ in _backend.all_operations() if name == "dot_product_attention")

    def capped(query, key, value, attn_logits_soft_cap, mask):
        logits = ops.einsum("bqhd,bkhd->bhqk", query, key) / 2
        logits = ops.where(mask, attn_logits_soft_cap * ops.tanh(logits / attn_logits_soft_cap), -1e9)
        return ops.einsum("bhqk,bkhd->bqhd", ops.softmax(logits), value)

    monkeypatch.setattr(module, "dot_product_attention", capped)
    seen = ops.convert_to_tensor(np.tri(LENGTH, dtype=bool)[None, None])
    model = model_of(
        lambda query, key, value: module.dot_product_attention(query, key, value, attn_logits_soft_cap=0.7, mask=seen)
    )
    logits = np.where(np.tri(LENGTH, dtype=bool), 0.7 * np.tanh(logits_of() / 2 / 0.7), -np.inf)
    scores = explain.capture(model, X, verbose=0)["attends"]
    np.testing.assert_allclose(scores, softmax(logits), atol=1e-6)
    assert explain.recomposition_error(model, X, verbose=0)["attends"] < 1e-5
    assert_summarizes(explain.summarize(model, X, rows=[2], verbose=0)["attends"], scores)


def test_how_scores_were_read_is_said():
    inputs = keras.Input((LENGTH, HEADS * SIZE))
    x = layers.MultiHeadAttention(2, 4, name="of_keras")(inputs, inputs)
    model = keras.Model(inputs, Attends(formed, name="formed")(Attends(fused, name="fused")(x)))
    expected = {"of_keras": "_compute_attention", "fused": "dot_product_attention", "formed": "softmax"}
    for function in (explain.capture, explain.summarize):
        assert {name: one.attrs["read_from"] for name, one in function(model, X, verbose=0).items()} == expected
    statistics = explain.head_statistics(explain.capture(model, X, verbose=0))
    assert statistics["fused"].attrs["read_from"] == "dot_product_attention"
