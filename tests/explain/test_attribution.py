"""`attribute` and `rollout`, against their definitions."""

import functools
import inspect

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers, ops

from kerasfactory import explain
from kerasfactory.explain import _attribution
from kerasfactory.explain._attribution import _projected
from kerasfactory.explain._engine.observe import observe
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

METHODS = ["attention", "rollout", "attention_gradient", "value_norm", "integrated_gradients", "uniform", "random"]
DISTRIBUTIONS = ["attention", "rollout", "uniform", "random"]
NAMES = ["age", "pulse", "weight", "height", "dose"]
RNG = np.random.default_rng(3)
TABLE = RNG.normal(size=(7, 5)).astype("float32")
SEQUENCE = RNG.normal(size=(7, 5, 8)).astype("float32")
WORDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 0, 0, 0, 0]])


def attribute(model, x, **kwargs):
    return explain.attribute(model, x, **{"task": "classification", "verbose": 0, **kwargs})


@functools.cache  # compiling is what takes time here
def on_table(kind, depth=2, outputs=3, policy="float32"):
    """Layers of attention one behind the other, over the columns of a table."""
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(5)
    inputs = keras.Input((5,))
    x = FeatureTokenizer(8, feature_names=NAMES)(inputs)
    for number in range(depth):
        x = x + ATTENTIONS[kind](f"attention_{number}")(x)
    x = layers.Dense(8, activation="tanh")(layers.GlobalAveragePooling1D()(x))
    x = layers.Dense(outputs)(x)
    keras.config.set_dtype_policy("float32")
    return keras.Model(inputs, x)


def of_itself(layer):
    return lambda x: layer(x, x)


