"""`capture` and `recomposition_error` on every kind of model, at every moment of its life."""

import concurrent.futures
import gc
import inspect
import itertools
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator

import keras
import numpy as np
import pytest
from keras import layers, ops

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

BACKEND = keras.config.backend()
RNG = np.random.default_rng(7)
TABLE = RNG.normal(size=(8, 5)).astype("float32")
SEQUENCE = RNG.normal(size=(8, 6, 8)).astype("float32")
IMAGE = RNG.normal(size=(8, 3, 4, 8)).astype("float32")
WORDS = np.where(np.arange(6) < RNG.integers(2, 7, size=(8, 1)), RNG.integers(1, 9, size=(8, 6)), 0)


def dropout():
    """None, so that Keras uses its fused kernel; but JAX has none for float16 on a CPU, not in `predict` either."""
    return 0.1 if BACKEND == "jax" and keras.config.dtype_policy().compute_dtype == "float16" else 0.0


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """A layer of somebody's, with attention inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(2, 4, dropout=dropout(), name="attention")
        self.norm = layers.LayerNormalization(name="norm")

    def build(self, shape):
        self.attention.build(shape, shape)
        self.norm.build(shape)

    def call(self, x):
        return self.norm(x + self.attention(x, x))

    def compute_output_shape(self, shape):
        return shape


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = layers.Dense(8)
        self.blocks = [Block(name="first"), Block(name="second")]
        self.pool = layers.GlobalAveragePooling1D()
        self.head = layers.Dense(1)

    def call(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x))


@keras.saving.register_keras_serializable("tests")
class Scaled(layers.MultiHeadAttention):
    """A subclass that computes scores in its own way, with a temperature."""

    def _compute_attention(
        self, query, key, value, attention_mask=None, training=None, return_attention_scores=False, **kwargs
    ):
        return super()._compute_attention(query * 3, key, value, attention_mask, training, True, **kwargs)


@keras.saving.register_keras_serializable("tests")
class NoisyAtInference(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x):
        return x + keras.random.normal(ops.shape(x), seed=self.seed_generator, dtype=x.dtype)


def pooled(inputs, x):
    return keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(x)))


def sequential():
    return keras.Sequential(
        [
            keras.Input((5,)),
            FeatureTokenizer(8),
            InterpretableMultiHeadAttention(4, 2, name="attention"),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )


def functional():
    inputs = keras.Input((5,))
    tokens = FeatureTokenizer(8)(inputs)
    return pooled(inputs, tokens + InterpretableMultiHeadAttention(4, 2, dropout_rate=0.0, name="attention")(tokens))


def keras_attention():
    inputs = keras.Input((6, 8))
    return pooled(inputs, layers.MultiHeadAttention(2, 4, dropout=dropout(), name="attention")(inputs, inputs))


def grouped():
    inputs = keras.Input((6, 8))
    return pooled(inputs, layers.GroupQueryAttention(4, 4, 2, dropout=dropout(), name="attention")(inputs, inputs))


def own_scores():
    inputs = keras.Input((6, 8))
    return pooled(inputs, Scaled(2, 4, name="attention")(inputs, inputs))


def nested():
    inputs = keras.Input((5,))
    encoder = keras.Sequential([keras.Input((5,)), FeatureTokenizer(8), Block(name="first")], name="encoder")
    inner = keras.Input((5, 8))
    decoder = keras.Model(inner, InterpretableMultiHeadAttention(4, 2, name="attention")(inner), name="decoder")
    return pooled(inputs, decoder(encoder(inputs)))


def called_twice():
    inputs = keras.Input((6, 8))
    attention = layers.MultiHeadAttention(2, 4, dropout=dropout(), name="attention")
    return pooled(inputs, attention(attention(inputs, inputs), inputs))


def shared():
    inputs = keras.Input((6, 8))
    encoder = keras.Sequential([keras.Input((6, 8)), InterpretableMultiHeadAttention(4, 2, name="attention")])
    return pooled(inputs, layers.Concatenate()([encoder(inputs), encoder(inputs * 2)]))


def time_distributed():
    inputs = keras.Input((3, 4, 8))
    x = layers.TimeDistributed(Block(name="block"), name="steps")(inputs)
    return keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling2D()(x)))


def masked():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(inputs)
    return pooled(inputs, layers.MultiHeadAttention(2, 4, dropout=dropout(), name="attention")(x, x))


def masked_with_dropout():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(inputs)
    return pooled(inputs, InterpretableMultiHeadAttention(4, 2, name="attention")(x))


def causal():
    inputs = keras.Input((6, 8))
    return pooled(inputs, layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs, use_causal_mask=True))


def cross():
    inputs = [keras.Input((5,), name="table"), keras.Input((6, 8), name="sequence")]
    tokens = FeatureTokenizer(8)(inputs[0])
    return pooled(inputs, InterpretableMultiHeadAttention(4, 2, name="attention")(tokens, inputs[1]))


def two_axes():
    inputs = keras.Input((3, 4, 8))
    x = layers.MultiHeadAttention(2, 4, attention_axes=(1, 2), name="attention")(inputs, inputs)
    return keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling2D()(x)))


def one_axis_of_two():
    inputs = keras.Input((3, 4, 8))
    x = layers.MultiHeadAttention(2, 4, attention_axes=(1,), name="attention")(inputs, inputs)
    return keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling2D()(x)))


def random_at_inference():
    inputs = keras.Input((6, 8))
    x = NoisyAtInference()(inputs)
    return pooled(inputs, layers.MultiHeadAttention(2, 4, name="attention")(x, x))


SELF = {"attention": (8, 2, 6, 6)}
# model: what it is called with, and the scores that must come out
MODELS = {
    sequential: (TABLE, {"attention": (8, 2, 5, 5)}),
    functional: (TABLE, {"attention": (8, 2, 5, 5)}),
    Subclassed: (SEQUENCE, {"first/attention": (8, 2, 6, 6), "second/attention": (8, 2, 6, 6)}),
    nested: (TABLE, {"encoder/first/attention": (8, 2, 5, 5), "decoder/attention": (8, 2, 5, 5)}),
    called_twice: (SEQUENCE, {"attention#1": (8, 2, 6, 6), "attention#2": (8, 2, 6, 6)}),
    shared: (SEQUENCE, {"attention#1": (8, 2, 6, 6), "attention#2": (8, 2, 6, 6)}),
    keras_attention: (SEQUENCE, {"attention": (8, 2, 6, 6)}),
    grouped: (SEQUENCE, {"attention": (8, 4, 6, 6)}),
    own_scores: (SEQUENCE, {"attention": (8, 2, 6, 6)}),
    masked: (WORDS, {"attention": (8, 2, 6, 6)}),
}
# the same, for what need not be seen at every moment
VARIANTS = {
    masked_with_dropout: (WORDS, {"attention": (8, 2, 6, 6)}),
    causal: (SEQUENCE, {"attention": (8, 2, 6, 6)}),
    cross: ([TABLE, SEQUENCE], {"attention": (8, 2, 5, 6)}),
    two_axes: (IMAGE, {"attention": (8, 2, 3, 4, 3, 4)}),
    one_axis_of_two: (IMAGE, {"attention": (8, 4, 2, 3, 3)}),
    random_at_inference: (SEQUENCE, {"attention": (8, 2, 6, 6)}),
}
# moment: the dtype policy, what the model is compiled with, whether it has been trained, saved and loaded
MOMENTS = {
    "never trained": ("float32", {}, ""),
    "after fit": ("float32", {}, "fit"),
    "after load_model": ("float32", {}, "fit, load"),
    "mixed_float16": ("mixed_float16", {}, ""),
    "mixed_bfloat16": ("mixed_bfloat16", {}, ""),
    "jit_compile": ("float32", {"jit_compile": True}, ""),
    "run_eagerly": ("float32", {"run_eagerly": True}, ""),
}


@pytest.fixture(autouse=True)
def float32_afterward():
    yield
    keras.config.set_dtype_policy("float32")


def at_moment(build, moment, x, folder):
    policy, compiled, history = MOMENTS[moment]
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(11)
    model = build()
    model(x)
    if compiled or history:
        model.compile("adam", "mse", **compiled)
    if "fit" in history:
        model.fit(x, np.zeros((8, 1)), epochs=1, batch_size=4, verbose=0)
    if "load" in history:
        model.save(folder / "model.keras")
        model = keras.saving.load_model(folder / "model.keras")
    return model


def everything(model):
    """All that observation must leave as it is."""
    return {
        "attributes": [{name: id(value) for name, value in vars(layer).items()} for layer in model._flatten_layers()],
        "losses": [[id(loss) for loss in layer._losses] for layer in model._flatten_layers()],
        "variables": [(id(v), ops.convert_to_numpy(v.value).tobytes()) for v in model.variables],
        "modes": [module.training for module in model.modules()] if BACKEND == "torch" else None,
    }


def predictions(model, x):
    """What the model predicts, where the random numbers it draws are to be the same each time."""
    seeds = [variable for layer in model._flatten_layers() for variable in layer.variables if "seed" in variable.path]
    before = [ops.copy(variable.value) for variable in seeds]
    if BACKEND == "torch" and model.jit_compile:  # `torch.compile` takes half a minute a model: one is enough, below
        outputs = ops.convert_to_numpy(model(x))
    else:
        outputs = model.predict(x, batch_size=4, verbose=0)
    for variable, value in zip(seeds, before, strict=True):
        variable.assign(value)
    return outputs


@pytest.mark.filterwarnings("error::UserWarning:kerasfactory")
@pytest.mark.parametrize(
    ("build", "moment"),
    [*itertools.product(MODELS, MOMENTS), *itertools.product(VARIANTS, ["after load_model"])],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_every_model_at_every_moment(build, moment, tmp_path):
    x, expected_shapes = (MODELS | VARIANTS)[build]
    model = at_moment(build, moment, x, tmp_path)
    predicted, before = predictions(model, x), everything(model)

    scores = explain.capture(model, x, batch_size=4, verbose=0)
    errors = explain.recomposition_error(model, x, verbose=0)

    assert everything(model) == before
    np.testing.assert_array_equal(predictions(model, x), predicted)
    assert {name: array.shape for name, array in scores.items()} == expected_shapes
    half = "16" in MOMENTS[moment][0]
    for name, array in scores.items():
        assert array.dtype == "float32"
        assert array.attrs["prediction_difference"] <= (2e-2 if half else 1e-5)
        keys = [dim for dim in array.dims if dim.startswith("key")]
        sums = array.sum(keys)
        looks_at_something = (sums != 0).values
        if "mask" in build.__name__:  # padding neither looks nor is looked at
            np.testing.assert_array_equal(looks_at_something.any(axis=1), x != 0)
            assert (array.values[np.broadcast_to((x == 0)[:, None, None], array.shape)] == 0).all()
            assert "query_mask" in array.attrs["masks"]
            assert "value_mask" in array.attrs["masks"]
        else:
            assert looks_at_something.all()
        if build is causal:
            assert (np.triu(array.values, 1) == 0).all()
            assert array.attrs["masks"] == "use_causal_mask"
        np.testing.assert_allclose(sums.values[looks_at_something], 1, atol=2e-2 if half else 1e-5)
        assert errors[name] < (3e-2 if half else 1e-5)
    assert errors.keys() == scores.keys()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_scores_are_those_of_a_model_made_by_hand(dropout):
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(inputs)
    output, scores = layers.MultiHeadAttention(2, 4, dropout=dropout, name="attention")(
        x, x, use_causal_mask=True, return_attention_scores=True
    )
    model = pooled(inputs, output)

    captured = explain.capture(model, WORDS, batch_size=3, verbose=0)["attention"]

    np.testing.assert_allclose(captured, keras.Model(inputs, scores).predict(WORDS, verbose=0), atol=1e-6)
    assert captured.dims == ("sample", "head", "query", "key")
    assert captured.attrs == {
        "layer": "attention",
        "class": "MultiHeadAttention",
        "call": 1,
        "masks": "query_mask, value_mask, use_causal_mask",
        "read_from": "_compute_attention",
        "backend": BACKEND,
        "keras_version": keras.__version__,
        "prediction_difference": 0.0,
    }


class Batches(keras.utils.PyDataset):
    @property
    def num_batches(self):
        return 3

    def __getitem__(self, number):
        part = slice(3 * number, 3 * number + 3)
        return SEQUENCE[part], np.zeros(len(SEQUENCE[part]))


def as_tf_data():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((SEQUENCE, np.zeros(8))).batch(3)


def as_data_loader():
    import torch

    data = torch.utils.data.TensorDataset(torch.from_numpy(SEQUENCE), torch.zeros(8))
    return torch.utils.data.DataLoader(data, batch_size=3)


INPUTS = {
    "array": lambda: SEQUENCE,
    "float64": lambda: SEQUENCE.astype("float64"),
    "tensor": lambda: ops.convert_to_tensor(SEQUENCE),
    "list": lambda: [SEQUENCE],
    "dict": lambda: {"sequence": SEQUENCE},
    "PyDataset": lambda: Batches(),
    "tf.data": as_tf_data,
    "DataLoader": as_data_loader,
    "generator": lambda: ((SEQUENCE[start : start + 3], np.zeros(3)) for start in range(0, 8, 3)),
}


@pytest.mark.filterwarnings("ignore:The structure of `inputs`:UserWarning")  # Keras, of a list or dict of one input
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_every_kind(kind):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 8), name="sequence")
    model = pooled(inputs, layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs))
    expected = explain.capture(model, SEQUENCE, verbose=0)["attention"]

    captured = explain.capture(model, INPUTS[kind](), verbose=0)["attention"]

    np.testing.assert_allclose(captured, expected, atol=1e-6)


def test_a_model_without_weights_gets_them():
    model = Subclassed()
    captured = explain.capture(model, SEQUENCE, verbose=0)
    assert model.built
    assert model.tokens.kernel.path == f"{model.name}/{model.tokens.name}/kernel"
    again = explain.capture(model, SEQUENCE, verbose=0)
    for name in captured:
        np.testing.assert_array_equal(captured[name], again[name])


def test_a_layer_in_a_model_without_weights_has_still_not_been_called():
    layer = InterpretableMultiHeadAttention(4, 2)
    model = keras.Sequential([layer, layers.GlobalAveragePooling1D()])
    explain.capture(model, SEQUENCE, verbose=0)
    assert layer.attention_scores is None


def test_the_scores_of_the_latest_eager_call_stay():
    layer = InterpretableMultiHeadAttention(4, 2)
    model = keras.Sequential([layer, layers.GlobalAveragePooling1D()])
    model(SEQUENCE[:2])
    before = layer.attention_scores
    explain.capture(model, SEQUENCE, verbose=0)
    assert layer.attention_scores is before


def test_a_model_is_run_as_it_predicts():
    class Scaling(keras.Model):
        def predict_step(self, *args):
            data = args[-1]
            return super().predict_step(*args[:-1], (data[0] * 0,))

    inputs = keras.Input((6, 8))
    model = Scaling(inputs, layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs))
    captured = explain.capture(model, SEQUENCE, verbose=0)["attention"]
    np.testing.assert_allclose(captured, 1 / 6, atol=1e-6)


def test_state_goes_on_from_batch_to_batch_and_is_given_back():
    keras.utils.set_random_seed(2)
    inputs = keras.Input((6, 8))
    noisy = NoisyAtInference()(inputs)
    output, scores = layers.MultiHeadAttention(2, 4, name="attention")(noisy, noisy, return_attention_scores=True)
    model, by_hand = pooled(inputs, output), keras.Model(inputs, scores)
    expected = predictions(by_hand, SEQUENCE)

    captured = explain.capture(model, SEQUENCE, batch_size=4, verbose=0)["attention"]

    np.testing.assert_allclose(captured, expected, atol=1e-6)
    np.testing.assert_allclose(predictions(by_hand, SEQUENCE), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of itself and of Keras, and an error would stop it
@pytest.mark.parametrize("jit_compile", [False, True])
def test_compiled_functions_stay(jit_compile):
    model = functional()
    model.compile("adam", "mse", jit_compile=jit_compile)
    model.fit(TABLE, np.zeros((8, 1)), verbose=0)
    model.predict(TABLE, verbose=0)
    before = (model.train_function, model.test_function, model.predict_function)
    explain.capture(model, TABLE, verbose=0)
    assert (model.train_function, model.test_function, model.predict_function) == before
    if BACKEND == "tensorflow":
        assert model.predict_function.experimental_get_tracing_count() == 1


@keras.saving.register_keras_serializable("tests")
class Fragile(layers.Layer):
    fails = False

    def call(self, x):
        if self.fails:
            raise RuntimeError("no more")
        return x


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_model_that_raises_stays_as_it_was(run_eagerly):
    inputs = keras.Input((6, 8))
    fragile = Fragile()
    model = pooled(inputs, fragile(layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)))
    model.compile("adam", "mse", run_eagerly=run_eagerly)
    predicted = model.predict(SEQUENCE, verbose=0)
    fragile.fails = True
    before = everything(model)

    with pytest.raises(RuntimeError, match="no more"):
        explain.capture(model, SEQUENCE, verbose=0)

    assert everything(model) == before
    fragile.fails = False
    np.testing.assert_array_equal(model.predict(SEQUENCE, verbose=0), predicted)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_model_that_has_changed_is_observed_anew(run_eagerly):
    class Scale(layers.Layer):
        factor = 1.0

        def call(self, x):
            return x * self.factor

        def compute_output_shape(self, shape):
            return shape

    inputs = keras.Input((6, 8))
    scale = Scale()
    scaled = scale(inputs)
    model = pooled(inputs, layers.MultiHeadAttention(2, 4, name="attention")(scaled, scaled))
    model.compile("adam", "mse", run_eagerly=run_eagerly)
    first = explain.capture(model, SEQUENCE, batch_size=4, verbose=0)["attention"]
    np.testing.assert_array_equal(explain.capture(model, SEQUENCE, batch_size=4, verbose=0)["attention"], first)

    scale.factor = 0.0
    np.testing.assert_allclose(explain.capture(model, SEQUENCE, batch_size=4, verbose=0)["attention"], 1 / 6, atol=1e-6)
    scale.factor = 1.0
    model.set_weights([0 * weight for weight in model.get_weights()])
    np.testing.assert_allclose(explain.capture(model, SEQUENCE, batch_size=4, verbose=0)["attention"], 1 / 6, atol=1e-6)


def test_a_captured_model_can_be_forgotten():
    model = called_twice()
    explain.capture(model, SEQUENCE, verbose=0)
    explain.recomposition_error(model, SEQUENCE, verbose=0)
    alive = weakref.ref(model)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert alive() is None


def test_data_that_raise_leave_the_model_as_it_was():
    model = keras_attention()
    before = everything(model)

    def batches():
        yield SEQUENCE[:4]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        explain.capture(model, batches(), verbose=0)
    assert everything(model) == before


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_two_threads_at_once(run_eagerly):
    model = called_twice()
    model.compile("adam", "mse", run_eagerly=run_eagerly)
    model(SEQUENCE)
    expected = explain.capture(model, SEQUENCE, batch_size=1, verbose=0)
    predicted = model.predict(SEQUENCE, verbose=0)
    before = everything(model)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        captures = [pool.submit(explain.capture, model, SEQUENCE, batch_size=1, verbose=0) for _ in range(2)]
        plain = [pool.submit(lambda: ops.convert_to_numpy(model(SEQUENCE))) for _ in range(5)]

    assert everything(model)["variables"] == before["variables"]
    assert everything(model)["attributes"] == before["attributes"]
    for future in captures:
        for name, scores in future.result().items():
            np.testing.assert_allclose(scores, expected[name], atol=1e-6)
    for future in plain:
        np.testing.assert_allclose(future.result(), predicted, atol=1e-5)


def test_each_step_of_time_distributed_attention_is_a_call():
    captured = explain.capture(time_distributed(), IMAGE, verbose=0)
    assert list(captured) == ["attention#1", "attention#2", "attention#3"]
    assert [scores.attrs["call"] for scores in captured.values()] == [1, 2, 3]
    assert {scores.attrs["layer"] for scores in captured.values()} == {"attention"}


def test_folded_batches_are_not_called_samples():
    inputs = keras.Input((6, 8))
    windows = layers.Lambda(lambda x: ops.reshape(x, (-1, 3, 8)), output_shape=(3, 8))(inputs)
    attended = layers.MultiHeadAttention(2, 4, name="attention")(windows, windows)
    model = keras.Model(inputs, layers.Lambda(lambda x: ops.reshape(x, (-1, 6, 8)), output_shape=(6, 8))(attended))
    captured = explain.capture(model, SEQUENCE, batch_size=4, verbose=0)["attention"]
    assert captured.dims == ("sequence", "head", "query", "key")
    assert captured.shape == (16, 2, 3, 3)


def test_flash_attention_is_asked_for_scores_explicitly(monkeypatch):
    model = keras_attention()
    expected = explain.capture(model, SEQUENCE, verbose=0)["attention"]
    attention = model.get_layer("attention")
    attention._flash_attention = True
    keras_ops = inspect.getmodule(layers.MultiHeadAttention).ops
    fused = ops.dot_product_attention  # no CPU has flash attention: another kernel takes its place here
    monkeypatch.setattr(
        keras_ops, "dot_product_attention", lambda *a, **k: fused(*a, **{**k, "flash_attention": False})
    )
    captured = explain.capture(model, SEQUENCE, verbose=0)["attention"]
    assert attention._flash_attention
    np.testing.assert_array_equal(captured, expected)


NAMES = ["a", "b", "c", "d", "e"]


def test_feature_names_come_from_the_tokenizer():
    inputs = keras.Input((5,))
    tokens = FeatureTokenizer(8, feature_names=NAMES)(inputs)
    model = pooled(inputs, layers.MultiHeadAttention(2, 4, name="attention")(tokens, tokens))
    captured = explain.capture(model, TABLE, verbose=0)["attention"]
    assert captured["query"].values.tolist() == captured["key"].values.tolist() == NAMES
    assert captured.sel(query="b", key="c").dims == ("sample", "head")
    other = explain.capture(model, TABLE, feature_names=["v", "w", "x", "y", "z"], verbose=0)["attention"]
    assert other["key"].values.tolist() == ["v", "w", "x", "y", "z"]


def test_feature_names_go_where_they_fit():
    inputs = keras.Input((6, 8))
    query = layers.Dense(8)(inputs[:, :1])
    model = pooled(inputs, layers.MultiHeadAttention(2, 4, name="attention")(query, inputs))
    captured = explain.capture(model, SEQUENCE, feature_names=[*NAMES, "f"], verbose=0)["attention"]
    assert captured["key"].values.tolist() == [*NAMES, "f"]
    assert "query" not in captured.coords


def test_layers_are_chosen_by_name_or_path():
    model = Subclassed()
    assert list(explain.capture(model, SEQUENCE, layers="second/attention", verbose=0)) == ["second/attention"]
    assert list(explain.capture(model, SEQUENCE, layers=["attention"], verbose=0)) == [
        "first/attention",
        "second/attention",
    ]
    assert list(explain.capture(called_twice(), SEQUENCE, layers=["attention"], verbose=0)) == [
        "attention#1",
        "attention#2",
    ]


def test_a_path_names_a_layer_whose_own_name_is_enough():
    model = nested()
    for path in ("first/attention", "encoder/first/attention", "attention"):
        assert list(explain.capture(model, TABLE, layers=path, verbose=0))
    captured = explain.capture(model, TABLE, layers="decoder/attention", verbose=0)
    assert list(captured) == ["decoder/attention"]
    alone = pooled(inputs := keras.Input((6, 8)), Block(name="block")(inputs))
    assert list(explain.capture(alone, SEQUENCE, layers="block/attention", verbose=0)) == ["attention"]
    with pytest.raises(ValueError, match="no layer 'lock/attention'"):
        explain.capture(alone, SEQUENCE, layers="lock/attention", verbose=0)


def test_layers_of_one_name_and_place_are_told_apart():
    inputs = keras.Input((6, 8))

    class Pair(layers.Layer):
        def __init__(self):
            super().__init__(name="pair")
            self.attentions = [layers.MultiHeadAttention(2, 4, name="attention") for _ in range(2)]

        def call(self, x):
            return self.attentions[1](self.attentions[0](x, x), x)

    captured = explain.capture(pooled(inputs, Pair()(inputs)), SEQUENCE, verbose=0)
    assert list(captured) == ["pair/attention/0", "pair/attention/1"]


def no_attention():
    return keras.Sequential([keras.Input((6, 8)), layers.Dense(2, name="hidden")])


class LinearAttention(layers.Layer):
    """φ(q) (φ(k)ᵀ v): no query has a weight for a key."""

    def call(self, x):
        positive = ops.elu(x) + 1
        return ops.matmul(positive, ops.matmul(ops.swapaxes(positive, 1, 2), x))


def in_a_linear_way():
    return keras.Sequential([keras.Input((6, 8)), LinearAttention(name="linear")])


class Mapped(layers.Layer):
    """Attends within each sample by itself, inside what JAX and PyTorch call a `vmap`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(2, 4, name="attention")

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return ops.vectorized_map(lambda sample: self.attention(sample[None], sample[None])[0], x)


