"""What changes attention, or makes more of it than scores, with attention that is not Keras' own."""

import functools

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers, ops

from kerasfactory import explain
from kerasfactory.explain._audit import claims as _audit_claims
from kerasfactory.explain._engine.edit import editor
from kerasfactory.explain._engine.view import keys_in_view
from kerasfactory.layers import FeatureTokenizer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 4)).astype("float32")
Y = (X[:, 0] + X[:, 1] > 0).astype("float32")
TOKENS = RNG.normal(size=(12, 5, 8)).astype("float32")
HEADS, SIZE = 2, 4
in_numpy = ops.convert_to_numpy


class Written(layers.Layer):
    """What `keras.layers.MultiHeadAttention` computes, written by hand, in one of several ways."""

    def __init__(self, way, **kwargs):
        super().__init__(**kwargs)
        self.way = way
        self.q, self.k, self.v, self.o = (layers.Dense(HEADS * SIZE, name=name) for name in "qkvo")

    def build(self, shape):
        for dense in (self.q, self.k, self.v, self.o):
            dense.build((*shape[:-1], HEADS * SIZE))

    def call(self, x):
        length = x.shape[1]
        q, k, v = (ops.reshape(dense(x), (-1, length, HEADS, SIZE)) for dense in (self.q, self.k, self.v))
        return self.o(ops.reshape(WAYS[self.way](q, k, v), (-1, length, HEADS * SIZE)))

    def compute_output_shape(self, shape):
        return (*shape[:-1], HEADS * SIZE)


def by_einsum(q, k, v):
    weights = ops.softmax(ops.einsum("bqhd,bkhd->bhqk", q, k) / SIZE**0.5)
    return ops.einsum("bhqk,bkhd->bqhd", weights, v)


def fused(q, k, v):
    return ops.dot_product_attention(q, k, v)


def fused_and_masked(q, k, v):
    """The last query may attend to no key, and no query to the last key."""
    mask = np.ones((1, 1, 5, 5), bool)
    mask[..., 4, :] = mask[..., 4] = False
    return ops.dot_product_attention(q, k, v, mask=ops.convert_to_tensor(mask))


def shares_values(q, k, v):
    weights = ops.softmax(ops.einsum("bqkgd,bskd->bkgqs", q[:, :, None], k[:, :, :1]))
    return ops.einsum("bkgqs,bskd->bqkgd", weights, v[:, :, :1])


def with_sink(q, k, v):
    logits = ops.einsum("bqhd,bkhd->bhqk", q, k)
    weights = ops.softmax(ops.concatenate([logits, ops.ones_like(logits[..., :1])], axis=-1))
    return ops.einsum("bhqk,bkhd->bqhd", weights[..., :-1], v)


def hides_two_keys(q, k, v):
    logits = ops.where(ops.arange(4) < 2, ops.einsum("bqhd,bkhd->bhqk", q, k), -1e9)
    return ops.einsum("bhqk,bkhd->bqhd", ops.softmax(logits), v)


WAYS = {way.__name__: way for way in (by_einsum, fused, fused_and_masked, shares_values, with_sink, hides_two_keys)}


def tabular(*ways, seed=0):
    """Two layers of attention over the columns of a table. Of one seed, all have the same weights."""
    inputs = keras.Input((4,))
    x = FeatureTokenizer(8)(inputs)
    for number, way in enumerate(ways):
        name = f"attention_{number}"
        x = layers.MultiHeadAttention(HEADS, SIZE, name=name)(x, x) if way == "keras" else Written(way, name=name)(x)
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(layers.Flatten()(x)))
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(size=weight.size, scale=0.4).reshape(weight.shape) for weight in model.get_weights()])
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
    return model


OF_KERAS = tabular("keras", "keras")
OTHERS = [tabular("by_einsum", "fused"), tabular("fused", "keras")]