# With dropout, for Keras' fused kernel on JAX takes no values of another width.
ATTENTIONS = {
    "keras": lambda name: of_itself(layers.MultiHeadAttention(2, 4, value_dim=3, dropout=0.1, name=name)),
    "ours": lambda name: InterpretableMultiHeadAttention(4, 2, name=name),
    "grouped": lambda name: of_itself(layers.GroupQueryAttention(4, 4, 2, name=name)),
    "nested": lambda name: keras.Sequential(
        [keras.Input((5, 8)), InterpretableMultiHeadAttention(4, 2, name="attention")], name=name
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_every_method_on_every_attention(kind, method):
    model = on_table(kind)
    model(TABLE)
    before = [dict(vars(layer)) for layer in model._flatten_layers()]
    weights, x = model.get_weights(), TABLE.copy()

    result = attribute(model, TABLE, method=method, batch_size=4)

    assert [dict(vars(layer)) for layer in model._flatten_layers()] == before
    for value, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, other)
    np.testing.assert_array_equal(TABLE, x)
    assert (result.dims, result.shape, result.name) == (("sample", "feature"), (7, 5), method)
    assert list(result.coords["feature"].values) == NAMES
    assert result.coords["in_view"].values.all()
    assert result.dtype == "float32"
    assert (result < 0).any() if method == "integrated_gradients" else (result >= 0).all()
    assert (np.abs(result.values).max(axis=1) > 0).all()
    if method in DISTRIBUTIONS:
        np.testing.assert_allclose(result.sum("feature"), 1, atol=1e-6)
    names = [f"attention_{number}" for number in range(2)]
    has_gradient = method in ("attention_gradient", "integrated_gradients")
    assert ("completeness_error" in result.attrs) == (method == "integrated_gradients")
    assert result.attrs.pop("completeness_error", 0) < 1e-3
    assert result.attrs == {
        "method": method,
        "target": "predicted" if has_gradient else "any",
        "query": "any" if method == "integrated_gradients" else "mean",
        "layers": ", ".join(f"{name}/attention" if kind == "nested" else name for name in names),
        "masks": "none",
        "backend": keras.config.backend(),
        "keras_version": keras.__version__,
    }
    np.testing.assert_allclose(attribute(model, TABLE, method=method), result, atol=1e-6)  # whatever the batches
    if method != "random":
        np.testing.assert_allclose(attribute(model, TABLE[2:3], method=method)[0], result[2], atol=1e-6)


def test_attention_is_the_mean_of_the_scores_or_one_querys_row():
    model = on_table("ours")
    scores = explain.capture(model, TABLE, verbose=0)
    mean = sum(array.mean("head") for array in scores.values()) / 2
    np.testing.assert_allclose(attribute(model, TABLE), mean.mean("query"), atol=1e-6)
    for query in (2, -3, "weight", np.int64(2)):
        result = attribute(model, TABLE, query=query)
        np.testing.assert_allclose(result, mean.sel(query="weight"), atol=1e-6)
        assert result.attrs["query"] == query
    only = attribute(model, TABLE, layers="attention_1")
    np.testing.assert_allclose(only, scores["attention_1"].mean(["head", "query"]), atol=1e-6)
    assert only.attrs["layers"] == "attention_1"


DIMS = ("sample", "head", "query", "key")


def array(values):
    return xr.DataArray(np.asarray(values, "float64"), dims=DIMS)


@pytest.mark.backend_independent
def test_rollout_of_two_layers_by_hand():
    first = array([[[[0.2, 0.8], [1.0, 0.0]], [[0.6, 0.4], [0.0, 1.0]]]])  # half and half: [[0.7, 0.3], [0.25, 0.75]]
    second = array([[[[1.0, 0.0], [0.5, 0.5]]]])  # [[1, 0], [0.25, 0.75]]
    result = explain.rollout({"first": first, "second": second})
    np.testing.assert_allclose(result[0], [[0.7, 0.3], [0.3625, 0.6375]])
    assert result.dims == ("sample", "query", "key")
    assert result.attrs == {"layers": "first, second"}
    np.testing.assert_allclose(
        explain.rollout({"second": second.transpose(*DIMS[::-1]), "first": first})[0],
        np.array([[0.7, 0.3], [0.25, 0.75]]) @ [[1, 0], [0.25, 0.75]],
    )


@pytest.mark.backend_independent
def test_rollout_of_one_layer_is_half_attention_half_identity():
    scores = explain.capture(on_table("keras"), TABLE, layers="attention_0", verbose=0)
    result = explain.rollout(scores)
    np.testing.assert_allclose(result, (scores["attention_0"].mean("head") + np.eye(5)) / 2, atol=1e-7)
    xr.testing.assert_identical(explain.rollout(scores["attention_0"]), result)
    assert list(result.coords["key"].values) == list(result.coords["query"].values) == NAMES


def test_rows_of_a_rollout_sum_to_one_and_pool_to_the_attribution():
    model = on_table("ours", depth=4)
    result = explain.rollout(explain.capture(model, TABLE, verbose=0))
    np.testing.assert_allclose(result.sum("key"), 1, atol=1e-6)
    np.testing.assert_allclose(attribute(model, TABLE, method="rollout"), result.mean("query"), atol=1e-6)
    np.testing.assert_allclose(
        attribute(model, TABLE, method="rollout", query="dose"), result.sel(query="dose"), atol=1e-6
    )


@pytest.mark.backend_independent
def test_a_query_that_looks_nowhere_stays_itself_in_a_rollout():
    scores = array([[[[0.5, 0.5], [0.0, 0.0]]]])
    np.testing.assert_allclose(explain.rollout({"a": scores, "b": scores})[0], [[0.5625, 0.4375], [0, 1]])


def test_layers_come_in_the_order_of_their_calls():
    inputs = keras.Input((5, 8))
    twice = layers.MultiHeadAttention(2, 4, name="a")
    between = layers.MultiHeadAttention(2, 4, name="z")
    x = twice(inputs, inputs)
    x = between(x, x)
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(twice(x, x)))
    model.compile(jit_compile=keras.config.backend() == "jax")
    assert attribute(model, SEQUENCE, method="rollout").attrs["layers"] == "a#1, z, a#2"
    batches = iter([SEQUENCE[:3], SEQUENCE[3:]])
    assert list(explain.capture(model, batches, verbose=0)) == ["a#1", "z", "a#2"]


