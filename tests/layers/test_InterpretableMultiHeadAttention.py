import copy
import importlib
import inspect
import json
import pickle
import subprocess
import sys
import textwrap
import warnings
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import kerasfactory.layers
from kerasfactory import explain
from kerasfactory.layers import InterpretableMultiHeadAttention

BACKEND = keras.config.backend()
# PyTorch runs `fit` and `predict` eagerly; the other two compile them.
COMPILES = BACKEND != "torch"
# NumPy reads bfloat16 of the other two, but not of PyTorch, where the layer hands its scores out as float32.
BFLOAT16_SCORES = "float32" if BACKEND == "torch" else "bfloat16"
# Older versions of Keras offer fewer arguments, and are asked for those that they have.
OFFERED = set(inspect.signature(keras.layers.MultiHeadAttention).parameters)

# Every argument that is passed on to Keras, in every form that Keras takes it.
ARGUMENTS = [
    {"value_dim": 3},
    {"use_bias": False},
    {"output_shape": 5},
    {"output_shape": (2, 3)},
    {"attention_axes": 2},
    {"attention_axes": (1,)},
    {"attention_axes": [-2]},
    {"attention_axes": (1, 2)},
    {"sliding_window": 2},
    {"use_gate": True},
    {"flash_attention": False},
    {"seed": 3},
    {"kernel_initializer": "he_normal"},
    {"kernel_initializer": keras.initializers.RandomNormal(stddev=0.3, seed=7)},
    {"kernel_initializer": keras.initializers.serialize(keras.initializers.Orthogonal(gain=0.5))},
    {"bias_initializer": "ones"},
    {"bias_initializer": keras.initializers.Constant(0.5)},
    {"bias_initializer": keras.initializers.serialize(keras.initializers.RandomUniform(0.1, 0.2))},
    {"kernel_regularizer": "l2"},
    {"kernel_regularizer": keras.regularizers.L1(0.1)},
    {"kernel_regularizer": keras.regularizers.serialize(keras.regularizers.L1L2(0.1, 0.2))},
    {"bias_regularizer": "l1", "bias_initializer": "ones"},
    {"bias_regularizer": keras.regularizers.L2(0.1), "bias_initializer": "ones"},
    {"bias_regularizer": keras.regularizers.serialize(keras.regularizers.L2(0.3)), "bias_initializer": "ones"},
    {"activity_regularizer": "l2"},
    {"activity_regularizer": keras.regularizers.L1(0.1)},
    {"activity_regularizer": keras.regularizers.serialize(keras.regularizers.L2(0.3))},
    {"kernel_constraint": "non_neg"},
    {"kernel_constraint": keras.constraints.MaxNorm(0.5)},
    {"kernel_constraint": keras.constraints.serialize(keras.constraints.UnitNorm(axis=1))},
    {"bias_constraint": "non_neg"},
    {"bias_constraint": keras.constraints.MaxNorm(0.5, axis=-1)},
    {"bias_constraint": keras.constraints.serialize(keras.constraints.MinMaxNorm(0.1, 0.2))},
]
ARGUMENTS = [kwargs for kwargs in ARGUMENTS if set(kwargs) <= OFFERED]

# Shapes of query, key and value, with the arguments they call for.
SITUATIONS = {
    "self_attention": ((2, 5, 6), (2, 5, 6), (2, 5, 6), {}),
    "cross_attention": ((2, 5, 6), (2, 3, 4), (2, 3, 7), {}),
    "one_attention_axis": ((2, 3, 5, 6), (2, 3, 4, 6), (2, 3, 4, 6), {"attention_axes": 2}),
    "two_attention_axes": ((2, 3, 5, 6), (2, 4, 2, 6), (2, 4, 2, 6), {"attention_axes": (1, 2)}),
    "gate": ((2, 5, 6), (2, 3, 4), (2, 3, 7), {"use_gate": True}),
    "sliding_window": ((2, 5, 6), (2, 5, 6), (2, 5, 6), {"sliding_window": 2}),
    "no_bias": ((2, 5, 6), (2, 3, 4), (2, 3, 7), {"use_bias": False}),
    "other_widths": ((2, 5, 6), (2, 3, 4), (2, 3, 7), {"value_dim": 3, "output_shape": (2, 7)}),
}
SITUATIONS = {name: situation for name, situation in SITUATIONS.items() if set(situation[-1]) <= OFFERED}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def layer():
    return InterpretableMultiHeadAttention(d_model=4, n_head=2, dropout_rate=0.5)


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 5, 6), dtype="float32")


def keras_attention(layer, query, key, value, **kwargs):
    """Keras' own layer with the weights of `layer`, and nothing else in common with it."""
    attention = keras.layers.MultiHeadAttention(
        layer.n_head, layer.d_model, dropout=layer.dropout_rate, dtype=layer.dtype_policy, **kwargs
    )
    attention.build(query.shape, value.shape, key.shape)
    attention.set_weights(layer.get_weights())
    return attention


def assert_same(ours, theirs, dtype="float32"):
    ours, theirs = ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs)
    assert ours.dtype == theirs.dtype
    # In half precision, Keras rounds the logits; the layer does not.
    atol = {"float64": 1e-14, "float32": 1e-6, "float16": 4e-3, "bfloat16": 3e-2}[dtype.removeprefix("mixed_")]
    np.testing.assert_allclose(np.float64(ours), np.float64(theirs), rtol=0, atol=atol)


# The interface


def test_package_and_module_path_offer_the_same_class():
    module = importlib.import_module("kerasfactory.layers.InterpretableMultiHeadAttention")

    assert module.InterpretableMultiHeadAttention is InterpretableMultiHeadAttention
    assert "InterpretableMultiHeadAttention" in kerasfactory.layers.__all__
    assert issubclass(InterpretableMultiHeadAttention, keras.layers.Layer)


def test_signature_is_the_published_one():
    parameters = inspect.signature(InterpretableMultiHeadAttention).parameters

    assert list(parameters) == ["d_model", "n_head", "dropout_rate", "kwargs"]
    assert parameters["d_model"].default is inspect.Parameter.empty
    assert parameters["n_head"].default is inspect.Parameter.empty
    assert parameters["dropout_rate"].default == 0.1
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD


def test_call_takes_query_then_key_then_value():
    parameters = list(inspect.signature(InterpretableMultiHeadAttention.call).parameters)

    assert parameters[:4] == ["self", "query", "key", "value"]
    assert set(parameters) == set(inspect.signature(keras.layers.MultiHeadAttention.call).parameters)


@pytest.mark.parametrize(("d_model", "n_head"), [(128, 12), (1, 1), (7, 3), (np.int64(4), np.int32(2))])
def test_d_model_is_the_size_of_each_head_and_n_head_need_not_divide_it(rng, d_model, n_head):
    layer = InterpretableMultiHeadAttention(d_model, n_head)

    output = layer(rng.standard_normal((2, 3, 10), dtype="float32"))

    assert (layer.mha.key_dim, layer.mha.value_dim, layer.mha.num_heads) == (d_model, d_model, n_head)
    kernels = [weight.shape for weight in layer.weights if weight.name == "kernel"]
    assert kernels == [(10, n_head, d_model)] * 3 + [(n_head, d_model, 10)]
    assert output.shape == (2, 3, 10)
    assert layer.attention_scores.shape == (2, n_head, 3, 3)


@pytest.mark.parametrize(("output_shape", "expected"), [(7, (7,)), ((7,), (7,)), ([3, 4], (3, 4))])
def test_output_shape_replaces_the_width_of_the_query(x, output_shape, expected):
    layer = InterpretableMultiHeadAttention(4, 2, output_shape=output_shape)

    assert layer(x).shape == (2, 5, *expected)
    assert layer.compute_output_shape(x.shape) == (2, 5, *expected)
    assert layer(keras.Input((5, 6))).shape == (None, 5, *expected)