def before_training(model, monitor):
    """What a monitor records first."""
    monitor.set_model(model)
    monitor.on_train_begin()
    monitor.on_epoch_begin(0)
    return monitor.history


def attributed(method):
    return lambda model: explain.attribute(model, X, method=method, verbose=0)


def monitored(model):
    return before_training(model, explain.AttentionMonitor(X[:8]))


def shuffled(model):
    return explain.parameter_randomization(model, X, draws=2, verbose=0)


def checked_ranking(model):
    attribution = explain.attribute(model, X, method="attention_gradient", verbose=0)
    return explain.faithfulness(model, X, attribution, draws=20, verbose=0)


def claimed(model):
    attribution = explain.attribute(model, X, verbose=0)
    return explain.feature_claims(model, X, Y, attribution, draws=2, verbose=0)


def agreed(model):
    return explain.seed_agreement([attributed("value_norm")(model) for _ in range(2)], draws=20)


MEASURES = {
    "attention": attributed("attention"),
    "rollout": attributed("rollout"),
    "attention_gradient": attributed("attention_gradient"),
    "integrated_gradients": attributed("integrated_gradients"),
    "random": attributed("random"),
    "head_importance": lambda model: explain.head_importance(model, X, Y, verbose=0),
    "attention_controls": lambda model: explain.attention_controls(model, X, Y, draws=2, steps=2, verbose=0),
    "parameter_randomization": shuffled,
    "monitor": monitored,
    "faithfulness": checked_ranking,
    "feature_claims": claimed,
}


@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_measured_is_that_of_keras_layer_with_the_same_weights(measure):
    expected = MEASURES[measure](OF_KERAS)
    for model in OTHERS:
        found = MEASURES[measure](model)
        if isinstance(found, dict):
            assert list(found) == list(expected) == ["attention_0", "attention_1"]
            for name, dataset in found.items():
                xr.testing.assert_allclose(dataset, expected[name], rtol=1e-3, atol=2e-5)
        else:
            xr.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("layer", ["attention_0", "attention_1"])
def test_the_layer_that_is_named_is_edited_and_no_other(layer):
    expected = explain.head_importance(OF_KERAS, X, Y, layers=layer, verbose=0)
    found = explain.head_importance(OTHERS[1], X, Y, layers=layer, verbose=0)
    assert list(found) == [layer]
    xr.testing.assert_allclose(found[layer], expected[layer], rtol=1e-3, atol=2e-5)


def test_an_audit_and_a_calibration_say_what_they_say_of_keras_layers(monkeypatch):
    quick = functools.partial(_audit_claims.attention_controls, steps=2, draws=1)
    monkeypatch.setattr(_audit_claims, "attention_controls", quick)
    expected, found = (explain.audit(model, X, Y, verbose=0).claims for model in (OF_KERAS, OTHERS[1]))
    assert list(found["verdict"]) == list(expected["verdict"])
    np.testing.assert_allclose(found["p_value"].astype(float), expected["p_value"].astype(float), atol=1e-6)
    expected, found = (
        explain.calibrate(lambda x, y, model=model: model, X, Y, n=2, strength=0.5, verbose=0)
        for model in (OF_KERAS, OTHERS[0])
    )
    xr.testing.assert_equal(found["count"], expected["count"])