class ByHand:
    """A model of `on_table`, with our attention, in NumPy and double precision."""

    def __init__(self, model, depth):
        def values(layer):
            return [weight.astype("float64") for weight in layer.get_weights()]

        (tokenizer,) = (layer for layer in model.layers if isinstance(layer, FeatureTokenizer))
        self.tokenizer = values(tokenizer)
        self.attentions = [values(model.get_layer(f"attention_{number}")) for number in range(depth)]
        self.head = [values(layer) for layer in model.layers if isinstance(layer, layers.Dense)]

    def __call__(self, x, changes=None, scale=1.0):
        """The outputs, and the scores, if these are changed by `changes`, and the tokens scaled."""
        kernel, bias = self.tokenizer
        tokens = (x[:, :, None] * kernel + bias) * np.expand_dims(scale, -1)
        seen = []
        for number, (wq, bq, wk, bk, wv, bv, wo, bo) in enumerate(self.attentions):
            query, key, value = (
                np.einsum("bfd,dhe->bhfe", tokens, w) + b[:, None] for w, b in [(wq, bq), (wk, bk), (wv, bv)]
            )
            scores = np.exp(query @ key.swapaxes(2, 3) / np.sqrt(query.shape[-1]))
            scores /= scores.sum(-1, keepdims=True)
            seen.append(scores)
            if changes is not None:
                scores = scores + changes[number]
            tokens = tokens + np.einsum("bhfe,hed->bfd", scores @ value, wo) + bo
        (hidden, hidden_bias), (out, out_bias) = self.head
        return np.tanh(tokens.mean(1) @ hidden + hidden_bias) @ out + out_bias, seen


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("target", [None, 0])
def test_gradient_attention_is_that_of_finite_differences(depth, target):
    model = on_table("ours", depth)
    by_hand = ByHand(model, depth)
    x = TABLE.astype("float64")
    outputs, scores = by_hand(x)
    np.testing.assert_allclose(outputs, model.predict(TABLE, verbose=0), atol=1e-5)
    assert len(set(outputs.argmax(1))) > 1
    chosen = outputs.argmax(1) if target is None else np.full(len(x), target)

    step, relevance = 1e-4, np.broadcast_to(np.eye(5), (len(x), 5, 5))
    for layer in range(depth):
        gradient = np.zeros_like(scores[layer])
        for where in np.ndindex(gradient.shape[1:]):
            changes = np.zeros((depth, *gradient.shape))
            changes[(layer, slice(None), *where)] = step
            difference = (by_hand(x, changes)[0] - by_hand(x, -changes)[0]) / (2 * step)
            gradient[(slice(None), *where)] = difference[np.arange(len(x)), chosen]
        positive = np.maximum(gradient * scores[layer], 0).mean(1)
        relevance = relevance + positive @ relevance

    expected = relevance - np.eye(5)
    assert expected.mean() > 1e-3
    result = attribute(model, TABLE, method="attention_gradient", target=target)
    np.testing.assert_allclose(result, expected.mean(1), rtol=1e-3, atol=1e-6)
    assert result.attrs["target"] == ("predicted" if target is None else 0)
    of_one = attribute(model, TABLE, method="attention_gradient", target=target, query="pulse")
    np.testing.assert_allclose(of_one, expected[:, 1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("target", [None, 0])
def test_integrated_gradients_are_the_integral_of_finite_differences(target):
    by_hand = ByHand(on_table("ours"), 2)
    x = TABLE.astype("float64")
    outputs, _ = by_hand(x)
    chosen = outputs.argmax(1) if target is None else np.full(len(x), target)

    def value(scale):
        return by_hand(x, scale=scale)[0][np.arange(len(x)), chosen]

    steps, expected = 200, np.zeros((7, 5))
    for node in (np.arange(steps) + 0.5) / steps:
        for feature in range(5):
            scale = np.full(5, node)
            move = 1e-4 * np.eye(5)[feature]
            expected[:, feature] += (value(scale + move) - value(scale - move)) / 2e-4 / steps
    result = attribute(on_table("ours"), TABLE, method="integrated_gradients", target=target, batch_size=4)
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(result.sum("feature"), value(1.0) - value(0.0), rtol=1e-3, atol=1e-5)
    assert np.abs(expected).mean() > 0.01


def test_gradients_are_compiled_once_for_all_sizes_of_batches(monkeypatch):
    model, runs, asked_output = on_table.__wrapped__("ours"), [], _attribution.asked_output

    def counted(*args):
        runs.append(args)
        return asked_output(*args)

    monkeypatch.setattr(_attribution, "asked_output", counted)
    result = attribute(model, TABLE, method="attention_gradient", batch_size=3)  # 3, 3 and 1 samples
    assert len(runs) == {"tensorflow": 1, "jax": 2}.get(keras.config.backend(), 3)  # `jax.jit` is for one size
    np.testing.assert_allclose(result, attribute(model, TABLE, method="attention_gradient"), rtol=1e-4, atol=1e-7)


def test_one_output_needs_no_target():
    model = on_table("ours", depth=1, outputs=1)
    result = attribute(model, TABLE, method="attention_gradient", task="regression")
    np.testing.assert_array_equal(result, attribute(model, TABLE, method="attention_gradient", target=0))
    flat = keras.Model(model.inputs, layers.Reshape(())(model.outputs[0]))
    np.testing.assert_array_equal(result, attribute(flat, TABLE, method="attention_gradient"))


def gated(kind, **arguments):
    if "use_gate" not in inspect.signature(kind.__init__).parameters:
        pytest.skip("this Keras has no gates")
    return kind(**arguments, use_gate=True)


VALUES = {
    "keras": lambda: layers.MultiHeadAttention(2, 4, value_dim=3, dropout=0.1),
    "wide": lambda: layers.MultiHeadAttention(2, 4, output_shape=(3, 2)),
    "without bias": lambda: layers.MultiHeadAttention(2, 4, use_bias=False),
    "ours": lambda: InterpretableMultiHeadAttention(4, 2),
    "grouped": lambda: layers.GroupQueryAttention(4, 4, 2),
    "gated": lambda: gated(layers.MultiHeadAttention, num_heads=2, key_dim=4, value_dim=3, dropout=0.1),
    "gated and grouped": lambda: gated(
        layers.GroupQueryAttention, head_dim=4, num_query_heads=4, num_key_value_heads=2
    ),
}


def vectors(call):
    """What each key adds to each query, head by head, and the whole."""
    weights, value = call.scores, call.value
    if getattr(call.layer, "_use_gate", False) or getattr(call.layer, "use_gate", False):
        gate = call.layer._gate_dense(call.query)
        each = ops.stack([_projected(call, value * gate[:, i : i + 1]) for i in range(5)], axis=1)
    else:
        each = ops.stack([_projected(call, value)] * 5, axis=1)  # (batch, query, key, head, output)
    return ops.einsum("bhqk,bqkho->bqkho", weights, each), call.output


@pytest.mark.parametrize("kind", VALUES)
def test_value_vectors_and_the_bias_sum_to_the_output_and_their_lengths_are_the_attribution(kind):
    keras.utils.set_random_seed(2)
    inputs = keras.Input((5, 8))
    attention = VALUES[kind]()
    ours = isinstance(attention, InterpretableMultiHeadAttention)
    x = attention(inputs) if ours else attention(inputs, inputs)
    model = keras.Model(inputs, x)
    for weight in model.weights:  # biases too, as after training
        weight.assign(RNG.normal(size=weight.shape) / 2)
    output = model.predict(SEQUENCE, verbose=0).reshape(7, 5, -1)

    (batch,) = observe(model, SEQUENCE, None, None, 0, vectors)
    each, _ = (ops.convert_to_numpy(tensor) for tensor in next(iter(batch.measured.values())))
    dense = attention.mha.output_dense if ours else attention._output_dense
    bias = 0 if dense.bias is None else ops.convert_to_numpy(dense.bias).ravel()
    np.testing.assert_allclose(each.sum((2, 3)) + bias, output, atol=1e-5)

    lengths = np.linalg.norm(each.sum(3), axis=-1)
    assert lengths.std() > 0.1
    np.testing.assert_allclose(attribute(model, SEQUENCE, method="value_norm"), lengths.mean(1), rtol=1e-5)
    np.testing.assert_allclose(attribute(model, SEQUENCE, method="value_norm", query=-1), lengths[:, -1], rtol=1e-5)


def test_value_norm_from_the_weights():
    keras.utils.set_random_seed(2)
    inputs = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(2, 4, value_dim=3, dropout=0.1, name="attention")
    model = keras.Model(inputs, attention(inputs, inputs))
    for weight in model.weights:
        weight.assign(RNG.normal(size=weight.shape) / 2)
    *_, wv, bv, wo, _ = (weight.astype("float64") for weight in attention.get_weights())
    scores = explain.capture(model, SEQUENCE, verbose=0)["attention"].values
    transformed = np.einsum("bkhd,hdo->bhko", np.einsum("bki,ihd->bkhd", SEQUENCE, wv) + bv, wo)
    added = np.einsum("bhqk,bhko->bqko", scores, transformed)
    expected = np.linalg.norm(added, axis=-1).mean(1)
    np.testing.assert_allclose(attribute(model, SEQUENCE, method="value_norm"), expected, rtol=1e-5)


@functools.cache
def on_words():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(10, 8, mask_zero=True)(inputs)
    for name in ("first", "second"):
        x = layers.Add()([x, InterpretableMultiHeadAttention(4, 2, name=name)(x)])
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


@pytest.mark.parametrize("method", METHODS)
def test_masked_keys_get_nothing(method):
    model = on_words()
    result = attribute(model, WORDS, method=method)
    np.testing.assert_array_equal(result.coords["in_view"], WORDS != 0)
    assert (result.values[WORDS == 0] == 0).all()
    if method in DISTRIBUTIONS:
        np.testing.assert_allclose(result.sum("feature"), 1, atol=1e-6)
        np.testing.assert_allclose(result[2], [1, 0, 0, 0, 0], atol=1e-6)  # a single word
    if method == "uniform":
        np.testing.assert_allclose(result[1], [1 / 3, 1 / 3, 1 / 3, 0, 0], atol=1e-6)
    if method == "attention":
        scores = explain.capture(model, WORDS, verbose=0)
        mean = sum(array.mean("head") for array in scores.values())[1] / 2
        np.testing.assert_allclose(result[1], mean[:3].mean("query"), atol=1e-6)  # over the queries that look
    nothing = attribute(model, np.zeros_like(WORDS), method=method)
    np.testing.assert_array_equal(nothing, np.zeros((3, 5)))


def test_a_query_under_a_causal_mask_sees_what_is_before_it():
    inputs = keras.Input((5, 8))
    x = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs, use_causal_mask=True)
    model = keras.Model(inputs, layers.Dense(1)(x[:, -1]))
    for method in set(METHODS) - {"integrated_gradients"}:  # which are not about one query
        result = attribute(model, SEQUENCE, method=method, query=1)
        assert (result.values[:, 2:] == 0).all()
        if method == "attention_gradient":  # the model reads the last position only
            assert (result == 0).all()
            assert (attribute(model, SEQUENCE, method=method, query=-1) > 0).any()
    np.testing.assert_allclose(attribute(model, SEQUENCE, method="uniform", query=1)[0], [0.5, 0.5, 0, 0, 0])


def test_what_is_in_view_of_a_query_that_sees_through_other_positions():
    """A chain: each position attends to itself and the one before."""
    inputs = keras.Input((5, 8))
    chain = (np.eye(5) + np.eye(5, k=-1)).astype(bool)[np.newaxis]
    x = layers.MultiHeadAttention(2, 4, name="first")(inputs, inputs, attention_mask=chain)
    x = layers.MultiHeadAttention(2, 4, name="second")(x, x, attention_mask=chain)
    model = keras.Model(inputs, layers.Dense(1)(x[:, -1]))
    result = attribute(model, SEQUENCE, method="uniform", query=-1)
    np.testing.assert_array_equal(result.coords["in_view"][0], [False, False, True, True, True])
    np.testing.assert_allclose(result[0], [0, 0, 1 / 3, 1 / 3, 1 / 3], atol=1e-6)
    assert (attribute(model, SEQUENCE, method="rollout", query=-1).values > 0)[0].tolist() == [0, 0, 1, 1, 1]
    only = attribute(model, SEQUENCE, query=-1, layers="first").coords["in_view"]
    np.testing.assert_array_equal(only[0], [False, False, False, True, True])
    assert attribute(model, SEQUENCE).coords["in_view"].values.all()


@pytest.mark.backend_independent
def test_a_weight_that_is_rounded_to_0_is_no_mask():
    inputs = keras.Input((5, 8))
    layer = layers.MultiHeadAttention(1, 8, name="attention")
    model = keras.Model(inputs, layers.Dense(1)(layer(inputs, inputs)[:, 0]))
    layer._query_dense.kernel.assign(1e4 * layer._query_dense.kernel)
    result = attribute(model, SEQUENCE)
    assert (result == 0).any()
    assert result.coords["in_view"].values.all()


@pytest.mark.backend_independent
def test_special_tokens_are_out_of_view_and_keep_what_was_measured():
    model = on_words()
    in_view = (WORDS != 0) & (WORDS != 1)
    plain, special = attribute(model, WORDS), attribute(model, WORDS, special_tokens=[0, 1])
    np.testing.assert_array_equal(special.coords["in_view"], in_view)
    np.testing.assert_array_equal(special, plain)
    assert special.attrs["special_tokens"] == [0, 1]
    uniform = attribute(model, WORDS, method="uniform", special_tokens=(np.int64(1),))
    np.testing.assert_allclose(uniform, in_view / in_view.sum(axis=1, keepdims=True), atol=1e-6)
    random = attribute(model, WORDS, method="random", special_tokens=np.array([1, 7]), batch_size=2)
    np.testing.assert_array_equal(random > 0, in_view)

    listed = attribute(keras.Model([model.input], model.output), [WORDS], special_tokens=[1])
    np.testing.assert_array_equal(listed.coords["in_view"], in_view)
    result = attribute(on_table("ours"), TABLE, method="uniform", special_tokens=["dose", "age"])
    assert result.coords["in_view"].all("sample").values.tolist() == [False, True, True, True, False]
    np.testing.assert_allclose(result[0], [0, 1 / 3, 1 / 3, 1 / 3, 0], atol=1e-6)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("special_tokens", "x", "message"),
    [
        ("age", TABLE, r"must be a list of token ids.*Received: special_tokens='age'"),
        (0, TABLE, r"must be a list of token ids.*special_tokens=0"),
        ([], TABLE, "must be a list"),
        ([1.5], TABLE, r"must be a list.*special_tokens=\[1\.5\]"),
        (["ages"], TABLE, r"names no feature: 'ages'\. Did you mean 'age'\? There are: age, pulse"),
        ([0], TABLE, r"integers, \(sample, 5\).*`x\.astype\(int\)`.*Received x: float32 of shape \(7, 5\)"),
        ([0], iter([TABLE]), "Received x: list_iterator"),
    ],
    ids=lambda value: str(value)[:40].partition(" at 0x")[0],
)
def test_special_tokens_that_cannot_be_found(special_tokens, x, message):
    with pytest.raises(ValueError, match=message):
        attribute(on_table("ours"), x, special_tokens=special_tokens)