def test_key_and_value_are_not_swapped(layer, rng):
    query, key, value = rng.standard_normal((3, 2, 5, 6), dtype="float32")

    output = layer(query, key, value)

    attention = keras_attention(layer, query, key, value)
    assert_same(output, attention(query, value, key=key))
    assert not np.allclose(ops.convert_to_numpy(output), ops.convert_to_numpy(attention(query, key, key=value)))


def test_key_alone_decides_the_scores(layer, rng):
    query, key, value, other = rng.standard_normal((4, 2, 5, 6), dtype="float32")

    layer(query, key, value)
    scores = np.asarray(layer.attention_scores)

    layer(query, key, other)
    assert np.array_equal(layer.attention_scores, scores)
    layer(query, other, value)
    assert not np.allclose(layer.attention_scores, scores)


def test_key_and_value_may_be_as_wide_as_they_like(rng):
    layer = InterpretableMultiHeadAttention(4, 2)

    output = layer(
        rng.standard_normal((2, 5, 6), dtype="float32"),
        rng.standard_normal((2, 3, 4), dtype="float32"),
        rng.standard_normal((2, 3, 7), dtype="float32"),
    )

    assert output.shape == (2, 5, 6)
    assert layer.attention_scores.shape == (2, 2, 5, 3)


def test_key_defaults_to_the_query_and_value_to_the_key(layer, rng):
    query, key, value = rng.standard_normal((3, 2, 5, 6), dtype="float32")

    assert_same(layer(query), layer(query, query, query))
    assert_same(layer(query, key), layer(query, key, key))
    assert_same(layer(query=query, value=value), layer(query, query, value))
    assert_same(layer(value=value, key=key, query=query), layer(query, key, value))


# The arguments that are Keras'


@pytest.mark.parametrize("kwargs", ARGUMENTS, ids="+".join)
def test_each_argument_acts_as_in_keras(rng, kwargs):
    x = rng.standard_normal((2, 3, 5, 6) if "attention_axes" in kwargs else (2, 5, 6), dtype="float32")

    keras.utils.set_random_seed(0)
    layer = InterpretableMultiHeadAttention(4, 2, **{"seed": 1, **kwargs})
    layer.build(x.shape)
    keras.utils.set_random_seed(0)
    attention = keras.layers.MultiHeadAttention(2, 4, dropout=0.1, **{"seed": 1, **kwargs})
    attention.build(x.shape, x.shape)

    for ours, theirs in zip(layer.weights, attention.weights, strict=True):
        assert_same(ours, theirs)
        for role in ("regularizer", "constraint"):
            assert str(vars(getattr(ours, role) or object)) == str(vars(getattr(theirs, role) or object))
            assert type(getattr(ours, role)) is type(getattr(theirs, role))
    output, scores = layer(x, return_attention_scores=True, training=True)
    expected_output, expected_scores = attention(x, x, return_attention_scores=True, training=True)
    assert_same(output, expected_output)
    assert_same(scores, expected_scores)
    losses, expected_losses = (sorted(map(float, map(ops.convert_to_numpy, one.losses))) for one in (layer, attention))
    assert losses == expected_losses


@pytest.mark.parametrize("kwargs", ARGUMENTS, ids="+".join)
def test_each_argument_survives_config_and_file(rng, tmp_path, kwargs):
    shape = (3, 5, 6) if "attention_axes" in kwargs else (5, 6)
    x = rng.standard_normal((2, *shape), dtype="float32")
    inputs = keras.Input(shape)
    layer = InterpretableMultiHeadAttention(4, 2, 0.3, **kwargs)
    model = keras.Model(inputs, layer(inputs))
    config = layer.get_config()

    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")

    # JSON, the language of `.keras` files, knows no tuples.
    as_json = json.loads(json.dumps(config))
    fresh = InterpretableMultiHeadAttention(4, 2, 0.3, name=layer.name, **kwargs)
    assert fresh.get_config() == config
    assert InterpretableMultiHeadAttention.from_config(config).get_config() == config
    for rebuilt in (InterpretableMultiHeadAttention.from_config(as_json), reloaded.layers[-1]):
        assert json.loads(json.dumps(rebuilt.get_config())) == as_json
    assert_same(reloaded(x), model(x))

    reached = fresh.mha.get_config()
    expected = keras.layers.MultiHeadAttention(2, 4, **kwargs).get_config()
    assert {name: reached.get(name) for name in kwargs} == {name: expected.get(name) for name in kwargs}


def test_flash_attention_reaches_keras_and_the_config():
    with pytest.raises(ValueError, match="Dropout is not supported when flash attention is enabled"):
        InterpretableMultiHeadAttention(4, 2, 0.1, flash_attention=True)

    layer = InterpretableMultiHeadAttention(4, 2, 0, flash_attention=True)
    assert layer.get_config()["flash_attention"] is True
    assert InterpretableMultiHeadAttention.from_config(layer.get_config()).get_config() == layer.get_config()


@pytest.mark.parametrize("rate", [0, 0.0, 0.5, 0.999, np.float32(0.5), np.int64(0)])
def test_dropout_rate_is_any_number_from_zero_to_one(rate):
    layer = InterpretableMultiHeadAttention(4, 2, rate)

    assert layer.mha.dropout == rate
    assert json.loads(json.dumps(layer.get_config()))["dropout_rate"] == rate


def test_config_names_every_argument(layer):
    keras_arguments = set(inspect.signature(keras.layers.MultiHeadAttention.__init__).parameters)
    keras_arguments -= {"self", "kwargs", "num_heads", "key_dim", "dropout"}

    expected = {"d_model", "n_head", "dropout_rate", "name", "dtype", "trainable", *keras_arguments}

    assert set(layer.get_config()) == expected
    assert expected >= {name for kwargs in ARGUMENTS for name in kwargs}


def test_name_and_dtype_are_those_of_the_layer(x):
    layer = InterpretableMultiHeadAttention(4, 2, name="reads_itself", dtype="mixed_bfloat16")
    clone = InterpretableMultiHeadAttention.from_config(layer.get_config())

    for one in (layer, clone):
        assert one.name == "reads_itself"
        assert keras.backend.standardize_dtype(one(x).dtype) == "bfloat16"
        assert keras.backend.standardize_dtype(one.attention_scores.dtype) == BFLOAT16_SCORES
        assert {weight.dtype for weight in one.weights} == {"float32"}


