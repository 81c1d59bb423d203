"""What a model's outputs mean, and which of them is meant: decided in one place, and never guessed from values."""

import functools
import re

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

from kerasfactory import explain
from kerasfactory.explain._engine.outputs import outputs_of, predictions

RNG = np.random.default_rng(3)
X = RNG.normal(size=(40, 4)).astype("float32")
SEQUENCE = RNG.normal(size=(30, 5, 8)).astype("float32")


def dense(outputs=1, activation=None, loss=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(outputs, activation=activation)])
    if loss is not None:
        model.compile(loss=loss)
    return model


def meaning(model, task=None, target=None):
    found = outputs_of(model, X, task=task, target=target)
    return found.task, found.source, found.probabilities


def of_ones_own(y, outputs):
    return ops.mean(ops.square(y - outputs), axis=-1)


def mean_squared_error(y, outputs):
    """Has the name of one of Keras', and is another."""
    return ops.mean(outputs, axis=-1)


CLASSES, LABELS, NUMBERS = ("classification", "loss", True), ("multilabel", "loss", True), ("regression", "loss", False)
LOGITS = ("classification", "loss", False)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("loss", "outputs", "expected"),
    [
        ("sparse_categorical_crossentropy", 3, CLASSES),
        (losses.CategoricalCrossentropy(), 3, CLASSES),
        (losses.CategoricalCrossentropy(from_logits=True), 3, LOGITS),
        (functools.partial(losses.sparse_categorical_crossentropy, from_logits=True), 3, LOGITS),
        (losses.categorical_crossentropy, 3, CLASSES),
        ("crossentropy", 3, CLASSES),
        ("KLD", 3, CLASSES),
        ("categorical_hinge", 3, LOGITS),
        ("binary_crossentropy", 1, CLASSES),
        ("bce", 3, LABELS),
        (losses.BinaryFocalCrossentropy(from_logits=True), 3, ("multilabel", "loss", False)),
        ("mse", 3, NUMBERS),
        ("MeanAbsoluteError", 1, NUMBERS),
        (losses.Huber(), 1, NUMBERS),
        (["mse"], 1, NUMBERS),
        ([losses.LogCosh()], 2, NUMBERS),
        (of_ones_own, 3, (None, "unknown", False)),
        (mean_squared_error, 3, (None, "unknown", False)),
        (losses.Dice(), 3, (None, "unknown", False)),
        (None, 3, (None, "unknown", False)),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),  # every process gives a test the same name
)
def test_the_compiled_loss_says_what_outputs_mean(loss, outputs, expected):
    activation = ("softmax" if outputs > 1 else "sigmoid") if expected[2] else None
    assert meaning(dense(outputs, activation, loss)) == expected


@pytest.mark.backend_independent
def test_a_task_that_is_given_comes_first():
    assert meaning(dense(2, "softmax", "mse"), "classification") == ("classification", "task", True)
    assert meaning(dense(2, None, "bce"), "regression") == ("regression", "task", False)
    assert meaning(dense(2, "softmax"))[0] is None  # what sums to 1 may be shares
    with pytest.raises(ValueError, match="`task` must be one of 'classification', 'multilabel', 'regression', or None"):
        meaning(dense(), "classify")


class Subclassed(keras.Model):
    def __init__(self, activation):
        super().__init__()
        self.dense = layers.Dense(3, activation=activation)

    def call(self, x):
        return self.dense(x)


@pytest.mark.backend_independent
def test_the_layer_that_outputs_come_from_says_whether_they_are_probabilities():
    inputs = keras.Input((4,))
    hidden = layers.Dense(3)(inputs)
    for outputs, expected in [
        (layers.Softmax()(hidden), True),
        (layers.Activation("sigmoid")(hidden), True),
        (ops.softmax(hidden), True),
        (dense(3, "softmax")(inputs), True),
        (layers.Dense(3, activation="tanh")(inputs), False),
        (hidden, False),
    ]:
        for structure in (outputs, [outputs], {"one": outputs}):
            model = keras.Model(inputs, structure)
            assert meaning(model, "multilabel") == ("multilabel", "task", expected)
    # What a subclass does is not known. Rows that sum to 1 are probabilities then, if they are said to be of classes.
    for activation, expected in (("softmax", True), (None, False)):
        assert meaning(Subclassed(activation), "classification") == ("classification", "task", expected)


def two_outputs(form, loss=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    first = layers.Dense(3, activation="softmax", name="kind")(inputs)
    second = layers.Dense(2, name="size")(inputs)
    model = keras.Model(inputs, {"kind": first, "size": second} if form == "dict" else [first, second])
    if loss is not None:
        model.compile(loss=loss)
    return model


@pytest.mark.backend_independent
@pytest.mark.parametrize("form", ["dict", "list"])
def test_each_of_several_outputs_has_its_own_meaning(form):
    of_each = ["sparse_categorical_crossentropy", "mse"]
    for loss in (dict(zip(["kind", "size"], of_each, strict=True)), *([of_each] if form == "list" else [])):
        model = two_outputs(form, loss)
        first, second = ("kind", "size") if form == "dict" else (0, 1)
        assert meaning(model, target=first) == CLASSES
        assert meaning(model, target=(second, 1)) == NUMBERS
        if form == "list":
            assert meaning(model, target="size") == NUMBERS
        expected = model.predict(X, verbose=0)[second]
        np.testing.assert_allclose(predictions(model, X, target=second), expected, rtol=1e-5)
        found = outputs_of(model, X, task=None, target=(second, 1))
        assert found.part.column == 1
        np.testing.assert_allclose(found.values, expected, rtol=1e-5)


@pytest.mark.backend_independent
def test_outputs_of_more_axes_are_chosen_by_a_tuple():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Reshape((3, 2))(layers.Dense(6)(inputs)))
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(predictions(model, X), expected.reshape(40, 6), rtol=1e-5)
    np.testing.assert_allclose(predictions(model, X, target=1), expected[:, 1], rtol=1e-5)
    found = outputs_of(model, X, task="regression", target=(2, 1))
    np.testing.assert_allclose(found.values[:, found.part.column], expected[:, 2, 1], rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"for each of several positions.*\(sample, 3, 2\).*`target=0`.*`target=\(0, 1\)`"
    ):
        outputs_of(model, X, task="classification", target=None)
    for target in ((3, 0), (0, 2), (0, 0, 0), ("a", 0), (True, 0)):
        with pytest.raises(ValueError, match=r"a tuple of numbers, one for each axis.*at most \(2, 1\)\. Received"):
            predictions(model, X, target=target)