@pytest.mark.backend_independent
def test_random_is_a_flat_dirichlet_distribution_with_a_seed():
    model = on_table("ours", depth=1)
    x = np.tile(TABLE, (300, 1))
    result = attribute(model, x, method="random", seed=1, batch_size=700)
    np.testing.assert_array_equal(result, attribute(model, x, method="random", seed=1, batch_size=2100))
    assert not np.allclose(result, attribute(model, x, method="random", seed=2, batch_size=700))
    np.testing.assert_allclose(result.mean("sample"), 1 / 5, atol=0.02)
    np.testing.assert_allclose(result.var("sample"), 1 / 5 * 4 / 5 / 6, rtol=0.15)


def test_one_layer_of_cross_attention_is_about_what_it_looks_at():
    inputs = [keras.Input((5,), name="table"), keras.Input((6, 8), name="sequence")]
    tokens = FeatureTokenizer(8, feature_names=NAMES)(inputs[0])
    x = InterpretableMultiHeadAttention(4, 2, name="cross")(tokens, inputs[1])
    both = InterpretableMultiHeadAttention(4, 2, name="self")(x)
    model = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(both)))
    data = [TABLE, RNG.normal(size=(7, 6, 8)).astype("float32")]
    for method in ("attention", "attention_gradient", "value_norm", "uniform", "random"):
        assert attribute(model, data, method=method, layers="cross").shape == (7, 6)
    with pytest.raises(ValueError, match=r"different numbers of keys, \{'cross': 6, 'self': 5\}.*`layers="):
        attribute(model, data)
    for method in ("rollout", "attention_gradient"):
        with pytest.raises(ValueError, match=r"cross: 5 x 6, self: 5 x 5.*Leave out cross-attention"):
            attribute(model, data, method=method)
    with pytest.raises(ValueError, match=r"Leave out cross-attention"):
        explain.rollout(explain.capture(model, data, layers="cross", verbose=0))