def test_a_layer_that_is_not_trainable_stays_as_it_is(x, tmp_path):
    inputs = keras.Input((5, 6))
    layer = InterpretableMultiHeadAttention(4, 2, trainable=False)
    model = keras.Model(inputs, keras.layers.Dense(6)(layer(inputs)))
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")

    for one in (model, reloaded):
        before = one.layers[1].get_weights()
        one.compile("sgd", "mse")
        one.fit(x, x, verbose=0)
        assert not one.layers[1].trainable
        assert len(one.trainable_weights) == 2
        assert all(np.array_equal(*pair) for pair in zip(before, one.layers[1].get_weights(), strict=True))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("use_bais", "Did you mean `use_bias`?"),
        ("kernel_initialiser", "Did you mean `kernel_initializer`?"),
        ("num_heads", "Did you mean `n_head`?"),
        ("key_dim", "Did you mean `d_model`?"),
        ("dropout", "Did you mean `dropout_rate`?"),
        ("nonsense", "Known arguments: d_model, n_head, dropout_rate, value_dim,"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_near_miss(name, hint):
    with pytest.raises(ValueError, match=f"no argument `{name}`") as error:
        InterpretableMultiHeadAttention(4, 2, **{name: 17})

    assert hint in str(error.value)
    assert f"Received: {name}=17" in str(error.value)


# Equal to Keras


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64:UserWarning")  # JAX has none, unless told to
@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_output_and_scores_are_those_of_keras(rng, situation, dtype):
    *shapes, kwargs = SITUATIONS[situation]
    query, key, value = (rng.standard_normal(shape, dtype="float32") for shape in shapes)
    layer = InterpretableMultiHeadAttention(4, 2, dtype=dtype, **kwargs)

    output, scores = layer(query, key, value, return_attention_scores=True)

    attention = keras_attention(layer, query, key, value, **kwargs)
    expected_output, expected_scores = attention(query, value, key=key, return_attention_scores=True)
    assert_same(output, expected_output, dtype)
    assert_same(scores, expected_scores, dtype)
    scores_dtype = BFLOAT16_SCORES if layer.compute_dtype == "bfloat16" else layer.compute_dtype
    assert_same(layer.attention_scores, ops.cast(expected_scores, scores_dtype), dtype)
    assert_same(layer(query, key, value), expected_output, dtype)


@pytest.mark.parametrize("use_causal_mask", [False, True])
@pytest.mark.parametrize(
    "situation", sorted(SITUATIONS.keys() & {"self_attention", "cross_attention", "gate", "sliding_window", "no_bias"})
)
def test_output_is_that_of_the_fused_kernel(rng, situation, use_causal_mask):
    *shapes, kwargs = SITUATIONS[situation]
    query, key, value = (rng.standard_normal(shape, dtype="float32") for shape in shapes)
    layer = InterpretableMultiHeadAttention(4, 2, dropout_rate=0, **kwargs)

    output = ops.convert_to_numpy(layer(query, key, value, use_causal_mask=use_causal_mask))

    attention = keras_attention(layer, query, key, value, **kwargs)
    expected = ops.convert_to_numpy(attention(query, value, key=key, use_causal_mask=use_causal_mask))
    assert np.abs(output - expected).max() < 1e-6


def test_weights_come_in_the_order_and_under_the_names_of_keras(x):
    layer = InterpretableMultiHeadAttention(4, 2, name="attention")
    layer.build(x.shape)

    parts = ["query", "key", "value", "attention_output"]
    assert [weight.path for weight in layer.weights] == [
        f"attention/mha/{part}/{name}" for part in parts for name in ("kernel", "bias")
    ]
    assert layer.trainable_weights == layer.weights


# Training


def test_dropout_acts_in_training_only(layer, x):
    inference = layer(x)

    assert_same(layer(x), inference)
    assert_same(layer(x, training=False), inference)
    assert not np.allclose(ops.convert_to_numpy(layer(x, training=True)), ops.convert_to_numpy(inference))


def test_training_comes_from_the_context_unless_it_is_given(layer, x):
    class Block(keras.layers.Layer):
        def __init__(self, **given):
            super().__init__()
            self.attention, self.given = layer, given

        def call(self, inputs):
            return self.attention(inputs, **self.given)

    inference = ops.convert_to_numpy(layer(x))

    assert np.array_equal(ops.convert_to_numpy(Block()(x)), inference)
    assert not np.allclose(ops.convert_to_numpy(Block()(x, training=True)), inference)
    assert np.array_equal(ops.convert_to_numpy(Block(training=False)(x, training=True)), inference)
    assert not np.allclose(ops.convert_to_numpy(Block(training=True)(x)), inference)


def test_a_model_passes_training_on(layer, x):
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, layer(inputs))
    inference = ops.convert_to_numpy(layer(x))

    assert np.array_equal(ops.convert_to_numpy(model(x)), inference)
    assert not np.allclose(ops.convert_to_numpy(model(x, training=True)), inference)


def test_scores_are_taken_before_dropout(layer, x):
    layer(x)
    inference = np.asarray(layer.attention_scores)

    layer(x, training=True)

    assert np.array_equal(layer.attention_scores, inference)
    assert np.allclose(np.asarray(layer.attention_scores).sum(-1), 1, atol=1e-6)


def test_training_reduces_the_loss_and_moves_every_weight(rng):
    x = rng.standard_normal((64, 5, 6), dtype="float32")
    inputs = keras.Input((5, 6))
    # A bias that all keys share cancels in the softmax and has no gradient: there is nothing for it to learn.
    layer = InterpretableMultiHeadAttention(4, 2, use_bias=False)
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    before = model.get_weights()
    loss = model.evaluate(x, x, verbose=0)

    model.fit(x, x, epochs=5, batch_size=16, verbose=0)

    assert model.evaluate(x, x, verbose=0) < 0.8 * loss
    assert all(np.all(old != new) for old, new in zip(before, model.get_weights(), strict=True))


def test_training_moves_the_biases(x):
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, InterpretableMultiHeadAttention(4, 2, dropout_rate=0)(inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse")

    model.fit(x, x, epochs=2, verbose=0)

    moved = {weight.path.split("/")[-2] for weight in model.weights if np.abs(ops.convert_to_numpy(weight)).min() > 0}
    assert moved >= {"query", "value", "attention_output"}


# Masks


def test_padding_never_gets_weight(layer, tmp_path):
    tokens = np.array([[1, 2, 0, 0], [3, 4, 5, 0]])
    inputs = keras.Input((4,), dtype="int32")
    embedding = keras.layers.Embedding(6, 6, mask_zero=True)
    model = keras.Model(inputs, layer(embedding(inputs)))
    scores_model = keras.Model(inputs, layer.attention_scores)
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    reloaded_scores_model = keras.Model(reloaded.inputs, reloaded.layers[-1].attention_scores)

    layer(embedding(tokens))

    embedded = embedding(tokens)
    attention = keras_attention(layer, embedded, embedded, embedded)
    expected = ops.convert_to_numpy(attention(embedded, embedded, return_attention_scores=True)[1])
    assert np.array_equal(layer.attention_scores, expected)
    for scores in (
        layer.attention_scores,
        scores_model.predict(tokens, verbose=0),
        reloaded_scores_model.predict(tokens, verbose=0),
    ):
        scores = np.asarray(scores)
        assert scores.shape == (2, 2, 4, 4)
        assert np.all(scores[0, :, :, 2:] == 0)
        assert np.all(scores[1, :, :, 3:] == 0)
        # The row of a padded query is zero, as in Keras; every other one is a distribution.
        assert np.allclose(scores.sum(-1)[:, 0], tokens > 0, atol=1e-6)
        assert np.allclose(scores, expected, atol=1e-6)
    assert_same(reloaded(tokens), model(tokens))


def test_padding_never_gets_weight_in_training(layer):
    tokens = np.array([[1, 2, 0, 0], [3, 4, 5, 0]])
    embedding = keras.layers.Embedding(6, 6, mask_zero=True)

    _, scores = layer(embedding(tokens), training=True, return_attention_scores=True)

    assert np.all(ops.convert_to_numpy(scores)[0, :, :, 2:] == 0)
    assert np.all(ops.convert_to_numpy(scores)[1, :, :, 3:] == 0)


@pytest.mark.parametrize("masked", [{"query"}, {"key"}, {"value"}, {"query", "key"}, {"query", "key", "value"}])
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_masks_attached_to_the_inputs_are_honored(rng, masked, dtype):
    layer = InterpretableMultiHeadAttention(4, 2, dtype=dtype)
    arrays = dict(zip(("query", "key", "value"), rng.standard_normal((3, 2, 5, 6), dtype="float32"), strict=True))
    arrays["query"][:, 4:] = arrays["key"][0, 3:] = arrays["value"][:, 2] = 0

    # Keras' layer takes the masks off its inputs, so each of the two gets its own.
    def inputs():
        masking = keras.layers.Masking()
        return {name: masking(array) if name in masked else array for name, array in arrays.items()}

    output, scores = layer(**inputs(), return_attention_scores=True)

    attention = keras_attention(layer, **arrays)
    expected_output, expected_scores = attention(**inputs(), return_attention_scores=True)
    assert_same(output, expected_output, dtype)
    assert_same(scores, expected_scores, dtype)
    if "key" in masked:
        assert np.all(np.asarray(layer.attention_scores)[0, :, :, 3:] == 0)
    if "value" in masked:
        assert np.all(np.asarray(layer.attention_scores)[:, :, :, 2] == 0)


@pytest.mark.parametrize(
    "names",
    [
        ("query_mask",),
        ("key_mask",),
        ("value_mask",),
        ("attention_mask",),
        ("use_causal_mask",),
        ("key_mask", "use_causal_mask"),
        ("query_mask", "key_mask", "value_mask", "attention_mask", "use_causal_mask"),
    ],
    ids="+".join,
)
def test_masks_given_to_the_call_are_honored(layer, rng, names, tmp_path):
    query, key, value = rng.standard_normal((3, 2, 5, 6), dtype="float32")
    masks = {
        "query_mask": np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], "bool"),
        "key_mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], "bool"),
        "value_mask": np.array([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0]], "bool"),
        "attention_mask": rng.random((2, 5, 5)) < 0.7,
    }
    masks = {name: masks[name] for name in names if name in masks}
    causal = {"use_causal_mask": True} if "use_causal_mask" in names else {}

    output, scores = layer(query, key, value, return_attention_scores=True, **masks, **causal)

    attention = keras_attention(layer, query, key, value)
    expected_output, expected_scores = attention(query, value, key=key, return_attention_scores=True, **masks, **causal)
    assert_same(output, expected_output)
    assert_same(scores, expected_scores)

    inputs = [keras.Input((5, 6)) for _ in range(3)]
    mask_inputs = {name: keras.Input(mask.shape[1:], dtype="bool") for name, mask in masks.items()}
    symbolic = layer(*inputs, return_attention_scores=True, **mask_inputs, **causal)
    model = keras.Model([*inputs, *mask_inputs.values()], symbolic)
    model.save(tmp_path / "model.keras")
    for one in (model, keras.models.load_model(tmp_path / "model.keras")):
        predicted = one.predict([query, key, value, *masks.values()], verbose=0)
        assert np.allclose(predicted[0], ops.convert_to_numpy(expected_output), atol=1e-6)
        assert np.allclose(predicted[1], ops.convert_to_numpy(expected_scores), atol=1e-6)
        assert np.array_equal(predicted[1] == 0, ops.convert_to_numpy(expected_scores) == 0)