def of_tokens(way, layer=None, end=None):
    """A model with one attention, over the positions of its input, and a linear output."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5, 8))
    attended = (layer or Written(way, name="written"))(inputs)
    model = keras.Model(inputs, (end or layers.Dense(1))(layers.Flatten()(attended)))
    model.compile(loss="mse")
    return model


def parts_of(model, shared=False):
    """In NumPy: the weights (sample, head, query, key), the values (sample, key, head, size), what a value adds."""
    layer, dense = model.get_layer("written"), model.layers[-1]
    q, k, v = (
        (TOKENS @ in_numpy(one.kernel) + in_numpy(one.bias)).reshape(12, 5, HEADS, SIZE).astype("float64")
        for one in (layer.q, layer.k, layer.v)
    )
    if shared:
        k, v = (np.repeat(one[:, :, :1], HEADS, axis=2) for one in (k, v))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k)
    weights = np.exp(logits if layer.way in ("shares_values", "with_sink") else logits / SIZE**0.5)
    weights /= weights.sum(axis=-1, keepdims=True) + (np.e if layer.way == "with_sink" else 0)
    ends = in_numpy(layer.o.kernel) @ in_numpy(dense.kernel).reshape(5, 8, 1)  # (query, head * size, 1)
    return weights, v, ends.reshape(5, HEADS, SIZE)


def test_gradients_by_attention_are_those_worked_out_by_hand():
    model = of_tokens("by_einsum")
    weights, v, ends = parts_of(model)
    gradient = np.einsum("bkhd,qhd->bhqk", v, ends)
    expected = np.maximum(gradient * weights, 0).mean(axis=1).mean(axis=1)
    found = explain.attribute(model, TOKENS, method="attention_gradient", verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["by_einsum", "shares_values"])
def test_head_importance_is_that_worked_out_by_hand(way):
    model = of_tokens(way)
    weights, v, ends = parts_of(model, shared=way == "shares_values")
    of_heads = np.einsum("bhqk,bkhd,qhd->bh", weights, v, ends)
    y = RNG.normal(size=12)
    missed = model.predict(TOKENS, verbose=0)[:, 0] - y
    importance = explain.head_importance(model, TOKENS, y, verbose=0)["written"]
    np.testing.assert_allclose(importance["gradient"], np.abs(2 * missed[:, None] * of_heads).mean(0), rtol=1e-4)
    ablation = ((missed[:, None] - of_heads) ** 2 - missed[:, None] ** 2).mean(axis=0)
    np.testing.assert_allclose(importance["ablation"], ablation, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["by_einsum", "fused", "shares_values"])
def test_value_norms_are_those_before_the_projection(way):
    model = of_tokens(way)
    weights, v, _ = parts_of(model, shared=way == "shares_values")
    sizes = np.linalg.norm(v, axis=-1)
    expected = np.sqrt(np.einsum("bhqk,bkh->bqk", weights**2, sizes**2)).mean(axis=1)
    found = explain.attribute(model, TOKENS, method="value_norm", verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", [layers.Attention, layers.AdditiveAttention])
def test_value_norms_of_layers_without_projection_are_exact(kind):
    layer = kind(name="plain")
    model = of_tokens(None, lambda x: layer([x, x]))
    weights = explain.capture(model, TOKENS, verbose=0)["plain"].values[:, 0]
    vectors = weights[..., None] * TOKENS[:, None]
    np.testing.assert_allclose(vectors.sum(axis=2), in_numpy(layer([TOKENS, TOKENS])), atol=1e-5)
    found = explain.attribute(model, TOKENS, method="value_norm", verbose=0)
    np.testing.assert_allclose(found, np.linalg.norm(vectors, axis=-1).mean(axis=1), rtol=1e-4)


@pytest.mark.parametrize("way", ["shares_values", "fused"])
def test_tokens_are_followed_to_the_keys_that_they_become(way):
    """The first key is a class token, the same for all samples; the model is linear in the others' values."""
    inputs = keras.Input((4, 8))
    tokens = ops.concatenate([ops.ones_like(inputs[:, :1]), ops.flip(inputs, axis=1)], axis=1)
    written = Written(way, name="written")
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(written(tokens))))
    written.q.kernel.assign(0 * written.q.kernel)  # all keys get the same weight
    x = TOKENS[:, :4]
    found = explain.attribute(model, x, method="integrated_gradients", verbose=0)
    v = (x[:, ::-1] @ in_numpy(written.v.kernel)).reshape(12, 4, HEADS, SIZE)
    v = np.repeat(v[:, :, :1], HEADS, axis=2) if way == "shares_values" else v
    ends = in_numpy(written.o.kernel) @ in_numpy(model.layers[-1].kernel).reshape(5, 8, 1).sum(axis=0)
    expected = v.reshape(12, 4, 8) @ ends[:, 0] / 5
    np.testing.assert_allclose(found, np.pad(expected, ((0, 0), (1, 0))), rtol=1e-4, atol=1e-6)


