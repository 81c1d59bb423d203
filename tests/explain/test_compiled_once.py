"""What a verb compiles is kept with the model: a second call compiles nothing, and finds the same."""

import gc
import weakref

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers

from kerasfactory import _backend, explain
from kerasfactory.layers import FeatureTokenizer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(70, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
VERBS = {
    "gradient": lambda model: explain.attribute(model, X, method="attention_gradient", batch_size=32, verbose=0),
    "integrated": lambda model: explain.attribute(model, X, method="integrated_gradients", batch_size=32, verbose=0),
    "heads": lambda model: explain.head_importance(model, X, Y, batch_size=32, verbose=0)["attention"],
    "controls": lambda model: explain.attention_controls(model, X, Y, steps=2, batch_size=32, verbose=0),
    "faithfulness": lambda model: explain.faithfulness(model, X, np.abs(X), draws=9, batch_size=32, verbose=0),
    "claims": lambda model: explain.feature_claims(model, X, Y, np.abs(X), draws=2, verbose=0),
}


def built():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    tokens = FeatureTokenizer(8)(inputs)
    attended = layers.MultiHeadAttention(2, 4, name="attention")(tokens, tokens)
    model = keras.Model(inputs, layers.Dense(2, "softmax")(layers.Flatten()(attended)))
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def asked_for(monkeypatch):
    """Functions that are compiled from now on."""
    asked, compiled = [], _backend.compiled

    def noted(step, run_eagerly, jit_compile, runs_once=False):
        if not (run_eagerly or runs_once):
            asked.append(step.__qualname__)
        return compiled(step, run_eagerly, jit_compile, runs_once)

    monkeypatch.setattr(_backend, "compiled", noted)
    return asked


@pytest.mark.parametrize("verb", VERBS)
def test_a_second_call_compiles_nothing_and_finds_the_same(monkeypatch, verb):
    model = built()
    first = VERBS[verb](model)
    asked = asked_for(monkeypatch)
    second = VERBS[verb](model)

    assert asked == []
    xr.testing.assert_equal(first, second)


@pytest.mark.parametrize("verb", ["gradient", "integrated", "heads", "controls"])
def test_what_is_kept_knows_other_weights_and_does_not_outlive_its_model(verb):
    model, other = built(), built()
    VERBS[verb](model)
    new = [weight + 0.1 * RNG.normal(size=weight.shape) for weight in model.get_weights()]
    for one in (model, other):
        one.set_weights(new)

    xr.testing.assert_allclose(VERBS[verb](model), VERBS[verb](other), rtol=1e-4, atol=1e-6)
    reference = weakref.ref(model)
    del model, one
    gc.collect()
    assert reference() is None


def test_other_layers_losses_and_targets_are_not_taken_for_those_before():
    model = built()
    ours, keras_own = (
        explain.head_importance(model, X, Y, loss=loss, verbose=0)["attention"].attrs["loss_value"]
        for loss in (lambda y, outputs: 2 * keras.ops.ones_like(y[:, 0], "float32"), None)
    )
    targets = [explain.attribute(model, X, method="attention_gradient", target=t, verbose=0) for t in (0, 1)]

    assert ours == 2
    assert keras_own != 2
    assert not np.allclose(*targets)


def test_a_loss_without_a_hash_is_taken():
    class Loss:
        __hash__ = None
        __name__ = "ones"

        def __call__(self, y, outputs):
            return outputs[:, 0]

    importance = explain.head_importance(built(), X, Y, loss=Loss(), verbose=0)["attention"]

    assert np.isfinite(importance["gradient"]).all()


def test_a_failure_does_not_make_later_calls_eager(monkeypatch):
    model = built()
    with pytest.raises(ZeroDivisionError):
        explain.head_importance(model, X, Y, loss=lambda y, outputs: 1 / 0, verbose=0)
    asked = asked_for(monkeypatch)
    explain.head_importance(model, X, Y, batch_size=32, verbose=0)

    assert asked