def test_causal_attention_never_looks_ahead(layer, x):
    layer(x, use_causal_mask=True)

    scores = np.asarray(layer.attention_scores)
    assert np.all(scores[..., np.triu(np.ones((5, 5), "bool"), 1)] == 0)
    assert np.all(scores[..., np.tril(np.ones((5, 5), "bool"))] > 0)


def test_a_row_without_keys_is_zero(layer, x):
    attention_mask = np.ones((2, 5, 5), "bool")
    attention_mask[0, 1] = False

    layer(x, attention_mask=attention_mask)

    sums = np.asarray(layer.attention_scores).sum(-1)
    assert np.all(sums[0, :, 1] == 0)
    sums[0, :, 1] = 1
    assert np.allclose(sums, 1, atol=1e-6)


def test_output_carries_the_mask_of_the_query(layer, rng):
    tokens = np.array([[1, 2, 0, 0], [3, 4, 5, 0]])
    key = rng.standard_normal((2, 3, 6), dtype="float32")
    inputs, key_input = keras.Input((4,), dtype="int32"), keras.Input((3, 6))
    embedding, pooling = keras.layers.Embedding(6, 6, mask_zero=True), keras.layers.GlobalAveragePooling1D()
    model = keras.Model([inputs, key_input], pooling(layer(embedding(inputs), key_input)))

    output = layer(embedding(tokens), key)
    pooled = ops.convert_to_numpy(pooling(output))

    output = ops.convert_to_numpy(output)
    expected = np.stack([output[0, :2].mean(0), output[1, :3].mean(0)])
    assert np.allclose(pooled, expected, atol=1e-6)
    assert np.allclose(model.predict([tokens, key], verbose=0), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_the_masks_of_the_caller_stay_attached(dtype):
    layer = InterpretableMultiHeadAttention(4, 2, dtype=dtype)
    embedded = keras.layers.Embedding(6, 6, mask_zero=True)(np.array([[1, 2, 0, 0]]))
    key = keras.layers.Embedding(6, 6, mask_zero=True)(np.array([[5, 0, 4]]))

    layer(embedded)
    first = np.asarray(layer.attention_scores)
    layer(embedded, key)
    first_cross = np.asarray(layer.attention_scores)

    layer(embedded)
    assert np.array_equal(layer.attention_scores, first)
    layer(embedded, key)
    assert np.array_equal(layer.attention_scores, first_cross)
    assert np.all(first[..., 2:] == 0)
    assert np.all(first_cross[..., 1] == 0)


def test_the_masks_of_the_caller_survive_a_failed_call(layer):
    embedded = keras.layers.Embedding(6, 6, mask_zero=True)(np.array([[1, 2, 0, 0]]))
    layer(embedded)
    scores = np.asarray(layer.attention_scores)

    with pytest.raises(Exception, match=r"(?i)shape|broadcast|dimension|size"):
        layer(embedded, attention_mask=np.ones((1, 9, 9), "bool"))

    layer(embedded)
    assert np.array_equal(layer.attention_scores, scores)


# Scores after eager calls


def test_there_are_no_scores_before_the_first_call(layer, x):
    assert layer.attention_scores is None
    layer.build(x.shape)
    assert layer.attention_scores is None


def test_scores_of_an_eager_call_are_concrete(layer, rng):
    query = rng.standard_normal((2, 5, 6), dtype="float32")
    key = rng.standard_normal((2, 3, 6), dtype="float32")

    _, returned = layer(query, key, return_attention_scores=True)

    # NumPy refuses a PyTorch tensor that is not detached.
    scores = np.asarray(layer.attention_scores)
    assert scores.shape == (2, 2, 5, 3)
    assert scores.dtype == "float32"
    assert np.all(scores > 0)
    assert np.allclose(scores.sum(-1), 1, atol=1e-6)
    assert np.array_equal(scores, ops.convert_to_numpy(returned))


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_numpy_reads_scores_of_low_precision(x, dtype):
    layer = InterpretableMultiHeadAttention(4, 2, dtype=dtype)

    layer(x)

    assert np.allclose(np.asarray(layer.attention_scores).astype("float32").sum(-1), 1, atol=0.02)


def test_the_latest_eager_call_decides(layer, rng):
    first, second = rng.standard_normal((2, 2, 5, 6), dtype="float32")

    layer(first)
    of_first = layer.attention_scores
    kept = np.asarray(of_first).copy()
    layer(second[:, :3])

    assert layer.attention_scores.shape == (2, 2, 3, 3)
    assert np.array_equal(of_first, kept)


def test_calling_a_model_counts_as_an_eager_call(layer, x):
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, layer(inputs))
    expected = keras.Model(inputs, layer.attention_scores).predict(x, verbose=0)

    model(x)

    assert np.allclose(layer.attention_scores, expected, atol=1e-6)


# Scores in models


