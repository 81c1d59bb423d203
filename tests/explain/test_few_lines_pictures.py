"""From a vision transformer to an overlay in a few lines, and the overlay lies on what decides."""

import keras
import numpy as np
from keras import layers, ops
from matplotlib import pyplot as plt

from kerasfactory import explain

OVERLAY = """
from kerasfactory import explain, plot
patches = [f"patch {number}" for number in range(9)]
attribution = explain.attribute(
    model, images, method="attention_gradient",
    query="[CLS]", feature_names=["[CLS]", *patches], special_tokens=["[CLS]"], verbose=0,
)
figure = plot.image(attribution, images, feature_mask=explain.patches(6, 6, 2), samples=len(images))
"""


class ClassToken(layers.Layer):
    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="normal")

    def call(self, tokens):
        return ops.concatenate([ops.repeat(self.token, ops.shape(tokens)[0], axis=0), tokens], axis=1)

    def compute_output_shape(self, shape):
        return (shape[0], shape[1] + 1, shape[2])


def vision_transformer():
    inputs = keras.Input((6, 6, 1))
    tokens = ClassToken()(layers.Reshape((9, 16))(layers.Conv2D(16, 2, strides=2)(inputs)))
    for _ in range(2):
        tokens = tokens + layers.MultiHeadAttention(2, 8)(tokens, tokens)
    model = keras.Model(inputs, layers.Dense(2)(tokens[:, 0]))
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_the_overlay_is_largest_on_the_patch_that_decides():
    plt.switch_backend("agg")
    lines = [line for line in OVERLAY.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 8

    # Planted truth: one bright patch, at any place, and its sign is the label.
    rng = np.random.default_rng(0)
    mask = explain.patches(6, 6, 2)
    where, labels = rng.integers(9, size=500), rng.integers(2, size=500)
    images = 0.3 * rng.normal(size=(500, 6, 6, 1))
    images += ((mask == where[:, None, None]) * (4 * labels - 2)[:, None, None])[..., None]
    keras.utils.set_random_seed(0)
    model = vision_transformer()
    model.fit(images[:400], labels[:400], batch_size=50, epochs=8, verbose=0)
    images, where, labels = images[400:], where[400:], labels[400:]
    assert np.mean(model.predict(images, verbose=0).argmax(axis=1) == labels) > 0.95

    images, where = images[:20], where[:20]
    known = {"model": model, "images": images}
    exec(OVERLAY, known)
    axes = known["figure"].axes[: len(images)]
    overlays = np.array([ax.images[1].get_array() for ax in axes])
    assert overlays.shape == (20, 6, 6)
    largest = mask.ravel()[overlays.reshape(20, -1).argmax(axis=1)]
    assert np.mean(largest == where) > 0.9
    plt.close("all")