def test_queries_without_a_key_keep_what_the_function_gives_them():
    model = of_tokens("fused_and_masked", end=layers.Identity())
    edit = editor(model, (ops.convert_to_tensor(TOKENS),), None)
    without = edit.predict((ops.convert_to_tensor(TOKENS),), lambda name, scores, given: 0 * scores, {})
    rows, own = (in_numpy(one).reshape(12, 5, 8) for one in (without, model(TOKENS)))
    np.testing.assert_allclose(rows[:, 4], own[:, 4], atol=1e-5)
    np.testing.assert_allclose(
        rows[:, :4], np.broadcast_to(in_numpy(model.get_layer("written").o.bias), (12, 4, 8)), atol=1e-6
    )


def test_a_layer_that_is_called_twice_is_edited_in_each_call():
    inputs = keras.Input((5, 8))
    layer = Written("fused", name="written")
    model = keras.Model(inputs, layers.Flatten()(layer(layer(inputs))))
    edit = editor(model, (ops.convert_to_tensor(TOKENS),), None)
    assert edit.shapes == {"written#1": (2, 5, 5), "written#2": (2, 5, 5)}

    def without_the_second(name, scores, given):
        return scores * (name == "written#1")

    outputs = edit.predict((ops.convert_to_tensor(TOKENS),), without_the_second, {})
    np.testing.assert_allclose(in_numpy(outputs), np.tile(in_numpy(layer.o.bias), (12, 5)), atol=1e-6)


def test_keys_that_no_query_attends_to_are_out_of_view():
    np.testing.assert_array_equal(
        keys_in_view(tabular("hides_two_keys"), X, X.shape[1], None), np.tile([True, True, False, False], (48, 1))
    )
    assert keys_in_view(tabular("fused"), X, X.shape[1], None).all()
    assert keys_in_view(tabular(), X, X.shape[1], None).all()