@pytest.mark.parametrize(
    ("shapes", "kwargs", "expected"),
    [
        ([(5, 6)], {}, (None, 2, 5, 5)),
        ([(None, 6)], {}, (None, 2, None, None)),
        ([(5, 6), (3, 4)], {}, (None, 2, 5, 3)),
        ([(5, 6), (None, 4)], {}, (None, 2, 5, None)),
        ([(5, 6), (3, 4), (3, 7)], {}, (None, 2, 5, 3)),
        ([(3, 5, 6)], {}, (None, 2, 3, 5, 3, 5)),
        ([(3, 5, 6)], {"attention_axes": 1}, (None, 5, 2, 3, 3)),
        ([(3, 5, 6)], {"attention_axes": 2}, (None, 3, 2, 5, 5)),
        ([(3, 5, 6)], {"attention_axes": -2}, (None, 3, 2, 5, 5)),
        ([(3, 5, 6), (3, 4, 6)], {"attention_axes": 2}, (None, 3, 2, 5, 4)),
        ([(3, 5, 6), (4, 2, 6)], {"attention_axes": (1, 2)}, (None, 2, 3, 5, 4, 2)),
        ([(3, 5, 6), (4, 2, 6)], {"attention_axes": (2, 1)}, (None, 2, 5, 3, 2, 4)),
        ([(3, 5, 7, 6)], {"attention_axes": (1, 3)}, (None, 5, 2, 3, 7, 3, 7)),
    ],
    ids=str,
)
def test_symbolic_scores_have_the_shape_of_the_real_ones(rng, shapes, kwargs, expected):
    inputs = [keras.Input(shape) for shape in shapes]
    arrays = [rng.standard_normal([size or 4 for size in (2, *shape)], dtype="float32") for shape in shapes]
    layer = InterpretableMultiHeadAttention(4, 2, **kwargs)
    keras.Model(inputs, layer(*inputs))

    scores = layer.attention_scores
    layer(*arrays)

    assert isinstance(scores, keras.KerasTensor)
    assert scores.shape == expected
    assert scores.dtype == "float32"
    real = layer.attention_scores.shape
    assert len(real) == len(expected)
    assert all(size in (None, real_size) for size, real_size in zip(expected[1:], real[1:], strict=True))


def test_scores_of_a_functional_model_can_be_predicted(layer, rng):
    query = rng.standard_normal((3, 5, 6), dtype="float32")
    key = rng.standard_normal((3, 4, 6), dtype="float32")
    inputs = [keras.Input((5, 6)), keras.Input((4, 6))]
    model = keras.Model(inputs, layer(*inputs))

    scores = keras.Model(model.inputs, layer.attention_scores).predict([query, key], verbose=0)

    _, expected = layer(query, key, return_attention_scores=True)
    assert np.allclose(scores, ops.convert_to_numpy(expected), atol=1e-6)
    assert isinstance(model.output, keras.KerasTensor)


def test_the_layer_has_one_output_whether_or_not_its_scores_are_read(layer):
    inputs = keras.Input((5, 6))
    outputs = layer(inputs)

    assert layer.output is outputs
    assert isinstance(layer.attention_scores, keras.KerasTensor)
    assert layer.output is outputs
    assert layer.input is inputs


@pytest.mark.parametrize("deferred", [False, True])
def test_scores_of_a_sequential_model_can_be_predicted(layer, x, deferred, tmp_path):
    model = keras.Sequential([] if deferred else [keras.Input((5, 6))])
    model.add(layer)
    model.add(keras.layers.Dense(3))
    if deferred:
        model.build((None, 5, 6))
    assert layer.attention_scores.shape == (None, 2, 5, 5)
    scores = keras.Model(model.inputs, layer.attention_scores).predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")

    reloaded_scores = keras.Model(reloaded.inputs, reloaded.layers[0].attention_scores)

    _, expected = layer(x, return_attention_scores=True)
    assert np.allclose(scores, ops.convert_to_numpy(expected), atol=1e-6)
    assert np.allclose(reloaded_scores.predict(x, verbose=0), scores, atol=1e-6)


@pytest.mark.parametrize("training", ["before_saving", "after_loading"])
def test_scores_of_a_trained_and_reloaded_model_are_symbolic(layer, rng, tmp_path, training):
    query = rng.standard_normal((4, 5, 6), dtype="float32")
    key = rng.standard_normal((4, 3, 6), dtype="float32")
    inputs = [keras.Input((5, 6)), keras.Input((3, 6))]
    model = keras.Model(inputs, layer(*inputs))
    model.compile("sgd", "mse")
    if training == "before_saving":
        model.fit([query, key], query, verbose=0)
    model.save(tmp_path / "model.keras")

    reloaded = keras.models.load_model(tmp_path / "model.keras")
    scores = reloaded.layers[-1].attention_scores
    if training == "after_loading":
        reloaded.fit([query, key], query, verbose=0)

    assert scores.shape == (None, 2, 5, 3)
    predicted = keras.Model(reloaded.inputs, scores).predict([query, key], verbose=0)
    _, expected = reloaded.layers[-1](query, key, return_attention_scores=True)
    assert np.allclose(predicted, ops.convert_to_numpy(expected), atol=1e-6)


@pytest.mark.parametrize("compiled_by", ["fit", "predict", "evaluate"])
def test_scores_of_a_functional_model_survive_its_compiled_calls(layer, x, compiled_by):
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse")

    getattr(model, compiled_by)(x, *([x] if compiled_by != "predict" else []), verbose=0)

    scores = layer.attention_scores
    if COMPILES:
        assert isinstance(scores, keras.KerasTensor)
        scores = keras.Model(model.inputs, scores).predict(x, verbose=0)
    assert np.asarray(scores).shape == (2, 2, 5, 5)
    assert np.allclose(np.asarray(scores).sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("compiled_by", ["fit", "predict", "evaluate"])
def test_eager_scores_survive_compiled_calls(layer, x, compiled_by):
    model = keras.Sequential([keras.Input((5, 6)), layer])
    model.compile("sgd", "mse")
    other = x[:, ::-1]
    model(x)
    scores = np.asarray(layer.attention_scores)

    getattr(model, compiled_by)(other, *([other] if compiled_by != "predict" else []), verbose=0)

    # The latest call that was not compiled decides.
    assert np.array_equal(layer.attention_scores, scores) == COMPILES


@pytest.mark.parametrize("compiled_by", ["fit", "predict", "evaluate"])
def test_scores_of_a_model_that_only_ran_compiled_say_what_to_call(layer, x, compiled_by):
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.attention = layer

        def build(self, input_shape):
            self.attention.build(input_shape)

        def call(self, inputs):
            return self.attention(inputs)

    model = Subclassed()
    # JAX's `predict` would run an unbuilt model eagerly once, and that would count.
    model.build(x.shape)
    model.compile("sgd", "mse")

    getattr(model, compiled_by)(x, *([x] if compiled_by != "predict" else []), verbose=0)

    if COMPILES:
        with pytest.raises(RuntimeError, match=r"model\(x\)") as error:
            _ = layer.attention_scores
        assert layer.name in str(error.value)
        assert "return_attention_scores=True" in str(error.value)
        assert "`explain.capture(model, x)`" in str(error.value)
    captured = explain.capture(model, x, verbose=0)[layer.name]
    model(x)
    np.testing.assert_allclose(captured, np.asarray(layer.attention_scores), atol=1e-6)
    assert np.allclose(np.asarray(layer.attention_scores).sum(-1), 1, atol=1e-6)


def test_scores_of_a_model_that_runs_eagerly_are_those_of_the_last_batch(layer, rng):
    x = rng.standard_normal((5, 5, 6), dtype="float32")
    model = keras.Sequential([keras.Input((5, 6)), layer])
    model.compile("sgd", "mse", run_eagerly=True)

    model.predict(x, batch_size=3, verbose=0)
    scores = np.asarray(layer.attention_scores)

    _, expected = layer(x[3:], return_attention_scores=True)
    assert np.allclose(scores, ops.convert_to_numpy(expected), atol=1e-6)


def test_a_symbolic_tensor_taken_earlier_stays_usable(layer, x):
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, layer(inputs))
    scores = layer.attention_scores
    scores_model = keras.Model(model.inputs, scores)
    scores_model.predict(x, verbose=0)
    model.compile("sgd", "mse")

    model.fit(x, x, verbose=0)
    other_inputs = keras.Input((3, 6))
    layer(other_inputs, return_attention_scores=True)
    layer(x)

    expected = np.asarray(layer.attention_scores)
    assert np.allclose(scores_model.predict(x, verbose=0), expected, atol=1e-6)
    assert np.allclose(keras.Model(model.inputs, scores).predict(x, verbose=0), expected, atol=1e-6)


