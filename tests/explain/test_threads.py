"""What another thread does with a model while it is observed, and a process that was forked: nothing is disturbed."""

import concurrent.futures
import contextlib
import gc
import inspect
import os
import signal
import sys
import threading
import time
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from kerasfactory import explain
from kerasfactory.layers import InterpretableMultiHeadAttention

BACKEND = keras.config.backend()
SEQUENCE = np.random.default_rng(0).normal(size=(6, 6, 8)).astype("float32")
OTHER = np.random.default_rng(1).normal(size=(2, 6, 8)).astype("float32")
TARGET = SEQUENCE.sum((1, 2))[:, None]
KEY_WINDOW = (
    {"sliding_window": 2} if "sliding_window" in inspect.signature(layers.MultiHeadAttention).parameters else {}
)

# What another thread does in the middle of a forward pass, by the thread that runs the pass: it is waited for.
MEANWHILE = {}


@contextlib.contextmanager
def meanwhile(task, times=1):
    """Has another thread do the task in the middle of the next passes of this one. Yields the list of its results."""
    results, here = [], threading.get_ident()

    def run():
        del MEANWHILE[here]  # the task itself passes, too
        try:
            results.append(pool.submit(task).result())
        finally:
            if len(results) < times:
                MEANWHILE[here] = run

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        MEANWHILE[here] = run
        try:
            yield results
        finally:
            MEANWHILE.pop(here, None)
    assert results, "no pass came by"


@keras.saving.register_keras_serializable()
class Gate(layers.Softmax):
    """Where other threads get their turn: in the middle of attention."""

    def call(self, inputs, mask=None):
        MEANWHILE.get(threading.get_ident(), lambda: None)()
        return super().call(inputs, mask=mask)


@keras.saving.register_keras_serializable()
class Remembering(layers.Layer):
    """Keeps what it last saw in an attribute, as many do, and adds to the loss."""

    def call(self, inputs):
        MEANWHILE.get(threading.get_ident(), lambda: None)()
        self.seen = inputs
        self.add_loss(ops.mean(inputs**2))
        return inputs


def gated_model(kind="ours", run_eagerly=False):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 8))
    x = layers.Dense(8, kernel_regularizer="l2", activity_regularizer="l1")(inputs)
    x = Remembering(name="remembering")(x)
    if kind == "ours":
        attention = InterpretableMultiHeadAttention(8, 2, dropout_rate=0.0, name="attention")
        attended, inner = attention(x), attention.mha
    elif kind == "grouped":
        inner = layers.GroupQueryAttention(4, 2, 1, name="attention", **KEY_WINDOW)
        attended = inner(x, x)
    else:
        inner = layers.MultiHeadAttention(2, 4, name="attention", **KEY_WINDOW)
        attended = inner(x, x)
    inner._softmax.__class__ = Gate
    model = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(attended)))
    model.compile("sgd", "mse", run_eagerly=run_eagerly)
    return model


def weights(model):
    return [np.array(value) for value in model.get_weights()]


def assert_equal(actual, expected, atol=1e-5):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(one), ops.convert_to_numpy(other), atol=atol)


def fit(model):
    model.fit(SEQUENCE, TARGET, batch_size=3, epochs=1, shuffle=False, verbose=0)
    return weights(model)


def in_use():
    """On JAX the weights are with the training: it is told that they are. Elsewhere all goes on."""
    if BACKEND == "jax":
        return pytest.raises(RuntimeError, match="The model is in use by `fit`")
    return contextlib.nullcontext()


ACTIONS = {
    "capture": lambda model: explain.capture(model, SEQUENCE, verbose=0),
    "summarize": lambda model: explain.summarize(model, SEQUENCE, verbose=0),
    "attribute": lambda model: explain.attribute(model, SEQUENCE, verbose=0),
    "integrated gradients": lambda model: explain.attribute(
        model, SEQUENCE, method="integrated_gradients", target=0, verbose=0
    ),
    "head_importance": lambda model: explain.head_importance(model, SEQUENCE, TARGET, verbose=0),
    "parameter_randomization": lambda model: explain.parameter_randomization(model, SEQUENCE, draws=2, verbose=0),
    "faithfulness": lambda model: explain.faithfulness(
        model, SEQUENCE, np.ones((6, 6)), background=OTHER, target=0, verbose=0
    ),
}