def test_names_of_features_are_those_of_capture():
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs))
    assert "feature" not in attribute(model, SEQUENCE).coords
    named = attribute(model, SEQUENCE, feature_names=NAMES, query="dose")
    assert list(named.coords["feature"].values) == NAMES
    np.testing.assert_array_equal(named, attribute(model, SEQUENCE, query=4))
    with pytest.raises(ValueError, match="one name for each key"):
        attribute(model, SEQUENCE, feature_names=NAMES[:3])
    with pytest.raises(ValueError, match=r"no query 'dose'.*They have no names"):
        attribute(model, SEQUENCE, query="dose")


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_warned_of_and_stays_in_its_sample(method):
    model = on_table("ours")
    x = TABLE.copy()
    x[[1, 4], 1] = np.nan
    with pytest.warns(UserWarning, match="NaN in 2 of 7 samples, the first of them number 1"):
        result = attribute(model, x, method=method, batch_size=4)
    assert np.isnan(result[[1, 4]]).any("feature").all()
    assert not np.isnan(result.drop_sel(sample=[1, 4])).any()


def test_nan_in_scores_is_warned_of():
    with pytest.warns(UserWarning, match="NaN in 1 of 2 samples, the first of them number 1"):
        explain.rollout(array([[[[0.5, 0.5], [0.0, 1.0]]], [[[np.nan, np.nan], [0.5, 0.5]]]]))