def test_the_latest_symbolic_call_decides(layer, rng):
    first, second = rng.standard_normal((2, 2, 5, 6), dtype="float32")
    inputs = [keras.Input((5, 6)), keras.Input((5, 6))]

    first_output = layer(inputs[0])
    of_first = layer.attention_scores
    second_output = layer(inputs[1])
    of_second = layer.attention_scores

    model = keras.Model(inputs, [first_output, second_output, of_first, of_second])
    predicted = model.predict([first, second], verbose=0)
    for array, output, scores in zip((first, second), predicted[:2], predicted[2:], strict=True):
        expected_output, expected_scores = layer(array, return_attention_scores=True)
        assert np.allclose(output, ops.convert_to_numpy(expected_output), atol=1e-6)
        assert np.allclose(scores, ops.convert_to_numpy(expected_scores), atol=1e-6)


def test_calls_that_return_scores_and_calls_that_do_not_mix_in_a_graph(layer, rng):
    first, second, third = rng.standard_normal((3, 2, 5, 6), dtype="float32")
    inputs = [keras.Input((5, 6)) for _ in range(3)]

    alone = layer(inputs[0])
    output, scores = layer(inputs[1], return_attention_scores=True)
    last = layer(inputs[2])
    last_scores = layer.attention_scores

    predicted = keras.Model(inputs, [alone, output, scores, last, last_scores]).predict(
        [first, second, third], verbose=0
    )
    expected = [layer(first), *layer(second, return_attention_scores=True)]
    expected += [*layer(third, return_attention_scores=True)]
    assert [array.shape for array in predicted] == [tuple(array.shape) for array in expected]
    for ours, theirs in zip(predicted, expected, strict=True):
        assert np.allclose(ours, ops.convert_to_numpy(theirs), atol=1e-6)


def test_an_eager_call_with_scores_may_come_before_the_graph(layer, x):
    _, expected = layer(x, return_attention_scores=True)
    inputs = keras.Input((5, 6))

    model = keras.Model(inputs, [layer(inputs), layer.attention_scores])

    assert np.allclose(model.predict(x, verbose=0)[1], ops.convert_to_numpy(expected), atol=1e-6)


def test_scores_of_a_nested_model_belong_to_its_inputs(layer, x, tmp_path):
    inner_inputs = keras.Input((5, 6))
    inner = keras.Model(inner_inputs, layer(inner_inputs), name="inner")
    inputs = keras.Input((5, 6))
    outer = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)))
    outer.compile("sgd", "mse")
    scores_model = keras.Model(inner.inputs, layer.attention_scores)
    outer.fit(x, x[..., :2], verbose=0)
    outer.save(tmp_path / "model.keras")

    nested = keras.models.load_model(tmp_path / "model.keras").get_layer("inner")

    _, expected = layer(x, return_attention_scores=True)
    reloaded_scores_model = keras.Model(nested.inputs, nested.layers[-1].attention_scores)
    assert np.allclose(scores_model.predict(x, verbose=0), ops.convert_to_numpy(expected), atol=1e-6)
    assert np.allclose(reloaded_scores_model.predict(x, verbose=0), ops.convert_to_numpy(expected), atol=1e-6)


def test_a_model_of_scores_can_be_saved(layer, x, tmp_path):
    inputs = keras.Input((5, 6))
    outputs = layer(inputs)
    both = keras.Model(inputs, [outputs, layer.attention_scores])
    scores_only = keras.Model(inputs, layer.attention_scores)

    for model in (both, scores_only):
        model.save(tmp_path / "model.keras")
        reloaded = keras.models.load_model(tmp_path / "model.keras")

        assert reloaded.count_params() == model.count_params() == layer.count_params()
        for ours, theirs in zip(
            keras.tree.flatten(reloaded.predict(x, verbose=0)),
            keras.tree.flatten(model.predict(x, verbose=0)),
            strict=True,
        ):
            assert np.allclose(ours, theirs, atol=1e-6)


def test_a_reloaded_model_of_scores_shares_its_weights_with_the_output(layer, x, tmp_path):
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, [*layer(inputs, return_attention_scores=True)])
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    attention = next(one for one in reloaded.layers if isinstance(one, InterpretableMultiHeadAttention))

    attention.set_weights([2 * weight for weight in attention.get_weights()])

    _, expected = attention(x, return_attention_scores=True)
    assert np.allclose(reloaded.predict(x, verbose=0)[1], ops.convert_to_numpy(expected), atol=1e-6)


def test_reading_scores_does_not_change_the_loss(x):
    inputs = keras.Input((5, 6))
    layer = InterpretableMultiHeadAttention(4, 2, activity_regularizer="l2", kernel_regularizer="l1")
    model = keras.Model(inputs, layer(inputs))
    with_scores = keras.Model(inputs, [model.output, layer.attention_scores])

    model(x)
    losses = sorted(float(ops.convert_to_numpy(loss)) for loss in model.losses)
    with_scores(x)

    assert sorted(float(ops.convert_to_numpy(loss)) for loss in with_scores.losses) == losses


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")  # for value and output, as asserted below
def test_scores_can_be_part_of_a_trained_model(layer, x):
    inputs = keras.Input((5, 6))
    outputs, scores = layer(inputs, return_attention_scores=True)
    model = keras.Model(inputs, [outputs, scores])
    before = layer.get_weights()
    model.compile(keras.optimizers.Adam(0.01), [None, "mse"])

    # Heads that are asked to attend to the next token: only query and key can learn that.
    target = np.broadcast_to(np.roll(np.eye(5, dtype="float32"), 1, axis=1), (2, 2, 5, 5))
    history = model.fit(x, [x, target], epochs=20, verbose=0).history["loss"]

    assert history[-1] < history[0]
    moved = [not np.array_equal(*pair) for pair in zip(before, layer.get_weights(), strict=True)]
    assert moved[0]
    assert moved[2]
    assert not any(moved[4:])


# Copies and configs


def test_config_is_not_mutated():
    config = InterpretableMultiHeadAttention(
        4, 2, attention_axes=[1], output_shape=[3, 4], kernel_initializer=keras.initializers.Constant(0.2)
    ).get_config()
    before = copy.deepcopy(config)

    rebuilt = InterpretableMultiHeadAttention.from_config(config)
    rebuilt(np.zeros((1, 3, 5, 6), "float32"))

    assert config == before
    assert rebuilt.get_config() == before


def test_arguments_are_not_mutated(x):
    attention_axes, output_shape = [-2], [3, 4]
    layer = InterpretableMultiHeadAttention(4, 2, attention_axes=attention_axes, output_shape=output_shape)

    layer(x)

    assert (attention_axes, output_shape) == ([-2], [3, 4])


