"""What Keras tests its own multi-head attention for, asked of the layer that wraps it."""

import inspect
import warnings
from importlib.util import find_spec

import keras
import numpy as np
import pytest
from keras import ops

from kerasfactory import _backend, explain
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

BACKEND = keras.config.backend()
GATE = "use_gate" in inspect.signature(keras.layers.MultiHeadAttention).parameters
TORCH_EXPORT = find_spec("keras.src.export.torch") is not None
PROJECTIONS = ("query", "key", "value", "output")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def data(rng):
    """Query and key."""
    return [rng.standard_normal((4, 5, 6), dtype="float32"), rng.standard_normal((4, 3, 6), dtype="float32")]


def numbers(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def assert_close(ours, theirs, atol=1e-6):
    np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=0, atol=atol)


def two_models(**arguments):
    """A model with the layer and one with Keras' own, with the same weights, and these layers."""
    inputs = [keras.Input((5, 6)), keras.Input((3, 6))]
    ours = InterpretableMultiHeadAttention(4, 2, 0.0, name="attention", **arguments)
    theirs = keras.layers.MultiHeadAttention(2, 4, name="attention", **arguments)
    models = [keras.Model(inputs, layer(*inputs)) for layer in (ours, theirs)]
    models[1].set_weights(models[0].get_weights())
    return models, (ours, theirs)


def scores_of_keras(layer, data):
    return numbers(layer(*data, return_attention_scores=True)[1])