def in_a_loop():
    return keras.Sequential([keras.Input((6, 8)), Mapped(name="mapped")])


@pytest.mark.filterwarnings("ignore:.*There is a performance drop:UserWarning")  # PyTorch, of attention in a loop
@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (no_attention, {}, "no `MultiHeadAttention` or `GroupQueryAttention`.* Its layers are: hidden"),
        (in_a_linear_way, {}, "linear: it is a `LinearAttention`: no softmax over keys was seen in it"),
        (in_a_linear_way, {"layers": "linear"}, "linear: it is a `LinearAttention`: no softmax over keys"),
        (in_a_loop, {}, "attention: its scores stay inside a loop"),
        (keras_attention, {"layers": "atention"}, "no layer 'atention'. Did you mean 'attention'?"),
        (keras_attention, {"layers": ["attention", 3]}, "no layer 3. Its attention layers of Keras are: attention"),
        (keras_attention, {"layers": []}, "`layers` is empty"),
        (keras_attention, {"feature_names": ["a", "b"]}, "'attention' attends over 6 keys.* Received 2 names"),
        (keras_attention, {"feature_names": ["a"] * 6}, "must differ from each other"),
        (keras_attention, {"feature_names": "abcdef"}, "must be a list of strings, one per feature. Received"),
        (keras_attention, {"feature_names": {0: "a"}}, r"give the function `feature_names=words\.get`"),
        (keras_attention, {"feature_names": list("abcdefghi")}, r"`feature_names=vocabulary\.__getitem__` of a list"),
        (keras_attention, {"feature_names": range(6)}, r"`\[str\(name\) for name in feature_names\]` makes strings"),
        (keras_attention, {"x": SEQUENCE[:0]}, "`x` is empty"),
        (keras_attention, {"x": iter([])}, "`x` is empty"),
        (keras_attention, {"x": {}}, "must be an array"),
        (keras_attention, {"x": [SEQUENCE, SEQUENCE[:3]]}, "as many in each.*8, 6, 8.*3, 6, 8"),
        (keras_attention, {"x": None}, "`x` must be an array.* Received: x=None"),
        (keras_attention, {"x": "words"}, "`x` must be an array"),
        (keras_attention, {"batch_size": 0}, "`batch_size` must be a positive integer"),
        (keras_attention, {"x": Batches(), "batch_size": 2}, "Batches makes its own batches. Received: batch_size=2"),
        (keras_attention, {"verbose": "loud"}, "`verbose` must be"),
        (lambda: layers.Dense(2), {}, "`model` must be a keras.Model"),
    ],
)
def test_errors_tell_the_way_out(build, arguments, message):
    arguments = {"model": build(), "x": SEQUENCE, "verbose": 0} | arguments
    with pytest.raises(ValueError, match=message):
        explain.capture(**arguments)
    if "feature_names" not in arguments and not isinstance(arguments["x"], Iterator):
        with pytest.raises(ValueError, match=message):
            explain.recomposition_error(**arguments)


