"""A model trains as if nobody watched, and what was seen is what `capture` sees."""

import itertools
import sys

import keras
import numpy as np
import pytest
import tensorboard.summary
import xarray as xr
from keras import layers
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.scalar import metadata

from kerasfactory import _backend, explain
from kerasfactory.layers import InterpretableMultiHeadAttention

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 5, 8)).astype("float32")
Y = X[np.arange(64), X[:, :, 0].argmax(1), 1]


def compiled(attention=InterpretableMultiHeadAttention):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    if attention is InterpretableMultiHeadAttention:
        x = attention(4, 2, dropout_rate=0.2, name="first")(inputs)
    else:
        x = attention(2, 4, dropout=0.2, name="first")(inputs, inputs)
    x = layers.Dropout(0.2)(layers.BatchNormalization()(x))
    x = layers.MultiHeadAttention(3, 4, name="second")(x, x)
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(x)))
    model.compile(keras.optimizers.Adam(0.1), "mse")
    return model


def fit(model, *callbacks, epochs=3, **more):
    return model.fit(X, Y, batch_size=16, epochs=epochs, verbose=0, callbacks=list(callbacks), **more)


@pytest.fixture(scope="module")
def monitored():
    model, monitor = compiled(), explain.AttentionMonitor(X[:20], batch_size=8)
    losses = fit(model, monitor).history["loss"]
    return model, monitor, losses


def test_the_weights_after_training_are_the_same_bit_by_bit(monitored):
    model, _, losses = monitored
    alone = compiled()
    assert fit(alone).history["loss"] == losses
    for one, other in zip(alone.variables, model.variables, strict=True):  # the states of dropout's seeds included
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(other))
    for one, other in zip(alone.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(other))


def test_the_last_entry_is_what_the_trained_model_shows_and_the_first_what_the_new_one_does(monitored):
    model, monitor, _ = monitored
    for epoch, shown in ((3, model), (0, compiled())):
        expected = explain.head_statistics(explain.capture(shown, X[:20], verbose=0))
        assert list(monitor.history) == ["first", "second"]
        for name, history in monitor.history.items():
            assert history.sizes["epoch"] == 4
            assert history["epoch"].values.tolist() == [0, 1, 2, 3]
            xr.testing.assert_allclose(history.sel(epoch=epoch, drop=True), expected[name], atol=1e-6)
            assert history.attrs["layer"] == name
            assert history["redundancy"].dims == ("epoch", "head", "head_other")


def test_attention_moves_in_every_epoch(monitored):
    for history in monitored[1].history.values():
        assert (np.abs(history["entropy"].diff("epoch")).max("head") > 1e-4).all()


def test_what_happened_in_each_epoch_is_what_shorter_trainings_end_with(monitored):
    model = compiled()
    fit(model, epochs=2)
    expected = explain.head_statistics(explain.capture(model, X[:20], verbose=0))["second"]
    xr.testing.assert_allclose(monitored[1].history["second"].sel(epoch=2, drop=True), expected, atol=1e-6)


if keras.config.backend() != "torch":  # which traces nothing

    def test_functions_are_traced_once_and_not_in_every_epoch(monkeypatch):
        count = []
        real = _backend.compiled
        monkeypatch.setattr(_backend, "compiled", lambda step, **how: count.append(step) or real(step, **how))
        fit(compiled(), explain.AttentionMonitor(X[:8], batch_size=4), epochs=5)
        # One pair of functions before the first epoch; another when training has set attributes of the model.
        assert len(count) in (2, 4)
        count.clear()
        fit(compiled(), explain.AttentionMonitor(X[:8], batch_size=4), epochs=9)
        assert len(count) in (2, 4)


def test_only_statistics_are_kept():
    few, many = (explain.AttentionMonitor(X[:samples]) for samples in (4, 64))
    fit(compiled(), few, many, epochs=4)
    for monitor in (few, many):
        assert set(vars(monitor)) == set(vars(explain.AttentionMonitor(X)))
        for record in monitor._records.values():
            for name, heads in (("first", 2), ("second", 3)):
                assert sum(record[name][variable].nbytes for variable in record[name]) == 8 * (3 * heads + heads**2)


def test_every_other_epoch_and_only_one_layer():
    monitor = explain.AttentionMonitor(X[:8], layers="second", every=2)
    assert monitor.history == {}
    fit(compiled(), monitor, epochs=5)
    assert list(monitor.history) == ["second"]
    assert monitor.history["second"]["epoch"].values.tolist() == [0, 2, 4]