@pytest.mark.filterwarnings("ignore:The model's outputs for the first batch differ", "ignore:The gradients could not")
@pytest.mark.parametrize("action", ["capture", "head_importance"])
def test_a_first_fit_in_the_middle_of_a_first_pass_ends_with_its_own_weights(action):
    alone, model = gated_model(), gated_model()
    expected = fit(alone)
    with in_use(), meanwhile(lambda: fit(model)) as trained:
        ACTIONS[action](model)
    assert_equal(trained[0], expected)
    assert_equal(weights(model), expected)
    assert model.train_function is not None
    assert_equal(fit(model), fit(alone))
    assert_equal(*(values(explain.capture(one, SEQUENCE, verbose=0)) for one in (model, alone)))


def call(model, x):
    """What a thread knows of its own call: outputs, losses, scores, and what a layer keeps in an attribute."""
    outputs = model(ops.convert_to_tensor(x))
    layer = model.get_layer("attention")
    scores = [layer.attention_scores] if isinstance(layer, InterpretableMultiHeadAttention) else []
    return [
        ops.convert_to_numpy(value) for value in [outputs, *model.losses, *scores, model.get_layer("remembering").seen]
    ]


def values(result):
    """All numbers in an array or a data set, or a dictionary of them."""
    parts = [result] if hasattr(result, "dims") else list(result.values())
    arrays = [array for part in parts for array in (part.data_vars.values() if hasattr(part, "data_vars") else [part])]
    return [array.values.astype("float64") for array in arrays if array.dtype.kind in "fiub"]


@pytest.mark.filterwarnings("ignore:The gradients could not")
@pytest.mark.parametrize(
    ("kind", "action"),
    [
        *(("ours", action) for action in ACTIONS),
        ("keras", "summarize"),
        ("grouped", "capture"),
        ("grouped", "summarize"),
    ],
)
def test_another_threads_call_in_the_middle_of_a_pass_is_its_own(kind, action):
    expected = call(gated_model(kind), OTHER)
    result = ACTIONS[action](gated_model(kind))
    model = gated_model(kind)
    with meanwhile(lambda: call(model, OTHER), times=12) as calls:
        again = ACTIONS[action](model)
    for found in calls:
        assert_equal(found, expected)
    assert_equal(values(again), values(result))


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_what_another_thread_called_is_still_there_after_a_pass(run_eagerly):
    model = gated_model(run_eagerly=run_eagerly)
    attention, remembering = model.get_layer("attention"), model.get_layer("remembering")
    call(model, SEQUENCE)

    def call_and_leave():
        """The call's own values are read when the pass is over."""
        return ops.convert_to_numpy(model(ops.convert_to_tensor(OTHER)))

    reference = gated_model()
    outputs, *losses, scores, seen = call(reference, OTHER)
    with meanwhile(call_and_leave) as called:
        explain.capture(model, SEQUENCE, verbose=0)
    assert_equal(called, [outputs])
    assert_equal(model.losses, losses)
    assert_equal([attention.attention_scores, remembering.seen], [scores, seen])


def test_reading_scores_does_not_bring_back_those_of_an_earlier_call():
    keras.utils.set_random_seed(0)
    layer = InterpretableMultiHeadAttention(8, 2)
    layer(SEQUENCE[:2])
    layer(OTHER)
    expected = ops.convert_to_numpy(layer.attention_scores)
    layer.mha._softmax.__class__ = Gate
    layer(SEQUENCE[:2])
    with meanwhile(lambda: layer(OTHER)):
        assert np.abs(ops.convert_to_numpy(layer.attention_scores) - expected).max() > 1e-3
    assert_equal([layer.attention_scores], [expected])


def test_many_reads_beside_captures():
    model = gated_model(run_eagerly=True)
    attention = model.get_layer("attention")
    tokens = [ops.convert_to_tensor(OTHER * scale) for scale in (0.5, 1, 2)]
    expected = []
    for x in tokens:
        attention(x)
        expected.append(ops.convert_to_numpy(attention.attention_scores))
    done = threading.Event()

    def read():
        wrong = 0
        try:
            for number in range(300):
                attention(tokens[number % 3])
                scores = ops.convert_to_numpy(attention.attention_scores)
                wrong += not np.allclose(scores, expected[number % 3], atol=1e-6)
            return wrong
        finally:
            done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            reads = pool.submit(read)
            while not done.is_set():
                explain.capture(model, SEQUENCE, verbose=0)
        assert reads.result() == 0
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.filterwarnings("ignore:The model's outputs for the first batch differ")
def test_fit_beside_captures_from_the_first_moment():
    expected = gated_model()
    for _ in range(3):
        fit(expected)
    model = gated_model()
    done, errors = threading.Event(), []

    def capture():
        while not done.is_set():
            try:
                explain.capture(model, SEQUENCE, verbose=0)
            except RuntimeError as error:
                errors.append(error)
            time.sleep(0.005)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        captures = pool.submit(capture)
        try:
            for _ in range(3):
                fit(model)
        finally:
            done.set()
        captures.result()
    assert_equal(weights(model), weights(expected))
    assert BACKEND == "jax" or not errors
    assert all("The model is in use" in str(error) for error in errors)