def test_the_class_is_registered_under_the_package():
    name = "kerasfactory.layers>InterpretableMultiHeadAttention"

    assert keras.saving.get_registered_name(InterpretableMultiHeadAttention) == name
    assert keras.saving.get_registered_object(name) is InterpretableMultiHeadAttention


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("moment", ["built", "read", "called", "trained"])
def test_a_model_can_be_copied(layer, x, moment, duplicate):
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, layer(inputs))
    if moment == "read":
        assert layer.attention_scores is not None
    if moment == "called":
        model(x)
    if moment == "trained":
        model.compile("sgd", "mse")
        model.fit(x, x, verbose=0)

    copied = duplicate(model)

    assert_same(copied(x), model(x))
    assert np.array_equal(copied.layers[-1].attention_scores, layer.attention_scores)


# Errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("d_model", "n_head")
            for value in (0, -1, 2.0, "8", None, True, float("nan"), [4])
        ),
        *(("value_dim", value) for value in (0, -1, 2.5, "8", True)),
        *(("output_shape", value) for value in (0, -1, 2.5, "8", True)),
        *(("sliding_window", value) for value in (0, -1, 2.5, "8", True) if "sliding_window" in OFFERED),
        *(
            ("dropout_rate", value)
            for value in (-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), "0.1", None, True, [0.1])
        ),
        *(("attention_axes", value) for value in ("a", 1.5, True)),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(name, value):
    arguments = {"d_model": 4, "n_head": 2, name: value}

    with pytest.raises(ValueError, match=f"`{name}`") as error:
        InterpretableMultiHeadAttention(**arguments)

    assert f"Received: {name}={value!r}" in str(error.value) or f"Received: {name}={value}" in str(error.value)


@pytest.mark.parametrize(("value", "wrong"), [((4, 0), "0"), ((2.5, 4), "2.5"), ([True], "True")])
def test_a_wrong_size_in_output_shape_is_named(value, wrong):
    with pytest.raises(ValueError, match="`output_shape`") as error:
        InterpretableMultiHeadAttention(4, 2, output_shape=value)

    assert wrong in str(error.value).split("Received: output_shape=")[1]