def test_half_precision():
    model = on_table("ours", policy="mixed_bfloat16")
    for method in METHODS:
        result = attribute(model, TABLE, method=method)
        assert (result.dtype, result.shape) == ("float32", (7, 5))
        assert np.isfinite(result).all()
        if method in DISTRIBUTIONS:
            np.testing.assert_allclose(result.sum("feature"), 1, atol=0.01)


WRONG = [
    ({"method": "atention"}, r"no method 'atention'.*mean 'attention'.*There are: attention, rollout"),
    ({"method": "lime"}, r"no method 'lime'\. There are: attention"),
    ({"target": 3, "method": "attention_gradient"}, r"from 0 to 2: the model has 3.*target=3"),
    ({"target": -1, "method": "attention_gradient"}, r"from 0 to 2.*target=-1"),
    ({"target": 3}, r"from 0 to 2: the model has 3.*target=3"),
    ({"target": "cat"}, r"`target` must be the number of an output.*'cat'"),
    ({"target": True}, r"`target` must be the number of an output.*True"),
    ({"task": "clasification"}, r"`task` must be one of 'classification', .*'clasification'"),
    ({"method": "attention_gradient"}, r"the model has 3 outputs. It is not known to tell classes apart.*`target=0`"),
    ({"method": "attention_gradient", "task": "regression"}, r"Its task is regression: say which.*`target=0`\."),
    ({"query": 5}, r"from 0 to 4.*'attention_0' has 5 queries.*query=5"),
    ({"query": -6}, r"from 0 to 4.*query=-6"),
    ({"query": 1.5}, r"`query` must be an integer.*1\.5"),
    ({"query": "pulses"}, r"no query 'pulses'.*mean 'pulse'.*There are: age, pulse"),
    ({"layers": "attention"}, r"no layer 'attention'.*Did you mean"),
    ({"verbose": 7, "method": "attention_gradient"}, r"`verbose` must be"),
    ({"x": TABLE[:0], "method": "attention_gradient"}, r"`x` is empty"),
    ({"x": TABLE[:0]}, r"`x` is empty"),
]