class Around(layers.Layer):
    """A layer whose attention is another one, without weights."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.projection, self.inner = layers.Dense(8), layers.Attention(name="inner")

    def build(self, shape):
        self.projection.build(shape)

    def call(self, x):
        x = self.projection(x)
        return self.inner([x, x])


def test_the_weights_of_an_attention_without_any_are_those_of_the_layer_around_it():
    model = of_tokens(None, Around())
    assert list(explain.capture(model, TOKENS, verbose=0)) == ["inner"]
    result = explain.parameter_randomization(model, TOKENS, draws=2, verbose=0)
    assert (result["distance"] > 0.001).all()
    inputs = keras.Input((5, 8))
    nowhere = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(layers.Attention(name="alone")([inputs, inputs]))))
    with pytest.raises(ValueError, match="attention 'alone' has weights, except the model itself"):
        explain.parameter_randomization(nowhere, TOKENS, draws=2, verbose=0)


def test_statistics_of_heads_with_a_sink_are_those_of_the_rest_of_the_weight():
    model = of_tokens("with_sink")
    weights, _, _ = parts_of(model)
    assert weights.sum(axis=-1).mean() < 0.9
    scores = explain.capture(model, TOKENS, verbose=0)["written"]
    np.testing.assert_allclose(scores, weights, atol=1e-5)
    rest = xr.DataArray(weights / weights.sum(axis=-1, keepdims=True), dims=scores.dims)
    expected = explain.head_statistics(rest)
    xr.testing.assert_allclose(explain.head_statistics(scores), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="are not weights"):
        explain.head_statistics(scores.drop_vars("sink"))
    recorded = before_training(model, explain.AttentionMonitor(TOKENS))["written"]
    xr.testing.assert_allclose(recorded.isel(epoch=0, drop=True), expected, rtol=1e-4)


def test_a_sink_is_named_where_rows_have_to_sum_to_1():
    model = of_tokens("with_sink")
    weights, _, _ = parts_of(model)
    found = explain.attribute(model, TOKENS, verbose=0)
    np.testing.assert_allclose(found.sum("feature"), weights.sum(axis=-1).mean(axis=(1, 2)), rtol=1e-4)
    with pytest.raises(ValueError, match="Those of 'written' sum to less, because an attention sink"):
        explain.attribute(model, TOKENS, method="rollout", verbose=0)
    scores = explain.capture(model, TOKENS, verbose=0)["written"]
    with pytest.raises(ValueError, match="Those of 'written' sum to less, because an attention sink"):
        explain.rollout({"written": scores})


def test_controls_leave_a_sink_its_part():
    model = of_tokens("with_sink")
    weights, v, ends = parts_of(model)
    shares = np.broadcast_to(weights.mean(axis=-1, keepdims=True), weights.shape)
    own, uniform = (np.einsum("bhqk,bkhd,qhd->b", one, v, ends) for one in (weights, shares))
    spread = np.sqrt(np.pi / 2) * np.abs(own - np.median(own)).mean()
    result = explain.attention_controls(model, TOKENS, draws=1, steps=1, verbose=0)
    np.testing.assert_allclose(result["change"].sel(control="uniform"), np.abs(uniform - own) / spread, rtol=1e-3)


class Folded(layers.Layer):
    """Attention within windows of 2 positions, which are folded into the batch, or an axis of their own."""

    def __init__(self, folds, **kwargs):
        super().__init__(**kwargs)
        self.folds, self.dense = folds, layers.Dense(8)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        windows = ops.reshape(self.dense(x), (-1, 2, 8) if self.folds else (-1, 2, 2, 2, 4))
        letters = "bqd,bkd->bqk|bqk,bkd->bqd" if self.folds else "bwqhd,bwkhd->bwhqk|bwhqk,bwkhd->bwqhd"
        of_scores, of_values = letters.split("|")
        weights = ops.softmax(ops.einsum(of_scores, windows, windows))
        return ops.reshape(ops.einsum(of_values, weights, windows), (-1, 4, 8))

    def compute_output_shape(self, shape):
        return shape


@functools.cache
def in_windows(folds):
    inputs = keras.Input((4, 8))
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(Folded(folds, name="windows")(inputs))))
    model.compile(loss="mse")
    return model


REFUSING = {
    **{
        method: functools.partial(explain.attribute, method=method)
        for method in ("attention", "rollout", "attention_gradient", "value_norm", "integrated_gradients")
    },
    "head_importance": lambda model, x, verbose: explain.head_importance(model, x, np.zeros(12), verbose=verbose),
    "attention_controls": functools.partial(explain.attention_controls, steps=1),
    "parameter_randomization": functools.partial(explain.parameter_randomization, draws=1),
}


@pytest.mark.parametrize("verb", REFUSING)
def test_windows_in_the_batch_are_refused_by_name(verb):
    with pytest.raises(ValueError, match=r"[Ll]ayer 'windows'.*layers=\["):
        REFUSING[verb](in_windows(folds=True), TOKENS[:, :4], verbose=0)


@pytest.mark.parametrize("verb", ["attention", "attention_gradient", "value_norm", "integrated_gradients"])
def test_an_axis_of_windows_is_refused_by_name(verb):
    with pytest.raises(
        ValueError, match=r"Layer 'windows' attends over several axes, or has axes beside the one it attends over"
    ):
        REFUSING[verb](in_windows(folds=False), TOKENS[:, :4], verbose=0)