def test_batches_of_different_lengths_are_refused():
    inputs = keras.Input((None, 8))
    model = pooled(inputs, layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs))
    with pytest.raises(ValueError, match="differ in length"):
        explain.capture(model, iter([SEQUENCE[:4], SEQUENCE[4:, :5]]), verbose=0)


def test_data_without_end_are_refused():
    import tensorflow as tf

    endless = tf.data.Dataset.from_tensors(SEQUENCE).repeat()
    with pytest.raises(ValueError, match="never ends"):
        explain.capture(keras_attention(), endless, verbose=0)


def test_layers_that_cannot_be_captured_are_named():
    inputs = keras.Input((6, 8))
    attended = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    model = pooled(inputs, LinearAttention(name="linear")(attended))
    with pytest.warns(UserWarning, match="not captured:\n  linear: it is a `LinearAttention`: no softmax") as warned:
        captured = explain.capture(model, SEQUENCE, verbose=0)
    assert list(captured) == ["attention"]
    assert warned[0].filename == __file__


def test_nan_inputs_give_nan_scores_and_a_warning():
    x = SEQUENCE.copy()
    x[[3, 7], 2] = np.nan
    with pytest.warns(UserWarning, match="NaN in 2 of 8 samples, the first of them number 3") as warned:
        captured = explain.capture(keras_attention(), x, batch_size=4, verbose=0)["attention"]
    assert warned[0].filename == __file__
    np.testing.assert_array_equal(np.isnan(captured).any(["head", "query", "key"]), np.isnan(x).any(axis=(1, 2)))