@pytest.mark.backend_independent
@pytest.mark.parametrize("form", ["dict", "list"])
def test_the_advice_of_errors_works_on_the_model_that_they_are_about(form):
    model = two_outputs(form)
    with pytest.raises(ValueError, match="The model has 2 outputs") as error:
        predictions(model, X)
    advice = re.findall(r"`(?:target=)?([^`]+)`", str(error.value))
    assert len(advice) == 3
    values = [model.predict(X, verbose=0)[key] for key in (("kind", "size") if form == "dict" else (0, 1))]
    for target in (eval(text) for text in advice[:2]):
        np.testing.assert_allclose(predictions(model, X, target=target), values[0], rtol=1e-5)
    one = eval(advice[2], {"keras": keras, "model": model})
    np.testing.assert_allclose(predictions(one, X), values[0], rtol=1e-5)
    for target in ("kinds", 2, (3, 0), True):
        with pytest.raises(ValueError, match="Say which one is meant"):
            predictions(model, X, target=target)
    for target in (5, -1, "no"):
        key = "kind" if form == "dict" else 0
        with pytest.raises(ValueError, match=f"must be {key!r}, or \\({key!r}, number\\) with a number from 0 to 2"):
            predictions(model, X, target=(key, target))


def attentive(form, outputs=2, loss="mse"):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    attended = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    output = layers.Dense(outputs, name="size")(layers.GlobalAveragePooling1D()(attended))
    model = keras.Model(inputs, {"tensor": output, "list": [output], "dict": {"size": output}}[form])
    model.compile(loss=loss)
    return model


@pytest.mark.parametrize("form", ["list", "dict"])
def test_a_dictionary_or_list_of_one_output_is_that_output(form):
    y = RNG.normal(size=(30, 2))
    plain = attentive("tensor")
    attribution = explain.attribute(plain, SEQUENCE, verbose=0)
    expected = explain.head_importance(plain, SEQUENCE, y, verbose=0)["attention"]
    for loss in ("mse", ["mse"], {"size": "mse"}):
        model = attentive(form, loss=loss)
        for given in (None, "mse", {"size": losses.MeanSquaredError()}):
            found = explain.head_importance(model, SEQUENCE, y, loss=given, verbose=0)["attention"]
            for name in ("gradient", "ablation"):
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-6)
    settings = {"draws": 3, "verbose": 0}
    one, other = (explain.faithfulness(each, SEQUENCE, attribution, **settings) for each in (plain, model))
    np.testing.assert_allclose(one["comprehensiveness"], other["comprehensiveness"], rtol=1e-4, atol=1e-6)
    one, other = (explain.attention_controls(each, SEQUENCE, y, steps=1, **settings) for each in (plain, model))
    np.testing.assert_allclose(one["change"][:2], other["change"][:2], rtol=1e-3, atol=1e-5)
    assert one["loss_increase"].item() == pytest.approx(other["loss_increase"].item(), rel=1e-3)
    for number, target in ((0, 0), (1, ("size", 1) if form == "dict" else (1,))):
        one, other = (
            explain.attribute(each, SEQUENCE, method="attention_gradient", target=asked, verbose=0)
            for each, asked in ((plain, number), (model, target))
        )
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.backend_independent
def test_several_numbers_have_no_predicted_class():
    """Two targets of a regression: which of them has the larger constant decides nothing."""
    results = []
    for offset in ([0, 10], [10, 0]):
        model = dense(2, loss="mse")
        kernel = np.zeros((4, 2))
        kernel[0, 0], kernel[1, 1] = 1, 3
        model.set_weights([kernel, np.array(offset)])
        attribution = np.tile([0.0, 1, 0, 0], (40, 1))
        results.append(
            explain.faithfulness(model, X, attribution, removal="mask", fractions=[0.25], draws=9, verbose=0)
        )
        assert results[-1].attrs["target"] == "all outputs"
        assert results[-1].attrs["change"] == "absolute, relative to the standard deviation"
    expected = np.abs(X[:, 1]) / X[:, 1].std() / 2  # the mean over two outputs, of which one does not change
    for result in results:
        np.testing.assert_allclose(result["comprehensiveness"][:, 0], expected, rtol=1e-4, atol=1e-5)
    assert results[0]["p_value"] == results[1]["p_value"]


@pytest.mark.backend_independent
def test_a_target_is_checked_where_no_gradient_is_taken():
    model = attentive("dict")
    for method in ("attention", "rollout", "uniform"):
        with pytest.raises(ValueError, match=r"from 0 to 1: the model has 2\. Received: target=2"):
            explain.attribute(model, SEQUENCE, method=method, target=2, verbose=0)
    expected = explain.attribute(model, SEQUENCE, verbose=0)
    batches = (SEQUENCE[start : start + 10] for start in (0, 10, 20))  # none of them is lost
    np.testing.assert_allclose(explain.attribute(model, batches, target=1, verbose=0), expected, atol=1e-6)
