"""`capture` of models that are trained on several devices; here virtual ones, on one machine."""

import os
import subprocess
import sys
import textwrap

import keras

COMMON = """
    import keras
    import numpy as np
    from kerasfactory import explain

    def build():
        inputs = keras.Input((5, 8))
        attention = keras.layers.MultiHeadAttention(2, 4, dropout=0.1, name="attention")
        return keras.Model(inputs, keras.layers.Dense(1)(attention(inputs, inputs)[:, 0]))

    def captured(model, **arguments):
        scores = explain.capture(model, x, batch_size=8, verbose=0, **arguments)["attention"]
        assert scores.shape == (20, 2, 5, 5)
        assert scores.attrs["prediction_difference"] < 1e-5
        return scores

    x = np.random.default_rng(0).normal(size=(20, 5, 8)).astype("float32")  # the last batch is not full
    y = np.ones((20, 1))
"""

DATA_PARALLEL = """
    import jax

    assert len(jax.devices()) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = build()
    model.compile("adam", "mse")
    model.fit(x, y, batch_size=10, epochs=1, verbose=0)
    assert len(model.layers[1]._query_dense.kernel.value.sharding.device_set) == 2
    weights, scores = model.get_weights(), captured(model)
    np.testing.assert_array_equal(captured(model, store="scores.zarr"), scores)

    keras.distribution.set_distribution(None)
    alone = build()
    alone.set_weights(weights)
    assert len(alone.layers[1]._query_dense.kernel.value.sharding.device_set) == 1
    np.testing.assert_allclose(scores, captured(alone), atol=1e-6)
"""

MIRRORED = """
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    with strategy.scope():
        model = build()
        model.compile("adam", "mse", jit_compile=False)
    model.fit(x, y, batch_size=10, epochs=1, verbose=0)
    alone = build()
    alone.set_weights(model.get_weights())

    expected = captured(alone)

    np.testing.assert_allclose(captured(model), expected, atol=1e-6)
    np.testing.assert_allclose(captured(model, store="scores.zarr"), expected, atol=1e-6)
    with strategy.scope():
        np.testing.assert_allclose(captured(model), expected, atol=1e-6)
"""


def run(program, folder, **environment):
    code = textwrap.dedent(COMMON) + textwrap.dedent(program)
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr


# What each backend offers for several devices. Keras has nothing for them on PyTorch.
if keras.config.backend() == "jax":

    def test_data_parallel(tmp_path):
        run(DATA_PARALLEL, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")

elif keras.config.backend() == "tensorflow":

    def test_mirrored_strategy(tmp_path):
        run(MIRRORED, tmp_path)
