"""A model that is saved on one backend and loaded on another, and one that is trained on several devices."""

import os
import subprocess
import sys
import textwrap

import keras

BACKEND = keras.config.backend()
BACKENDS = ["tensorflow", "jax", "torch"]

COMMON = """
    import keras
    import numpy as np

    from kerasfactory import explain
    from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

    rng = np.random.default_rng(0)
    x = np.column_stack([rng.standard_normal((24, 2)), rng.integers(0, 3, 24), rng.standard_normal(24)])
    x, y = x.astype("float32"), rng.standard_normal((24, 1)).astype("float32")

    def build():
        inputs = keras.Input((4,))
        tokens = FeatureTokenizer(8, ["age", "income", "region", "size"], {"region": 3})(inputs)
        attention = InterpretableMultiHeadAttention(4, 2, 0.0, name="attention")
        outputs = keras.layers.Dense(1, name="head")(keras.layers.Flatten()(attention(tokens)))
        model = keras.Model(inputs, outputs)
        draw = np.random.default_rng(1)
        model.set_weights([0.5 * draw.standard_normal(weight.shape) for weight in model.get_weights()])
        return model

    def results(model):
        scores = explain.capture(model, x, verbose=0)["attention"]
        return {"output": model.predict(x, verbose=0), "scores": scores.values}
"""

SAVE = """
    model = build()
    np.savez("results.npz", **results(model))
    model.save("model.keras")
    model.save_weights("model.weights.h5")
"""

LOAD = """
    reloaded = keras.models.load_model("model.keras")
    fresh = build()
    fresh.load_weights("model.weights.h5")
    expected = np.load("results.npz")
    scores = keras.Model(reloaded.inputs, reloaded.get_layer("attention").attention_scores)
    np.testing.assert_allclose(scores.predict(x, verbose=0), expected["scores"], atol=2e-6)
    for model in (reloaded, fresh):
        for name, found in results(model).items():
            np.testing.assert_allclose(found, expected[name], atol=2e-6)
"""

# What is trained on several devices is what is trained on one.
TRAIN = """
    def trained(model, **compilation):
        model.compile(keras.optimizers.SGD(0.1), "mse", **compilation)
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        return model

    def check(model):
        for weight, other in zip(model.get_weights(), alone.get_weights(), strict=True):
            np.testing.assert_allclose(weight, other, atol=1e-5)
        for name, found in results(model).items():
            np.testing.assert_allclose(found, expected[name], atol=1e-5)

    def kernel(model):  # of the query's projection: (features, heads, size of a head)
        return model.get_layer("attention").mha.query_dense.kernel.value
"""

PARALLEL = """
    import jax

    alone = trained(build())
    expected = results(alone)
    assert len(kernel(alone).sharding.device_set) == 1

    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = trained(build())
    assert kernel(model).sharding.is_fully_replicated and len(kernel(model).sharding.device_set) == 4
    check(model)

    devices = keras.distribution.DeviceMesh((2, 2), ["batch", "heads"], keras.distribution.list_devices())
    layouts = keras.distribution.LayoutMap(devices)
    layouts["attention/mha/(query|key|value)/kernel"] = (None, "heads", None)
    layouts["attention/mha/attention_output/kernel"] = ("heads", None, None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    model = trained(build())
    assert kernel(model).addressable_shards[0].data.shape == (8, 1, 4)  # a device has one of two heads
    check(model)
"""

MIRRORED = """
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    alone = trained(build(), jit_compile=False)
    expected = results(alone)
    with strategy.scope():
        model = build()
    check(trained(model, jit_compile=False))
"""


def run(program, folder, **environment):
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr


def test_a_model_saved_here_is_the_same_on_another_backend(tmp_path, monkeypatch):
    """The three backends make a ring."""
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(COMMON + SAVE), {})
    others = os.environ.get("OTHER_BACKENDS", BACKENDS[(BACKENDS.index(BACKEND) + 1) % 3])
    for other in others.split(","):
        run(COMMON + LOAD, tmp_path, KERAS_BACKEND=other)


# What each backend offers for several devices. Keras has nothing for them on PyTorch.
if BACKEND == "jax":

    def test_devices_that_share_data_or_heads_train_the_same(tmp_path):
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
        run(COMMON + TRAIN + PARALLEL, tmp_path, **flags)

elif BACKEND == "tensorflow":

    def test_mirrored_devices_train_the_same(tmp_path):
        run(COMMON + TRAIN + MIRRORED, tmp_path)