@pytest.mark.parametrize(
    "attention_axes", [0, -1, 3, -4, 17, -5, (0, 1), (1, 3), (1, 1), (1, -3), (), (1.5,), ("a",), (True,)], ids=str
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_wrong_attention_axes_are_named_with_their_value(attention_axes, symbolic):
    x = keras.Input((3, 5, 6)) if symbolic else np.zeros((2, 3, 5, 6), "float32")

    with pytest.raises(ValueError, match="`attention_axes`") as error:
        InterpretableMultiHeadAttention(4, 2, attention_axes=attention_axes)(x)

    assert f"Received: attention_axes={attention_axes!r}" in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        ({"query": (2, 5, 6), "key": (2, 3, 6), "value": (2, 4, 6)}, ["key", "value", "same length"]),
        ({"query": (2, 5, 6), "value": (2, 4, 6)}, ["key", "value", "same length"]),
        ({"query": (2, 3, 5, 6), "key": (2, 3, 4, 6), "value": (2, 3, 2, 6)}, ["key", "value", "same length"]),
        ({"query": (2, 6)}, ["query", "three axes", "FeatureTokenizer"]),
        ({"query": (6,)}, ["query", "three axes"]),
        ({"query": ()}, ["query", "three axes"]),
        ({"query": (2, 5, 6), "key": (2, 6)}, ["key", "as many axes as `query`, 3"]),
        ({"query": (2, 5, 6), "key": (2, 5, 6), "value": (2, 3, 5, 6)}, ["value", "as many axes as `query`, 3"]),
        ({"query": (2, 5, 6), "key": (3, 5, 6)}, ["key", "batch size of `query`, 2"]),
        ({"query": (2, 5, 6), "key": (1, 5, 6)}, ["key", "batch size of `query`, 2"]),
        ({"query": (2, 5, 6), "key": (2, 5, 6), "value": (4, 5, 6)}, ["value", "batch size of `query`, 2"]),
        ({"query": (0, 5, 6)}, ["query", "empty"]),
        ({"query": (2, 0, 6)}, ["query", "empty"]),
        ({"query": (2, 5, 0)}, ["query", "empty"]),
        ({"query": (2, 5, 6), "key": (2, 0, 6)}, ["key", "empty"]),
        ({"query": (2, 5, 6), "key": (2, 3, 6), "value": (2, 3, 0)}, ["value", "empty"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_inputs_that_do_not_fit_are_named_with_their_shapes(layer, shapes, names, symbolic):
    make = (lambda shape: keras.KerasTensor(shape)) if symbolic else np.zeros

    with pytest.raises(ValueError, match=f"`{names[0]}`") as error:
        layer(**{name: make(shape) for name, shape in shapes.items()})

    assert all(name in str(error.value) for name in names)
    assert all(f"{name}={shape}" in str(error.value) for name, shape in shapes.items())


def test_a_batch_of_unknown_size_fits_every_batch(layer):
    output = layer(keras.Input((5, 6)), keras.KerasTensor((3, 4, 6)))

    assert output.shape == (None, 5, 6)


# Warnings


def test_neither_layer_warns(tmp_path):
    # A process of its own, since importing is part of the question. It takes seconds to start, hence one for both.
    program = """
        import warnings
        import keras
        import numpy as np

        warnings.simplefilter("error")
        # Keras' own, of every saved variable; Python hides it from users.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

        tokens, table = np.array([[1, 2, 0], [3, 0, 0]]), np.array([[0.5, 1], [-0.5, 2]])
        inputs, table_inputs = keras.Input((3,), dtype="int32"), keras.Input((2,))
        query = keras.layers.Embedding(5, 6, mask_zero=True)(inputs)
        key = FeatureTokenizer(6, ["age", "region"], {"region": 3})(table_inputs)
        layer = InterpretableMultiHeadAttention(4, 2)
        outputs = keras.layers.GlobalAveragePooling1D()(layer(layer(query, use_causal_mask=True), key))
        model = keras.Model([inputs, table_inputs], outputs)
        scores_model = keras.Model(model.inputs, layer.attention_scores)
        model.compile("adam", "mse")
        model.fit([tokens, table], np.zeros((2, 6)), verbose=0)
        model.evaluate([tokens, table], np.zeros((2, 6)), verbose=0)
        model.predict([tokens, table], verbose=0)
        model([tokens, table])
        model.save("model.keras")
        scores_model.save("scores.keras")
        model = keras.models.load_model("model.keras")
        layer = model.get_layer(layer.name)
        keras.Model(model.inputs, layer.attention_scores).predict([tokens, table], verbose=0)
        keras.models.load_model("scores.keras").predict([tokens, table], verbose=0)
        print("done")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=tmp_path)

    assert run.stdout.strip() == "done", run.stderr


@pytest.mark.parametrize(("keys", "warned"), [(1, True), (2, False)])
def test_only_attention_over_a_single_key_warns(rng, keys, warned):
    query = rng.standard_normal((2, 5, 6), dtype="float32")
    key = rng.standard_normal((2, keys, 6), dtype="float32")
    layer = InterpretableMultiHeadAttention(4, 2)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(query, key, return_attention_scores=True)

    assert ["softmax operation will always return the value 1" in str(one.message) for one in caught] == [True] * warned


# Functions that the user compiles. PyTorch has none that Keras compiles for.

if COMPILES:

    def compiled(function):
        if BACKEND == "tensorflow":
            import tensorflow

            return tensorflow.function(function)
        import jax

        return jax.jit(function)

    def test_traced_scores_are_usable_inside_a_compiled_function(layer, x):
        layer.build(x.shape)

        @compiled
        def output_and_confidence(inputs):
            output = layer(inputs)
            return output, ops.max(layer.attention_scores, axis=-1)

        output, confidence = output_and_confidence(x)

        expected_output, expected_scores = layer(x, return_attention_scores=True)
        assert np.allclose(output, expected_output, atol=1e-6)
        assert np.allclose(confidence, np.max(expected_scores, axis=-1), atol=1e-6)

    def test_nothing_leaks_out_of_a_compiled_function(layer, x):
        layer.build(x.shape)
        function = compiled(lambda inputs: (layer(inputs), layer.attention_scores)[0])

        function(x)

        with pytest.raises(RuntimeError, match="return_attention_scores=True"):
            _ = layer.attention_scores

    def test_eager_scores_are_back_after_a_compiled_function(layer, x):
        layer(x)
        scores = np.asarray(layer.attention_scores)
        function = compiled(lambda inputs: (layer(inputs), layer.attention_scores)[1])

        inside = function(x[:, ::-1])

        assert np.array_equal(layer.attention_scores, scores)
        assert np.allclose(inside, scores[:, :, ::-1, ::-1], atol=1e-6)

    def test_symbolic_scores_are_back_after_a_compiled_function(layer, x):
        inputs = keras.Input((5, 6))
        model = keras.Model(inputs, layer(inputs))
        function = compiled(lambda inputs: (model(inputs), layer.attention_scores)[1])

        inside = function(x)

        assert isinstance(layer.attention_scores, keras.KerasTensor)
        predicted = keras.Model(model.inputs, layer.attention_scores).predict(x, verbose=0)
        assert np.allclose(inside, predicted, atol=1e-6)

    def test_scores_of_one_compiled_function_are_not_seen_in_another(layer, x):
        layer(x)
        scores = np.asarray(layer.attention_scores)
        compiled(layer)(x[:, ::-1])

        seen = compiled(lambda inputs: ops.convert_to_tensor(layer.attention_scores) + 0 * inputs[0, 0, 0])(x)

        assert np.array_equal(seen, scores)

    def test_masks_are_honored_in_a_compiled_function(layer):
        tokens = np.array([[1, 2, 0, 0], [3, 4, 5, 0]])
        embedding = keras.layers.Embedding(6, 6, mask_zero=True)
        layer(embedding(tokens))

        scores = compiled(lambda inputs: layer(embedding(inputs), return_attention_scores=True)[1])(tokens)

        assert np.all(np.asarray(scores)[0, :, :, 2:] == 0)
        assert np.allclose(scores, layer.attention_scores, atol=1e-6)

    def test_traced_scores_are_usable_inside_nested_functions(layer, x):
        layer(x[:, ::-1])

        @compiled
        def outer(inputs):
            layer(inputs)
            return compiled(lambda: 2 * layer.attention_scores)()

        doubled = outer(x)

        layer(x)
        assert np.allclose(doubled, 2 * np.asarray(layer.attention_scores), atol=1e-6)

    def test_a_model_compiled_by_xla_keeps_its_scores(layer, x):
        inputs = keras.Input((5, 6))
        model = keras.Model(inputs, layer(inputs))
        model.compile("sgd", "mse", jit_compile=True)

        model.fit(x, x, verbose=0)
        predicted = model.predict(x, verbose=0)

        scores = keras.Model(model.inputs, layer.attention_scores).predict(x, verbose=0)
        expected_output, expected_scores = layer(x, return_attention_scores=True)
        assert np.allclose(predicted, expected_output, atol=1e-6)
        assert np.allclose(scores, expected_scores, atol=1e-6)


if BACKEND == "jax":
    import jax

    TRANSFORMATIONS = {
        "jit": jax.jit,
        "grad": jax.grad,
        "vmap": lambda function: jax.vmap(lambda sample: function(sample[None])),
        "jit(grad)": lambda function: jax.jit(jax.grad(function)),
        "grad(jit)": lambda function: jax.grad(jax.jit(function)),
        "vmap(grad)": lambda function: jax.vmap(lambda sample: jax.grad(function)(sample[None])),
    }

    def test_jax_finds_no_leak(layer, x):
        layer.build(x.shape)

        with jax.checking_leaks():
            output = jax.jit(layer)(x)

        assert np.allclose(output, layer(x), atol=1e-6)

    @pytest.mark.parametrize("transformation", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
    def test_scores_live_as_long_as_their_trace(layer, x, transformation):
        layer.build(x.shape)
        seen = []

        def confidence(inputs):
            layer(inputs)  # nobody keeps the output, from which JAX could reach the scores
            seen.append(weakref.ref(layer.attention_scores))
            return ops.max(layer.attention_scores)

        def expected(inputs):
            return ops.max(layer(inputs, return_attention_scores=True)[1])

        with jax.checking_leaks():
            result = transformation(confidence)(x)

        assert [ref() for ref in seen] == [None]
        with pytest.raises(RuntimeError, match="return_attention_scores=True"):
            _ = layer.attention_scores
        assert np.abs(result).max() > 0
        assert np.allclose(result, transformation(expected)(x), atol=1e-6)


if BACKEND == "tensorflow":
    import tensorflow as tf

    def test_scores_of_a_function_compiled_by_xla_are_those_of_the_eager_call(layer, x):
        layer(x)
        scores = np.asarray(layer.attention_scores)

        function = tf.function(lambda inputs: (layer(inputs), layer.attention_scores)[1], jit_compile=True)

        assert np.allclose(function(x), scores, atol=1e-6)
        assert np.array_equal(layer.attention_scores, scores)

    def test_gradients_flow_through_eager_scores(layer, x):
        inputs = tf.Variable(x)

        with tf.GradientTape() as tape:
            layer(inputs)
            loss = tf.reduce_max(layer.attention_scores)

        assert np.abs(tape.gradient(loss, inputs)).max() > 0

    @pytest.mark.parametrize("with_scores", [False, True])
    def test_a_model_can_be_exported(layer, x, tmp_path, with_scores):
        inputs = keras.Input((5, 6))
        model = keras.Model(inputs, layer(inputs, return_attention_scores=with_scores))
        model.compile("sgd", "mse")
        if not with_scores:
            model.fit(x, x, verbose=0)

        model.export(tmp_path / "model", verbose=False)

        exported = tf.saved_model.load(tmp_path / "model")
        for ours, theirs in zip(
            keras.tree.flatten(exported.serve(x)), keras.tree.flatten(model.predict(x, verbose=0)), strict=True
        ):
            assert np.allclose(ours, theirs, atol=1e-6)


def test_axes_that_are_not_attended_to_must_agree(rng):
    layer = InterpretableMultiHeadAttention(4, 2, attention_axes=1)

    with pytest.raises(ValueError, match="same size on axis 2") as error:
        layer(rng.standard_normal((2, 6, 4, 8)), rng.standard_normal((2, 5, 3, 8)))

    assert "query=(2, 6, 4, 8), key=(2, 5, 3, 8)" in str(error.value)


def test_a_query_without_any_key_in_view_gets_zeros_before_the_output_projection(rng):
    x = rng.standard_normal((2, 3, 6), dtype="float32")
    layer = InterpretableMultiHeadAttention(4, 2, dropout_rate=0, bias_initializer="ones")
    mask = np.ones((2, 3, 3), dtype="bool")
    mask[0, 1] = False

    output = ops.convert_to_numpy(layer(x, attention_mask=mask))

    assert np.all(np.asarray(layer.attention_scores)[0, :, 1] == 0)
    assert np.array_equal(output[0, 1], np.ones(6))