# Low-rank adaptation and quantization


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")  # the weights alone are loaded
@pytest.mark.parametrize("adapted", [("query",), PROJECTIONS])
def test_low_rank_adaptation_trains_and_saves_as_in_keras(data, rng, tmp_path, adapted):
    (model, other), (layer, theirs) = two_models()
    for name in adapted:
        getattr(layer.mha, f"{name}_dense").enable_lora(2)
        getattr(theirs, f"{name}_dense").enable_lora(2)
    # One of its two matrices starts at zero.
    other.set_weights([0.5 * rng.standard_normal(weight.shape) for weight in other.get_weights()])
    model.set_weights(other.get_weights())
    assert [len(one.trainable_weights) for one in (model, model)] == [len(other.trainable_weights)] * 2

    for one in (model, other):
        one.compile(keras.optimizers.SGD(0.1), "mse")
        one.fit(data, data[0], epochs=2, shuffle=False, verbose=0)

    for weight, of_keras in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(weight, of_keras, atol=1e-5)
    expected = model.predict(data, verbose=0)
    scores = scores_of_keras(theirs, data)
    assert_close(explain.capture(model, data, verbose=0)["attention"].values, scores, atol=1e-5)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    (plain, _), _ = two_models()
    plain.load_weights(tmp_path / "model.weights.h5")  # into what is not adapted
    for one in (reloaded, plain):
        both = keras.Model(one.inputs, [one.output, one.get_layer("attention").attention_scores])
        found = both.predict(data, verbose=0)
        assert_close(found[0], expected)
        assert_close(found[1], scores, atol=1e-5)
    plain.save_weights(tmp_path / "plain.weights.h5")
    model.load_weights(tmp_path / "plain.weights.h5")  # and back
    assert_close(model.predict(data, verbose=0), expected)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning")
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_a_quantized_layer_is_keras_own_quantized(data, mode):
    """Saved, neither can be loaded: Keras' own layer forgets which of its parts are quantized."""
    (model, other), (layer, theirs) = two_models(**({"use_gate": True} if GATE else {}))
    before = numbers(layer(*data))
    for one in (model, other):
        one.quantize(mode)

    assert [weight.dtype for weight in model.weights] == [weight.dtype for weight in other.weights]
    output = numbers(layer(*data))
    assert_close(layer.attention_scores, scores_of_keras(theirs, data))
    assert_close(output, theirs(*data))
    assert 0 < np.abs(output - before).max() < 0.5
    state = [numbers(variable) for variable in layer.non_trainable_variables]
    captured = explain.capture(model, data, verbose=0)["attention"]
    assert_close(captured.values, scores_of_keras(theirs, data))
    for old, new in zip(state, layer.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(old, numbers(new))  # reading scores is not training


def test_parts_can_be_quantized_by_a_map_of_dtypes(data):
    policies = keras.dtype_policies.DTypePolicyMap()
    for name in ("query", "key", "value"):
        policies[f"attention/mha/{name}"] = keras.dtype_policies.QuantizedDTypePolicy("int8", "float32")
    layer = InterpretableMultiHeadAttention(4, 2, name="attention", dtype=policies)

    output = layer(data[0])

    parts = {weight.path.split("/")[2]: weight.dtype for weight in layer.weights if weight.path.endswith("/kernel")}
    assert parts == {"query": "int8", "key": "int8", "value": "int8", "attention_output": "float32"}
    assert output.shape == (4, 5, 6)
    np.testing.assert_allclose(numbers(layer.attention_scores).sum(-1), 1, atol=1e-6)


def test_parts_can_have_dtypes_of_their_own(data):
    """Saved, Keras forgets them, as it does those of its own layer."""
    policies = keras.dtype_policies.DTypePolicyMap()
    policies["attention/mha/attention_output"] = keras.DTypePolicy("mixed_bfloat16")
    layer = InterpretableMultiHeadAttention(4, 2, name="attention", dtype=policies)

    output = layer(data[0])

    assert (layer.mha.output_dense.compute_dtype, layer.mha.query_dense.compute_dtype) == ("bfloat16", "float32")
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(layer.attention_scores.dtype) == "float32"


# Masks


@pytest.mark.parametrize("dtype", ["bool", "int32", "float32"])
def test_one_mask_in_every_rank_means_the_same(data, dtype):
    layer = InterpretableMultiHeadAttention(4, 2)
    mask = np.tri(5, 3, dtype="bool").astype(dtype)
    ranks = [mask, mask[None], np.tile(mask, (4, 1, 1)), mask[None, None], np.tile(mask, (4, 2, 1, 1))]

    outputs = [numbers(layer(*data, attention_mask=one)) for one in ranks]
    causal = numbers(layer(*data, use_causal_mask=True))

    for output in outputs:
        np.testing.assert_allclose(output, causal, atol=1e-6)


def test_a_mask_of_each_head_goes_with_padding_of_each_sample(data, rng):
    """Keras takes the batch axis of the padding for the head axis: with two samples silently, else with an error."""
    query, key = (array[:2] for array in data)
    padding, of_heads = np.array([[1, 1, 0], [0, 1, 1]], "bool"), rng.random((2, 2, 5, 3)) < 0.7
    layer = InterpretableMultiHeadAttention(4, 2)

    output = layer(query, key, attention_mask=of_heads, key_mask=padding, use_causal_mask=True)

    scores = numbers(layer.attention_scores)
    allowed = of_heads & padding[:, None, None] & np.tri(5, 3, dtype="bool")
    np.testing.assert_array_equal(scores > 0, allowed)
    assert_close(output, layer(query, key, attention_mask=allowed))


@pytest.mark.parametrize("shape", ["all", "each sample", "each head"])
@pytest.mark.parametrize("axes", [(2,), (1, 2), None])
def test_masks_of_several_axes_are_those_of_keras(rng, axes, shape):
    query, key = rng.standard_normal((2, 3, 3, 4, 6), dtype="float32")
    key = key[:, :, :2]
    pairs = (4, 2) if axes == (2,) else (3, 4, 3, 2)
    samples = (3, 3) if axes == (2,) else (3,)
    mask = rng.random({"all": pairs, "each sample": samples + pairs, "each head": (*samples, 2, *pairs)}[shape]) < 0.7
    layer = InterpretableMultiHeadAttention(4, 2, attention_axes=axes)
    theirs = keras.layers.MultiHeadAttention(2, 4, attention_axes=axes)
    theirs.build(query.shape, key.shape)
    layer.build(query.shape, key.shape)
    theirs.set_weights(layer.get_weights())

    output = layer(query, key, attention_mask=mask)

    expected = theirs(query, key, attention_mask=mask, return_attention_scores=True)
    assert_close(output, expected[0])
    assert_close(layer.attention_scores, expected[1])


def test_the_mask_of_the_query_goes_on_and_nothing_warns():
    tokens, keys = np.array([[1, 2, 3, 0, 0], [3, 3, 1, 1, 2]]), np.array([[5, 4, 0], [3, 0, 0]])
    query = keras.layers.Embedding(6, 6, mask_zero=True)(tokens)
    key = keras.layers.Embedding(6, 6, mask_zero=True)(keys)
    layer = InterpretableMultiHeadAttention(4, 2)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = layer(query, key)

    assert not caught
    np.testing.assert_array_equal(numbers(_backend.get_keras_mask(output)), tokens > 0)
    by_hand = (tokens > 0)[:, :, None] & (keys > 0)[:, None]
    for tensor in (query, key):
        _backend.set_keras_mask(tensor, None)
    assert_close(output, layer(query, key, attention_mask=by_hand))


# Arguments


def test_kernels_of_one_initializer_differ(rng):
    layer = InterpretableMultiHeadAttention(8, 3, kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02))
    layer.build((2, 5, 6))

    kernels = [numbers(weight).ravel() for weight in layer.weights if weight.name == "kernel"]

    assert all(not np.allclose(one, other) for n, one in enumerate(kernels) for other in kernels[:n])