def test_two_captures_and_two_models_at_once():
    models = [gated_model(), gated_model("grouped")]
    expected = [explain.capture(model, SEQUENCE, verbose=0)["attention"].values for model in models]
    fresh = [gated_model(), gated_model("grouped")]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        scores = [
            pool.submit(explain.capture, fresh[number % 2], SEQUENCE, batch_size=2, verbose=0) for number in range(4)
        ]
        assert_equal([future.result()["attention"].values for future in scores], [*expected, *expected])


@pytest.mark.skipif(BACKEND != "torch", reason="Only PyTorch's modules have a mode.")
def test_another_thread_trains_modules_of_pytorch_in_the_middle_of_a_pass():
    import torch

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.Sequential(torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5))
            self.attention = layers.MultiHeadAttention(2, 4, name="attention")

        def call(self, inputs, training=None):
            x = self.norm(inputs)
            return self.norm(self.attention(x, x))

    model = Model()
    model(SEQUENCE)
    model.attention._softmax.__class__ = Gate
    norm, dropout = model.norm.module
    model.eval()
    before = model.predict(SEQUENCE, verbose=0)

    def train():
        torch.manual_seed(0)
        model.train()
        return (dropout(torch.ones(1000)) == 0).sum().item()

    captured = explain.capture(model, SEQUENCE, verbose=0)["attention"]
    mean = norm.running_mean.clone()
    with meanwhile(train) as dropped:
        again = explain.capture(model, SEQUENCE, verbose=0)["attention"]
    assert 400 < dropped[0] < 600
    assert_equal([again.values], [captured.values])
    assert again.attrs["prediction_difference"] < 1e-6
    assert all(module.training for module in (model, norm, dropout))  # as the other thread set them
    assert torch.equal(norm.running_mean, mean)
    model.eval()
    assert_equal([model.predict(SEQUENCE, verbose=0)], [before])


def in_forked_child(task):
    """The exit status of a child that does the task, or `None` if it waits for ever; and what it wrote."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX and Python tell that there are threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, task().encode())
            status = 0
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(status)
    os.close(writing)
    for _ in range(300):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            with os.fdopen(reading) as told:
                return os.waitstatus_to_exitcode(status), told.read()
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, ""


@pytest.mark.skipif(sys.platform != "linux", reason="Elsewhere processes are not forked.")
def test_a_forked_child_captures_or_says_why_not():
    x = np.random.default_rng(0).normal(size=(64, 60, 64)).astype("float32")
    inputs = keras.Input((60, 64))
    attended = layers.MultiHeadAttention(4, 64, name="attention")(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(attended)))
    threads = None
    if BACKEND == "torch":
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(2)
    try:
        expected = float(explain.capture(model, x, verbose=0)["attention"].values.max())
        status, told = in_forked_child(
            lambda: str(float(explain.capture(model, x, verbose=0)["attention"].values.max()))
        )
        if BACKEND == "torch":
            assert status == 0
            assert float(told) == pytest.approx(expected, abs=1e-5)
        else:
            assert status == 1
            assert told.startswith("RuntimeError: This process was forked after")
    finally:
        if threads:
            torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="Reads the memory in use from /proc.")
def test_memory_stays_after_many_captures_and_calls():
    model = gated_model(run_eagerly=BACKEND == "torch")
    attention = model.get_layer("attention")
    x = ops.convert_to_tensor(SEQUENCE)

    def megabytes():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def work(captures, calls):
        for _ in range(captures):
            explain.capture(model, SEQUENCE, verbose=0)
        for _ in range(calls):
            attention(x)
            attention.attention_scores  # noqa: B018

    work(50, 200)
    before = megabytes()
    work(100, 400)
    assert megabytes() - before < 4  # 20 MB for 500 captures and 2,000 calls