def test_a_difference_between_the_observed_run_and_the_other_is_told():
    class Moody(layers.Layer):
        def call(self, x):
            return x + np.random.default_rng().normal()

        def compute_output_shape(self, shape):
            return shape

    inputs = keras.Input((6, 8))
    model = pooled(inputs, Moody()(layers.MultiHeadAttention(2, 4)(inputs, inputs)))
    with pytest.warns(UserWarning, match="outputs for the first batch differ by"):
        explain.capture(model, SEQUENCE, verbose=0)


def test_recomposition_error_notices_other_scores():
    @keras.saving.register_keras_serializable("tests")
    class Liar(layers.MultiHeadAttention):
        def _compute_attention(self, *args, **kwargs):
            output, scores = super()._compute_attention(*args[:5], True, **kwargs)
            return output, ops.flip(scores, axis=-1)

    inputs = keras.Input((6, 8))
    model = pooled(inputs, Liar(2, 4, name="attention")(inputs, inputs))
    assert explain.recomposition_error(model, SEQUENCE, verbose=0)["attention"] > 0.05


def test_gates_and_windows_recompose():
    names = inspect.signature(layers.MultiHeadAttention).parameters
    inputs = keras.Input((6, 8))
    for option in [{"use_gate": True}, {"sliding_window": 2}]:
        if set(option) <= set(names):
            model = pooled(inputs, layers.MultiHeadAttention(2, 4, name="attention", **option)(inputs, inputs))
            assert explain.recomposition_error(model, SEQUENCE, verbose=0)["attention"] < 1e-5