def test_a_training_that_goes_on_goes_on_and_one_that_starts_over_starts_over():
    model, monitor = compiled(keras.layers.MultiHeadAttention), explain.AttentionMonitor(X[:8])
    fit(model, monitor, epochs=2)
    fit(model, monitor, epochs=4, initial_epoch=2, validation_data=(X[:8], Y[:8]))
    assert monitor.history["first"]["epoch"].values.tolist() == [0, 1, 2, 3, 4]
    last = monitor.history["first"].sel(epoch=4, drop=True)
    fit(model, monitor, epochs=1)
    assert monitor.history["first"]["epoch"].values.tolist() == [0, 1]
    xr.testing.assert_allclose(monitor.history["first"].sel(epoch=0, drop=True), last)


def test_a_training_that_ends_in_nan_is_recorded_and_not_stopped():
    model = compiled()
    model.compile(keras.optimizers.SGD(1e30), "mse")
    monitor = explain.AttentionMonitor(X[:8])
    fit(model, monitor, epochs=2)
    assert np.isfinite(monitor.history["second"]["entropy"].sel(epoch=0)).all()
    assert np.isnan(monitor.history["second"]["entropy"].sel(epoch=2)).all()


def shown(log_dir):
    """What TensorBoard's page of scalars gets to show: for each tag, the numbers by their steps."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(log_dir))
    runs.Reload()
    data = MultiplexerDataProvider(runs, str(log_dir))
    (series,) = data.read_scalars(
        RequestContext(), experiment_id="", plugin_name=metadata.PLUGIN_NAME, downsample=100
    ).values()
    return {tag: {point.step: point.value for point in points} for tag, points in series.items()}


def recorded(monitor):
    series = {}
    for layer, history in monitor.history.items():
        heads = history["head"].values
        for head in heads:
            for variable in ("entropy", "confidence", "distance"):
                series[f"attention/{layer}/{variable}/{head}"] = history[variable].sel(head=head)
        for one, other in itertools.combinations(heads, 2):
            redundancy = history["redundancy"].sel(head=one, head_other=other)
            series[f"attention/{layer}/redundancy/{one}-{other}"] = redundancy
    assert len(series) == (3 * 2 + 1) + (3 * 3 + 3)  # for 2 and 3 heads: numbers and pairs
    return {
        tag: dict(zip(values["epoch"].values.tolist(), values.values.astype("float32").tolist(), strict=True))
        for tag, values in series.items()
    }


@pytest.mark.backend_independent
def test_tensorboard_shows_what_its_own_writer_wrote(tmp_path, monkeypatch):
    with monkeypatch.context() as installed:
        installed.setattr(keras.config, "backend", lambda: "jax")  # on TensorFlow, that would write
        installed.setitem(sys.modules, "tensorflow", None)  # TensorBoard would make use of it
        monitor = explain.AttentionMonitor(X[:8], every=2, log_dir=tmp_path)
    assert isinstance(monitor._writer, tensorboard.summary.Writer)
    fit(compiled(), monitor, epochs=4)
    assert shown(tmp_path) == recorded(monitor)


@pytest.mark.backend_independent
def test_tensorboard_shows_what_tensorflow_wrote(tmp_path, monkeypatch):
    with monkeypatch.context() as installed:
        for module in ("tensorboard", "tensorboard.summary"):
            installed.setitem(sys.modules, module, None)
        monitor = explain.AttentionMonitor(X[:8], every=2, log_dir=tmp_path)
        fit(compiled(), monitor, epochs=4)
    assert shown(tmp_path) == recorded(monitor)


@pytest.mark.backend_independent
def test_without_anything_that_writes_for_tensorboard(monkeypatch):
    for module in ("tensorboard.summary", "tensorflow"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        explain.AttentionMonitor(X, log_dir="logs")


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X, "every": 0}, "`every` must be a positive integer"),
        ({"x": iter([X])}, "can be read only once"),
        ({"x": X, "layers": "third"}, "no layer 'third'"),
        ({"x": X[:0]}, "empty"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(compiled(), explain.AttentionMonitor(**arguments), epochs=1)


@pytest.mark.backend_independent
def test_layers_with_several_attention_axes_are_named_before_training():
    inputs = keras.Input((2, 3, 8))
    x = layers.MultiHeadAttention(2, 4, attention_axes=(1, 2), name="image")(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(x)))
    model.compile(loss="mse")
    images = np.ones((4, 2, 3, 8), "float32")
    with pytest.raises(ValueError, match="'image' attends over several axes"):
        model.fit(images, np.ones(4), verbose=0, callbacks=[explain.AttentionMonitor(images)])