@pytest.mark.parametrize("part", ["kernel", "bias"])
def test_constraints_hold_after_training(data, part):
    arguments = {f"{part}_constraint": "non_neg", f"{part}_initializer": "uniform"}
    inputs = keras.Input((5, 6))
    layer = InterpretableMultiHeadAttention(4, 2, **arguments)
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(1.0), "mse")

    model.fit(data[0], -data[0], verbose=0)

    assert all(numbers(weight).min() >= 0 for weight in layer.weights if weight.name == part)
    assert any(numbers(weight).min() < 0 for weight in layer.weights if weight.name != part)


@pytest.mark.parametrize(
    ("query", "key", "value", "output_shape"),
    [
        ((7, 4, 8), (7, 2, 8), None, None),
        ((7, 4, 8), (7, 2, 3), (7, 2, 8), (3, 4)),
        ((7, 4, 2, 3, 8), (7, 1, 1, 5, 2), (7, 1, 1, 5, 8), (3, 4)),
    ],
)
def test_the_shape_of_the_output_is_the_computed_one(query, key, value, output_shape):
    layer = InterpretableMultiHeadAttention(2, 2, output_shape=output_shape, value_dim=3)
    shapes = (query, key, value)

    computed = layer.compute_output_shape(*shapes)
    of_lists = layer.compute_output_shape(*(shape and list(shape) for shape in shapes))
    specification = layer.compute_output_spec(*(shape and keras.KerasTensor(shape) for shape in shapes))
    symbolic = layer(*(shape and keras.KerasTensor(shape) for shape in shapes))
    output = layer(*(None if shape is None else np.ones(shape, "float32") for shape in shapes))

    assert computed == of_lists == specification.shape == symbolic.shape == tuple(output.shape)


def test_computed_shapes_of_keys_and_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be equal"):
        InterpretableMultiHeadAttention(2, 2).compute_output_shape((2, 4, 8), (2, 1, 7), (2, 2, 8))


def test_scores_with_the_output_can_be_had_whatever_the_kernel(data):
    """Keras' own layer refuses. Without scores, both leave it to the backend whether it has the kernel."""
    _, (_, theirs) = two_models()
    flash = InterpretableMultiHeadAttention(4, 2, 0, flash_attention=True)
    flash.build(data[0].shape, data[1].shape)
    flash.set_weights(theirs.get_weights())

    output, scores = flash(*data, return_attention_scores=True)

    expected = theirs(*data, return_attention_scores=True)
    assert_close(output, expected[0])
    assert_close(scores, expected[1])


def test_a_layer_has_the_parts_of_keras_own_and_no_others():
    layer, theirs = InterpretableMultiHeadAttention(4, 2), keras.layers.MultiHeadAttention(2, 4, dropout=0.1)
    assert [part.name for part in layer._flatten_layers(include_self=False)] == ["mha"]

    layer.build((2, 5, 6))
    theirs.build((2, 5, 6), (2, 5, 6))

    kinds, of_keras = ([type(part) for part in one._flatten_layers(include_self=False)] for one in (layer.mha, theirs))
    assert kinds == of_keras


def test_mixed_precision_trains_in_float32_and_scales_the_loss(data):
    inputs = keras.Input((5, 6))
    layer = InterpretableMultiHeadAttention(4, 2, dtype="mixed_float16")
    outputs = keras.layers.Activation("linear", dtype="float32")(layer(inputs))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)), "mse")

    losses = model.fit(data[0], data[0], epochs=8, verbose=0).history["loss"]

    assert losses[-1] < losses[0]
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


# Export, in the formats that Keras has for the backend and that need no further package.


def exported(model, folder, data):
    """What an exported model gives."""
    if BACKEND == "torch":
        import torch

        model.export(folder / "model.pt2", format="torch", verbose=False)
        results = torch.export.load(folder / "model.pt2").module()(torch.tensor(data))
    else:
        import tensorflow

        model.export(folder / "model", format="tf_saved_model", verbose=False)
        reloaded = tensorflow.saved_model.load(folder / "model")
        results = reloaded.serve(data)
    return [numbers(result) if BACKEND == "torch" else np.asarray(result) for result in keras.tree.flatten(results)]


@pytest.mark.skipif(BACKEND == "torch" and not TORCH_EXPORT, reason="Keras 3.14 does not export on PyTorch")
@pytest.mark.filterwarnings("ignore")  # of the exporters
@pytest.mark.parametrize("causal", [False, True])
def test_a_model_with_scores_can_be_exported(tmp_path, causal):
    table = np.array([[0.5, 2, -1.5, 0], [2.0, 0, 0.25, 1]], "float32")[: 1 if BACKEND == "torch" else 2]
    inputs = keras.Input((4,))
    tokens = FeatureTokenizer(6, cardinalities={1: 3, 3: 2})(inputs)
    layer = InterpretableMultiHeadAttention(4, 2)
    model = keras.Model(inputs, layer(tokens, return_attention_scores=True, use_causal_mask=causal))

    results = exported(model, tmp_path, table)

    for result, expected in zip(results, model.predict(table, verbose=0), strict=True):
        np.testing.assert_allclose(result, expected, atol=1e-6)