@pytest.mark.backend_independent
def test_progress_is_shown_when_asked_for(capsys):
    explain.capture(keras_attention(), SEQUENCE, batch_size=3, verbose=1)
    assert "3/3" in capsys.readouterr().out
    explain.capture(keras_attention(), SEQUENCE, batch_size=4, verbose=0)
    assert capsys.readouterr().out == ""


def test_attributes_are_plain_values():
    captured = explain.capture(keras_attention(), SEQUENCE, verbose=0)["attention"]
    assert json.loads(json.dumps(captured.attrs)) == captured.attrs


def test_the_layers_import_nothing_that_keras_does_not():
    code = (
        "import sys, keras; before = set(sys.modules); import kerasfactory.layers; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "{'kerasfactory'}"


class Counted(layers.Layer):
    """Counts how often Python runs it."""

    calls = 0

    def call(self, x):
        type(self).calls += 1
        return x


@pytest.mark.parametrize(
    "build", [InterpretableMultiHeadAttention, lambda d, n, name: layers.MultiHeadAttention(n, d, name=name)]
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_model_that_is_not_compiled_stops_after_its_last_scores(build, is_nested):
    inputs = keras.Input((6, 8))
    first, second = build(4, 2, name="first"), build(4, 2, name="second")
    attended = second(first(inputs, inputs), inputs)
    if is_nested:
        attended = keras.Model(inputs, attended)(inputs)
    model = keras.Model(inputs, Counted()(attended))
    x = RNG.normal(size=(10, 6, 8)).astype("float32")
    expected = explain.capture(model, x, batch_size=10, verbose=0)
    model.compile(run_eagerly=True)

    Counted.calls = 0
    scores = explain.capture(model, x, batch_size=2, verbose=0)
    assert Counted.calls == 2  # the first batch, watched and not
    for name in expected:
        np.testing.assert_allclose(scores[name], expected[name], atol=1e-6)

    Counted.calls = 0
    explain.recomposition_error(model, x, batch_size=2, verbose=0)
    assert Counted.calls == 6  # it needs the layers' output


def test_a_model_that_may_call_more_layers_for_other_data_runs_to_its_end():
    class Deeper(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = (
                layers.MultiHeadAttention(2, 4, name="a"),
                layers.MultiHeadAttention(2, 4, name="b"),
            )

        def call(self, x):
            x = self.first(x, x)
            return self.second(x, x) if x.shape[0] < 4 else x

    model = Deeper()
    model.compile(run_eagerly=True)
    model(SEQUENCE[:2])
    wrapped = keras.Sequential([model])
    wrapped.compile(run_eagerly=True)
    for one in (model, wrapped):
        with (
            pytest.warns(UserWarning, match="the model did not call it"),
            pytest.raises(RuntimeError, match="In batch 2 the model called other attention layers than in the first"),
        ):
            explain.capture(one, SEQUENCE[:6], batch_size=4, verbose=0)


@pytest.mark.backend_independent
def test_a_layer_whose_class_has_no_module_is_in_the_way_of_nothing():
    known = {}  # without a `__name__`, so that classes have no module
    program = "import keras\nclass Same(keras.layers.Layer):\n    def call(self, x):\n        return x"
    exec(program, known)
    inputs = keras.Input((4, 8))
    tokens = known["Same"]()(inputs)
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 4, name="attention")(tokens, tokens))
    assert known["Same"].call.__module__ is None
    assert list(explain.attribute(model, np.ones((2, 4, 8)), verbose=0).dims) == ["sample", "feature"]
