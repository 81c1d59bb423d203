"""TensorFlow."""

import contextlib
import weakref

import numpy as np
import tensorflow as tf

from kerasfactory._backend._shared import (
    Operation,
    after_fork,
    forked,
    read_arithmetic,
    read_einsum,
    read_sum,
    read_transpose,
    stateless_predict_step,
)

PRIVATE_NAMES = {
    "tensorflow.python.eager.context.Context": ("_initialized",),
    "tensorflow.python.eager.context": ("context",),
    "tensorflow.python.eager.polymorphic_function.polymorphic_function.Function": ("_omit_frequent_tracing_warning",),
    "tensorflow.python.framework.func_graph.FuncGraph": ("outer_graph",),
}

_of_running: list[bool] = []  # whether this process was forked from one in which TensorFlow had started


def _note_fork():
    with contextlib.suppress(ImportError, AttributeError):
        from tensorflow.python.eager.context import context

        _of_running.extend([True] * context()._initialized)


after_fork(_note_fork)


def as_numpy(tensor):
    """The values of a tensor, not copied where that can be helped."""
    return np.asarray(tensor)


def as_tensor(array):
    """A tensor of the array's memory, which must begin at a multiple of 64 bytes, and not change any more."""
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def check_process():
    """Raises an error in a process that was forked when TensorFlow had started: it would wait for ever."""
    if _of_running:
        raise RuntimeError(forked("TensorFlow"))


def compiled(step, run_eagerly, jit_compile, runs_once=False):
    """`step(state, data)`, compiled as `model.predict` would be. A step that runs once is not worth compiling."""
    if run_eagerly or runs_once:
        return step
    function = tf.function(step, reduce_retracing=True, autograph=False, jit_compile=jit_compile or None)
    function._omit_frequent_tracing_warning = True  # each model has its own functions, and TensorFlow sees a loop

    def with_any_batch_size(tensor):
        spec = tf.type_spec_from_value(tensor)
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype) if isinstance(spec, tf.TensorSpec) else spec

    def call(state, data):
        # As in `predict`, one graph serves all batch sizes. A model that needs to know the size gets one for each.
        if function.experimental_get_tracing_count() == 0:
            with contextlib.suppress(Exception):
                function.get_concrete_function(state, tf.nest.map_structure(with_any_batch_size, data))
        return function(state, data)

    return call


def concrete(tensor):
    """The tensor itself if it holds values, `None` if it belongs to a function being traced."""
    return tensor if hasattr(tensor, "numpy") else None


def evaluation(model, layers):
    """Pairs of a module and methods that put it into evaluation mode: here, an argument of the call says it all."""
    return ()


def gradient(function, inputs):
    """The gradient of the first result of `function(inputs)` with respect to the inputs, and the second result.

    The inputs are tensors in dictionaries or lists.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(inputs)
        value, others = function(inputs)
    return tape.gradient(value, inputs, unconnected_gradients="zero"), others


def in_scope(tensor):
    """Whether the traced `tensor` can be used here: in its own graph or in one nested in it."""
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph is not tensor.graph:
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


def is_usable(tensor):
    """Whether the tensor can be used here: it holds values, or belongs to the function being traced here."""
    return concrete(tensor) is not None or in_scope(tensor)


def on_cpu(tensor):
    """Whether the CPU computes with the tensor."""
    return not (tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU"))


def operations():
    """TensorFlow's own functions that attention goes through, as a list of `Operation`."""
    return [
        Operation("softmax", tf.nn, "softmax", _read_softmax),
        *(Operation("contraction", place, "matmul", _read_matmul) for place in (tf, tf.linalg)),
        *(Operation("contraction", place, "einsum", read_einsum) for place in (tf, tf.linalg)),
        *read_arithmetic(tf.Tensor),
        *(Operation("product", place, "multiply", _read_product) for place in (tf, tf.math)),
        *(Operation("total", place, "reduce_sum", _read_sum) for place in (tf, tf.math)),
        Operation("moved", tf, "reshape", _read_reshape),
        Operation("moved", tf, "transpose", _read_transpose),
    ]


def _read_product(original, x, y, name=None):
    return x, y


def _read_sum(original, input_tensor, axis=None, *others, **options):
    return read_sum(original, input_tensor, axis, *others, **options)


def _read_reshape(original, tensor, shape, name=None):
    return tensor, None


def _read_transpose(original, a, perm=None, *others, **options):
    return read_transpose(original, a, perm)


def _read_softmax(original, logits, axis=None, name=None):
    return logits, -1 if axis is None else axis


def _read_matmul(original, a, b, transpose_a=False, transpose_b=False, adjoint_a=False, adjoint_b=False, **options):
    left = "YX" if transpose_a or adjoint_a else "XY"
    right = "ZY" if transpose_b or adjoint_b else "YZ"
    options |= {"transpose_a": transpose_a, "transpose_b": transpose_b, "adjoint_a": adjoint_a, "adjoint_b": adjoint_b}
    return f"...{left},...{right}->...XZ", (a, b), lambda *others: original(*others, **options)


def outside_traces():
    """A context outside all functions that are being traced. If there are none, gradients are still recorded."""
    return contextlib.nullcontext() if tf.executing_eagerly() else tf.init_scope()


def padded_size(samples, full):
    """How many samples to run a compiled function with: one graph serves all numbers of them."""
    return samples


def predict_step(model, state, data):
    """What `model.predict` does with a batch, on the values in `state` instead of the variables.

    Returns the outputs and the state after them.
    """
    return stateless_predict_step(model, state, data)


def value_of(variable):
    """The value of a variable that has one."""
    return variable.value


def weak_reference(tensor, owner):
    """A weak reference to the traced `tensor`, which lives as long as its graph. The owner's name is not needed."""
    return weakref.ref(tensor)


def with_numpy_dtype(tensor):
    """The tensor, in a dtype that NumPy knows."""
    return tensor