@pytest.mark.backend_independent
@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said(arguments, message):
    model = on_table("ours")
    with pytest.raises(ValueError, match=message):
        explain.attribute(**({"model": model, "x": TABLE, "verbose": 0} | arguments))


def test_attention_that_is_not_over_features_is_refused():
    inputs = keras.Input((3, 4, 8))
    x = layers.MultiHeadAttention(2, 4, attention_axes=(1, 2), name="both")(inputs, inputs)
    both = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling2D()(x)))
    x = RNG.normal(size=(2, 3, 4, 8)).astype("float32")
    block = keras.Sequential([keras.Input((4, 8)), InterpretableMultiHeadAttention(4, 2, name="inner")])
    folded = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling2D()(Folding(block)(inputs))))
    for method in METHODS:
        with pytest.raises(ValueError, match=r"'both' attends over several axes.*`layers="):
            attribute(both, x, method=method)
        with pytest.raises(ValueError, match=r"inner' attends in 6 sequences for 2 samples.*`layers="):
            attribute(folded, x, method=method)


class Folding(layers.Layer):
    """Attends within each row, as windowed attention does."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def call(self, x):
        return ops.reshape(self.block(ops.reshape(x, (-1, 4, 8))), (-1, 3, 4, 8))


def test_batches_of_different_lengths_are_refused():
    inputs = keras.Input((None, 8))
    x = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(x)))
    for method in METHODS:
        with pytest.raises(ValueError, match=r"4 queries and 4 keys in one batch, but 5 and 5.*Pad them"):
            attribute(model, iter([SEQUENCE, SEQUENCE[:, :4]]), method=method)


def test_gradients_need_one_output_a_class():
    model = on_table("ours")
    two = keras.Model(model.inputs, [model.outputs[0], layers.Softmax()(model.outputs[0])])
    with pytest.raises(ValueError, match=r"has 2 outputs: 0 of shape \(7, 3\), 1 of shape \(7, 3\).*`target=0`"):
        attribute(two, TABLE, method="attention_gradient")
    of_first = attribute(two, TABLE, method="attention_gradient", target=0)
    np.testing.assert_allclose(of_first, attribute(model, TABLE, method="attention_gradient"), rtol=1e-5)
    inputs = keras.Input((5, 8))
    tagger = keras.Model(inputs, layers.MultiHeadAttention(2, 4)(inputs, inputs))
    with pytest.raises(ValueError, match=r"classes apart for each of several positions.*`target=\(0, 0\)`"):
        attribute(tagger, SEQUENCE, method="attention_gradient")
    of_position = attribute(tagger, SEQUENCE, method="attention_gradient", target=(2, 1))
    one = keras.Model(tagger.inputs, tagger.outputs[0][:, 2, 1])
    np.testing.assert_allclose(of_position, attribute(one, SEQUENCE, method="attention_gradient"), rtol=1e-4, atol=1e-7)
    assert of_position.attrs["target"] == "2, 1"


@pytest.mark.backend_independent
def test_rollout_says_what_is_wrong_with_scores():
    scores = explain.capture(on_table("ours"), TABLE, verbose=0)
    with pytest.raises(ValueError, match=r"`weights` is empty"):
        explain.rollout({})
    with pytest.raises(ValueError, match=r"'attention_0' have \('sample', 'query', 'key'\)"):
        explain.rollout({"attention_0": scores["attention_0"].mean("head")})
    with pytest.raises(ValueError, match=r"same samples.*'attention_0': 7, 'attention_1': 3"):
        explain.rollout(scores | {"attention_1": scores["attention_1"][:3]})
    with pytest.raises(ValueError, match=r"attention_0: 5 x 5, attention_1: 4 x 4"):
        explain.rollout(scores | {"attention_1": scores["attention_1"][..., :4, :4]})
    with pytest.raises(ValueError, match=r"rows of scores that sum to 1"):
        explain.rollout(scores | {"attention_1": scores["attention_1"] * 2})


@pytest.mark.backend_independent
def test_scores_that_are_no_distribution_are_not_rolled_out():
    class Sigmoid(layers.MultiHeadAttention):
        def _compute_attention(self, query, key, value, *args, **kwargs):
            scores = ops.sigmoid(ops.einsum(self._dot_product_equation, key, query))
            return ops.einsum(self._combine_equation, scores, value), scores

    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, Sigmoid(2, 4)(inputs, inputs))
    with pytest.raises(ValueError, match=r"rows of scores that sum to 1"):
        attribute(model, SEQUENCE, method="rollout")
    assert (attribute(model, SEQUENCE, method="value_norm") > 0).all()
