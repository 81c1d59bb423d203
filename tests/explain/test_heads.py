"""Statistics of heads against hand calculations, and their importance against what the same model does without them."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers, ops
from scipy.spatial.distance import jensenshannon

from kerasfactory import _backend, explain
from kerasfactory.explain import _heads
from kerasfactory.layers import InterpretableMultiHeadAttention

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 5, 8)).astype("float32")
Y = X[:, 0, 0] + X[:, 1, 1] ** 2
DIMS = ("sample", "head", "query", "key")
ATTENTIONS = {
    "keras": lambda name: layers.MultiHeadAttention(2, 4, name=name),
    "ours": lambda name: InterpretableMultiHeadAttention(4, 2, name=name),
    "grouped": lambda name: layers.GroupQueryAttention(4, 4, 2, name=name),
}


def random_scores(shape, masked=()):
    scores = RNG.dirichlet(np.ones(shape[-1]), size=shape[:-1])
    scores[..., list(masked)] = 0
    return xr.DataArray(scores / scores.sum(-1, keepdims=True), dims=DIMS)


def two_layers(attention=ATTENTIONS["keras"], outputs=1, activation=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    once = attention("first")
    x = once(once(inputs, inputs), inputs)
    x = attention("second")(x, x)
    return keras.Model(inputs, layers.Dense(outputs, activation=activation)(layers.Flatten()(x)))


@pytest.mark.backend_independent
def test_even_heads_sharp_heads_and_heads_that_look_ahead():
    ahead = np.roll(np.eye(4), 1, axis=1)
    scores = xr.DataArray([[np.full((4, 4), 1 / 4), np.eye(4), ahead]], dims=DIMS)
    statistics = explain.head_statistics(scores)
    np.testing.assert_allclose(statistics["entropy"], [1, 0, 0], atol=1e-15)
    np.testing.assert_allclose(statistics["confidence"], [1 / 4, 1, 1])
    np.testing.assert_allclose(statistics["distance"], [1.25, 0, 1.5])
    np.testing.assert_allclose(statistics["redundancy"].sel(head=1), [jensenshannon([1, 0, 0, 0], [0.25] * 4, 2), 0, 1])
    assert {name: variable.dims for name, variable in statistics.items()} == {
        "entropy": ("head",),
        "confidence": ("head",),
        "distance": ("head",),
        "redundancy": ("head", "head_other"),
    }


@pytest.mark.backend_independent
def test_each_number_is_the_mean_of_what_scipy_and_the_formula_say():
    scores = random_scores((6, 3, 4, 4))
    statistics = explain.head_statistics(scores)
    w = scores.values
    np.testing.assert_allclose(statistics["entropy"], -(w * np.log(w)).sum(-1).mean((0, 2)) / np.log(4))
    np.testing.assert_allclose(statistics["confidence"], w.max(-1).mean((0, 2)))
    distance = [
        [[sum(w[s, h, i, j] * abs(i - j) for i in range(4) for j in range(4)) / 4] for h in range(3)] for s in range(6)
    ]
    np.testing.assert_allclose(statistics["distance"], np.mean(distance, axis=0)[:, 0])
    for one in range(3):
        for other in range(3):
            expected = jensenshannon(w[:, one], w[:, other], 2, axis=-1).mean()
            np.testing.assert_allclose(statistics["redundancy"][one, other], expected, atol=1e-7)
    assert (statistics["redundancy"] <= 1).all()


@pytest.mark.backend_independent
def test_twin_heads_have_redundancy_0_also_when_rounding_tells_them_apart():
    scores = random_scores((50, 1, 6, 6)).astype("float32")
    twins = xr.concat([scores, scores, scores * np.float32(1 + 1e-6)], "head")
    np.testing.assert_allclose(explain.head_statistics(twins)["redundancy"], 0, atol=1e-6)
    assert (explain.head_statistics(twins)["redundancy"][0, 1] == 0).all()


@pytest.mark.backend_independent
def test_masked_keys_do_not_count_and_queries_that_look_nowhere_are_left_out():
    seen, padded = random_scores((6, 2, 4, 4)), np.zeros((6, 2, 6, 6))
    padded[:, :, 1:5, 1:5] = seen  # the first key and query and the last ones are padding
    xr.testing.assert_allclose(
        explain.head_statistics(xr.DataArray(padded, dims=DIMS)).drop_vars(["head", "head_other"]),
        explain.head_statistics(seen).drop_vars(["head", "head_other"]),
    )

    causal = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    statistics = explain.head_statistics(xr.DataArray([[causal, causal]], dims=DIMS))
    np.testing.assert_allclose(statistics["entropy"], 1)  # even over 1, 2, 3 and 4 keys; the first has no choice
    np.testing.assert_allclose(statistics["confidence"], (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)

    no_choice = explain.head_statistics(xr.DataArray(np.ones((3, 2, 1, 1)), dims=DIMS))
    np.testing.assert_array_equal(no_choice["entropy"], 0)
    blind = explain.head_statistics(xr.DataArray([[np.zeros((4, 4)), causal]], dims=DIMS))
    np.testing.assert_array_equal(np.isnan(blind["entropy"]), [True, False])
    np.testing.assert_array_equal(np.isnan(blind["redundancy"]), [[True, True], [True, False]])


@pytest.mark.backend_independent
def test_a_head_whose_other_weights_underflow_is_sharp():
    sharp = np.eye(4)[[1, 1, 1, 1]]
    scores = xr.DataArray([[np.full((4, 4), 1 / 4), sharp]], dims=DIMS)
    np.testing.assert_allclose(explain.head_statistics(scores)["entropy"], [1, 0], atol=1e-15)


@pytest.mark.backend_independent
def test_distance_needs_queries_and_keys_that_count_the_same_positions():
    statistics = explain.head_statistics(random_scores((2, 2, 3, 5)))
    assert np.isnan(statistics["distance"]).all()
    assert np.isfinite(statistics["redundancy"]).all()


@pytest.mark.backend_independent
def test_nan_stays_nan_in_its_head():
    scores = random_scores((4, 3, 5, 5))
    scores[2, 1, 3] = np.nan
    statistics = explain.head_statistics(scores)
    for name in ("entropy", "confidence", "distance"):
        np.testing.assert_array_equal(np.isnan(statistics[name]), [False, True, False])
    np.testing.assert_array_equal(np.isnan(statistics["redundancy"][0]), [False, True, False])


def test_what_capture_returns_goes_in_as_it_is(monkeypatch):
    model = two_layers()
    weights = explain.capture(model, X, verbose=0)
    statistics = explain.head_statistics(weights)
    assert list(statistics) == ["first#1", "first#2", "second"]
    assert statistics["second"].attrs == weights["second"].attrs
    folded = weights["second"].rename(sample="sequence").assign_coords(head=["a", "b"])
    assert explain.head_statistics(folded)["redundancy"].sel(head="a", head_other="b") > 0
    one = explain.head_statistics(weights["second"].isel(sample=0))
    xr.testing.assert_identical(one, explain.head_statistics(weights["second"].isel(sample=[0])))
    monkeypatch.setattr(_heads, "_BLOCK", 3 * 2 * 25)  # three samples at a time: the last block is shorter
    xr.testing.assert_allclose(explain.head_statistics(weights)["second"], statistics["second"])


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (random_scores((2, 2, 3, 3)).rename(query="query_0", key="key_0"), r"several axes.*query_0, key_0"),
        (random_scores((2, 2, 3, 3)).mean("head"), r"dimensions \(sample, query, key\)"),
        (random_scores((2, 2, 3, 3)) * 2, r"are not weights.*sum to 2 up to 2"),
        (random_scores((2, 2, 3, 3))[:0], "at least one sample"),
        (np.ones((1, 1, 1, 1)), "`explain.capture` returns.*ndarray"),
        (xr.Dataset(), "Summaries do not contain.*Dataset"),
    ],
)
def test_what_is_no_scores_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        explain.head_statistics(weights)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_ablation_is_the_loss_without_the_heads_slice_of_the_output_kernel(kind):
    model = two_layers(ATTENTIONS[kind])
    model.compile(loss="mse")
    weights = [value.copy() for value in model.get_weights()]
    importance = explain.head_importance(model, X, Y, batch_size=16, verbose=0)  # 16, 16 and 8 samples
    assert list(importance) == ["first#1", "first#2", "second"]
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)

    intact = model.evaluate(X, Y, verbose=0)
    second = importance["second"]
    np.testing.assert_allclose(second.attrs["loss_value"], intact, rtol=1e-5)
    attention = model.get_layer("second")
    kernel = getattr(attention, "mha", attention)._output_dense.kernel
    values = ops.convert_to_numpy(kernel).copy()
    for head in second["head"].values:
        without = values.copy()
        without[head] = 0
        kernel.assign(without)
        np.testing.assert_allclose(second["ablation"][head], model.evaluate(X, Y, verbose=0) - intact, atol=1e-5)
    assert np.abs(second["ablation"]).max() > 1e-3


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_gradient_is_that_of_finite_differences_and_absolute_sample_by_sample(kind):
    model = two_layers(ATTENTIONS[kind])
    importance = explain.head_importance(model, X, Y, loss="mse", batch_size=16, verbose=0)["second"]
    attention = model.get_layer("second")
    kernel = getattr(attention, "mha", attention)._output_dense.kernel
    values = ops.convert_to_numpy(kernel).copy()

    def losses(head, mask):
        scaled = values.copy()
        scaled[head] *= mask
        kernel.assign(scaled)
        return (model.predict(X, verbose=0)[:, 0].astype("float64") - Y) ** 2

    for head in importance["head"].values:
        slopes = (losses(head, 1.01) - losses(head, 0.99)) / 0.02
        np.testing.assert_allclose(importance["gradient"][head], np.abs(slopes).mean(), rtol=2e-3)
        assert np.abs(slopes.mean()) < 0.98 * np.abs(slopes).mean()  # so that it matters that they are absolute first


def test_a_mask_acts_on_one_call_of_a_layer_that_is_called_twice():
    model = two_layers(ATTENTIONS["keras"])
    importance = explain.head_importance(model, X, Y, loss="mse", verbose=0)
    first, second = importance["first#1"], importance["first#2"]
    assert (first.attrs["call"], second.attrs["call"], second.attrs["layer"]) == (1, 2, "first")
    assert not np.allclose(first["ablation"], second["ablation"], rtol=1e-2)
    only = explain.head_importance(model, X, Y, loss="mse", layers="first", verbose=0)
    assert list(only) == ["first#1", "first#2"]
    np.testing.assert_allclose(only["first#2"]["ablation"], second["ablation"], atol=1e-6)


def test_a_head_that_does_nothing_has_no_importance():
    model = two_layers(ATTENTIONS["keras"])
    kernel = model.get_layer("second")._output_dense.kernel
    values = ops.convert_to_numpy(kernel).copy()
    values[1] = 0
    kernel.assign(values)
    importance = explain.head_importance(model, X, Y, loss="mse", verbose=0)["second"]
    np.testing.assert_array_equal(importance["gradient"] > 0, [True, False])
    np.testing.assert_array_equal(importance["ablation"] == 0, [False, True])


@pytest.mark.parametrize("given", ["name", "object", "function", "shorthand", "list", "dictionary"])
def test_the_loss_is_the_compiled_one_or_the_one_given(given):
    model = two_layers(outputs=3, activation="softmax")
    labels = RNG.integers(0, 3, len(X))
    losses = {
        "name": "sparse_categorical_crossentropy",
        "object": keras.losses.SparseCategoricalCrossentropy(reduction="sum"),  # its reduction is not used
        "function": lambda y, outputs: keras.losses.sparse_categorical_crossentropy(y, outputs),
        "shorthand": "crossentropy",
        "list": ["ce"],
        "dictionary": {"output": "crossentropy"},
    }
    model.compile(loss=losses["name"])
    compiled = explain.head_importance(model, X, labels, verbose=0)["second"]
    np.testing.assert_allclose(compiled.attrs["loss_value"], model.evaluate(X, labels, verbose=0), rtol=1e-5)
    other = explain.head_importance(model, X, labels, loss=losses[given], verbose=0)["second"]
    xr.testing.assert_allclose(compiled, other)


def test_targets_without_the_axis_of_the_outputs_do_not_broadcast():
    model = two_layers()
    squared = explain.head_importance(model, X, Y, loss=lambda y, outputs: (y - outputs) ** 2, verbose=0)["second"]
    xr.testing.assert_allclose(squared, explain.head_importance(model, X, Y[:, None], loss="mse", verbose=0)["second"])


def test_a_loss_is_compiled_once_for_all_sizes_of_batches():
    model, traced = two_layers(), []

    def loss(y, outputs):
        if _backend.concrete(outputs) is None:
            traced.append(outputs)
        return (y - outputs) ** 2

    importance = explain.head_importance(model, X, Y, loss=loss, batch_size=16, verbose=0)[
        "second"
    ]  # 16, 16 and 8 samples
    assert len(traced) == {"tensorflow": 1, "jax": 2}.get(keras.config.backend(), 0)  # `jax.jit` is for one size
    model.compile(loss="mse", run_eagerly=True)
    xr.testing.assert_allclose(importance, explain.head_importance(model, X, Y, verbose=0)["second"], rtol=1e-4)


def test_a_loss_that_cannot_be_compiled_runs_as_it_is():
    def loss(y, outputs):
        with warnings.catch_warnings():  # of NumPy to Keras
            warnings.simplefilter("ignore", DeprecationWarning)
            values = np.tanh(ops.convert_to_numpy(y))  # a graph has none
        return ops.square(outputs - ops.convert_to_tensor(values))

    # Nothing is compiled on PyTorch.
    told = contextlib.nullcontext() if keras.config.backend() == "torch" else pytest.warns(match="computed eagerly")
    with told:
        importance = explain.head_importance(two_layers(), X, Y, loss=loss, batch_size=16, verbose=0)["second"]
    expected = explain.head_importance(two_layers(), X, np.tanh(Y), loss="mse", batch_size=16, verbose=0)["second"]
    xr.testing.assert_allclose(importance, expected, rtol=1e-4)


def test_several_outputs_and_several_inputs():
    keras.utils.set_random_seed(0)
    one, other = keras.Input((5, 8), name="one"), keras.Input((3, 8), name="other")
    attended = layers.MultiHeadAttention(2, 4, name="cross")(one, other)
    model = keras.Model({"one": one, "other": other}, [layers.Dense(1)(attended), layers.Dense(2)(attended)])
    model.compile(loss=["mse", "mse"])
    x = {"one": X, "other": X[:, :3]}
    with pytest.raises(ValueError, match="compiled with several losses"):
        explain.head_importance(model, x, Y, verbose=0)
    importance = explain.head_importance(
        model, x, Y, loss=lambda y, outputs: ops.mean(outputs[1], (1, 2)) * y, verbose=0
    )
    assert (importance["cross"]["gradient"] > 0).all()


def test_targets_in_a_dictionary_may_be_without_an_axis_of_outputs():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    attended = layers.GlobalAveragePooling1D()(layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs))
    outputs = {"dose": layers.Dense(1)(attended), "risk": layers.Dense(1)(attended)}

    def squared(y, outputs):
        return (y["dose"] - outputs["dose"]) ** 2 + (y["risk"] - outputs["risk"]) ** 2

    model, targets = keras.Model(inputs, outputs), {"dose": Y, "risk": Y**2}
    importance = explain.head_importance(model, X, targets, loss=squared, verbose=0)["attention"]
    predicted = model.predict(X, verbose=0)
    expected = sum(((predicted[name][:, 0] - values) ** 2).mean() for name, values in targets.items())
    np.testing.assert_allclose(importance.attrs["loss_value"], expected, rtol=1e-5)

    of_one = keras.Model(inputs, {"dose": outputs["dose"]})
    for targets in ({"dose": Y}, {"dose": Y[:, None]}, Y):
        importance = explain.head_importance(of_one, X, targets, loss="mse", verbose=0)["attention"]
        expected = ((predicted["dose"][:, 0] - Y) ** 2).mean()
        np.testing.assert_allclose(importance.attrs["loss_value"], expected, rtol=1e-5)


def test_several_attention_axes():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3, 4, 8))
    attended = layers.MultiHeadAttention(2, 4, attention_axes=(1, 2), name="attention")(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(attended)))
    x = RNG.normal(size=(6, 3, 4, 8)).astype("float32")
    importance = explain.head_importance(model, x, np.ones(6), loss="mse", verbose=0)["attention"]
    values = ops.convert_to_numpy(model.get_layer("attention")._output_dense.kernel).copy()
    values[1] = 0
    model.get_layer("attention")._output_dense.kernel.assign(values)
    after = ((model.predict(x, verbose=0) - 1) ** 2).mean()
    np.testing.assert_allclose(importance["ablation"][1], after - importance.attrs["loss_value"], atol=1e-5)
    with pytest.raises(ValueError, match="several axes"):
        explain.head_statistics(explain.capture(model, x, verbose=0))


class Windows(layers.Layer):
    """Attends within windows, folded into the batch."""

    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, 4, name="attention")

    def call(self, x):
        windows = ops.reshape(x, (-1, 2, 8))
        return ops.reshape(self.attention(windows, windows), (-1, 4, 8))


def test_heads_of_layers_that_fold_the_batch_belong_to_no_sample():
    model = keras.Sequential([keras.Input((4, 8)), Windows(), layers.Flatten(), layers.Dense(1)])
    with pytest.raises(ValueError, match=r"folds another axis into the batch.*80 sequences for 40 samples"):
        explain.head_importance(model, X[:, :4], Y, loss="mse", batch_size=64, verbose=0)
    assert explain.head_statistics(explain.capture(model, X[:, :4], verbose=0))["attention"].sizes["head"] == 2


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": None}, "not compiled with a loss"),
        ({"loss": ["mse", "mse"]}, "compiled with several losses"),
        ({"loss": "square"}, "Could not interpret loss"),
        ({"loss": lambda y, outputs: ops.mean(y - outputs)}, "not their mean"),
        ({"y": Y[:-1]}, r"one target for each of the 40 samples.*\(39,\)"),
        ({"y": np.full(40, "sick")}, "must hold numbers"),
        ({"y": np.where(np.arange(40) == 3, np.nan, Y)}, "missing values"),
        ({"x": X[:0], "y": Y[:0]}, "empty"),
        ({"x": iter([X])}, "an array, or a dictionary or list"),
        ({"x": np.full_like(X, np.nan)}, "16 of 16 samples in a batch is not finite.*NaN or infinite"),
        ({"x": np.concatenate([X[:-1], np.full_like(X[:1], np.nan)])}, "1 of 8 samples in a batch is not finite"),
        ({"layers": "third"}, "no layer 'third'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"x": X, "y": Y, "loss": "mse"} | changes
    with pytest.raises(ValueError, match=message):
        explain.head_importance(two_layers(), **arguments, batch_size=16, verbose=0)


def test_a_loss_without_a_gradient_is_told_and_its_ablation_is_right():
    def far_off(y, outputs):  # (sample, 1) both; 0 or 1
        return ops.cast(ops.abs(y - outputs)[:, 0] > 0.5, "float32")

    model = two_layers()
    targets = (model.predict(X, verbose=0)[:, 0] + 0.4).astype("float32")
    with pytest.warns(UserWarning, match="passes on no gradient"):
        importance = explain.head_importance(model, X, targets, loss=far_off, verbose=0)
    assert all((of["gradient"] == 0).all() for of in importance.values())
    assert max(of["ablation"].max() for of in importance.values()) > 0
    assert importance["second"].attrs["loss_value"] == 0
