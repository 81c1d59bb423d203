"""JAX."""

import contextlib
import copy
import weakref

import jax
import numpy as np

from kerasfactory._backend._shared import (
    Operation,
    after_fork,
    forked,
    missing,
    read_arithmetic,
    read_einsum,
    read_matmul,
    read_reshape,
    read_sum,
    read_swap,
    read_transpose,
    read_two,
)

PRIVATE_NAMES = {
    "jax._src.xla_bridge": ("backends_are_initialized",),
    "jax._src.core": ("trace_ctx",),
    "jax._src.interpreters.ad.JVPTrace": ("parent_trace",),
    "jax._src.interpreters.batching.BatchTrace": ("parent_trace",),
    "jax.core.Tracer": ("_trace",),
}

# Keras hands the buffers of the weights to its compiled step, which deletes them, and puts new ones into the model at
# the end of an epoch.
_IN_USE = (
    "The model is in use by `fit`, `evaluate` or `predict`, in another thread or around this call. On JAX, these hold "
    "the model's weights until they end, so neither `model(x)` nor `explain` can read them. Wait until they end, or "
    "copy the model before. To see attention while a model trains, give `explain.AttentionMonitor` to `fit`; a "
    "callback of your own finds the weights in `self.model`."
)

# The options of `jax.nn.dot_product_attention` with which its scores can be computed again.
_READ = ("scale", "is_causal", "implementation")

_of_running: list[bool] = []  # whether this process was forked from one in which JAX had started


def _note_fork():
    with contextlib.suppress(ImportError):
        from jax._src.xla_bridge import backends_are_initialized

        _of_running.extend([True] * backends_are_initialized())


after_fork(_note_fork)


def as_numpy(tensor):
    """The values of a tensor, not copied where that can be helped."""
    if _is_deleted(tensor):
        raise RuntimeError(_IN_USE)
    return np.asarray(tensor)


def as_tensor(array):
    """A tensor of the array's memory, which must begin at a multiple of 64 bytes, and not change any more."""
    return jax.device_put(array)


def check_process():
    """Raises an error in a process that was forked when JAX had started: it would wait for ever."""
    if _of_running:
        raise RuntimeError(forked("JAX"))


def compiled(step, run_eagerly, jit_compile, runs_once=False):
    """`step(state, data)`, compiled as `model.predict` would be, also if it runs once."""
    run = step if run_eagerly or not jit_compile else jax.jit(step)

    def call(state, data):
        try:
            return run(state, data)
        except (RuntimeError, ValueError):
            if any(map(_is_deleted, jax.tree.leaves(state))):
                raise RuntimeError(_IN_USE) from None
            raise

    return call


def concrete(tensor):
    """The tensor itself if it holds values, `None` if it belongs to a function being traced."""
    return None if isinstance(tensor, jax.core.Tracer) else tensor


def evaluation(model, layers):
    """Pairs of a module and methods that put it into evaluation mode: here, an argument of the call says it all."""
    return ()


def gradient(function, inputs):
    """The gradient of the first result of `function(inputs)` with respect to the inputs, and the second result.

    The inputs are tensors in dictionaries or lists.
    """
    return jax.grad(function, has_aux=True)(inputs)


def in_scope(tensor):
    """Whether the traced `tensor` can be used here: in its own trace or in one nested in it."""
    try:
        from jax._src.core import trace_ctx
    except ImportError:
        raise missing("jax._src.core.trace_ctx", "Reading what a layer kept of a traced call") from None
    trace = trace_ctx.trace
    while trace is not None and trace != tensor._trace:  # one of them may be a weak proxy
        trace = getattr(trace, "parent_trace", None)
    return trace is not None


def is_usable(tensor):
    """Whether the tensor can be used here: it holds values, or belongs to the function being traced here."""
    return concrete(tensor) is not None or in_scope(tensor)


def _is_deleted(tensor):
    return isinstance(tensor, jax.Array) and not isinstance(tensor, jax.core.Tracer) and tensor.is_deleted()


def on_cpu(tensor):
    """Whether the CPU computes with the tensor."""
    return jax.default_backend() == "cpu"


def operations():
    """JAX's own functions that attention goes through, as a list of `Operation`."""
    tensors = (type(jax.numpy.zeros(())), jax.core.Tracer)  # of values, and of what is being traced
    return [
        Operation("softmax", jax.nn, "softmax", lambda original, x, axis=-1, **options: (x, axis)),
        Operation("attention", jax.nn, "dot_product_attention", _read_attention),
        Operation("contraction", jax.numpy, "einsum", read_einsum),
        Operation("contraction", jax.numpy, "matmul", _read_matmul),
        *(operator for kind in tensors for operator in read_arithmetic(kind)),
        Operation("product", jax.numpy, "multiply", read_two),
        *(Operation("total", place, "sum", _read_sum) for place in (jax.numpy, *tensors)),
        *(Operation("moved", place, "reshape", read_reshape) for place in (jax.numpy, *tensors)),
        *(Operation("moved", place, "swapaxes", read_swap) for place in (jax.numpy, *tensors)),
        Operation("moved", jax.numpy, "transpose", read_transpose),
    ]


def _read_matmul(original, a, b, **options):
    return read_matmul(original, a, b, **options)


def _read_sum(original, a, axis=None, *others, **options):
    return read_sum(original, a, axis, *others, **options)


def _read_attention(original, query, key, value, bias=None, mask=None, **options):
    unread = [name for name, option in options.items() if name not in _READ and not (option is None or option is False)]
    if unread or jax.numpy.ndim(query) != 4:
        what = f"`{unread[0]}`" if unread else "a query that has not 4 axes"
        return (f"it calls `jax.nn.dot_product_attention` with {what}",)

    def as_keras(query, key, value, bias=None, mask=None, scale=None, is_causal=False, flash_attention=None):
        given = {"scale": scale, "is_causal": is_causal, "implementation": options.get("implementation")}
        return original(query, key, value, bias, mask, **given)

    given = {"query": query, "key": key, "value": value, "bias": bias, "mask": mask}
    given |= {name: options[name] for name in ("scale", "is_causal") if name in options}
    return as_keras, given, lambda output: output, lambda output: output


def outside_traces():
    """A context outside all functions that are being traced."""
    return jax.ensure_compile_time_eval()


def padded_size(samples, full):
    """How many samples to run a compiled function with, which is compiled for each number of them.

    As many as are in a full batch, if there has been one, and otherwise at most a quarter more than there are.
    """
    step = 2 ** max(0, samples.bit_length() - 3)
    return max(samples, full or -(-samples // step) * step)


def predict_step(model, state, data):
    """What `model.predict` does with a batch, on the values in `state` instead of the variables.

    Returns the outputs and the state after them.
    """
    outputs, non_trainable = model.predict_step(state, data)
    return outputs, (state[0], non_trainable)


def value_of(variable):
    """The value of a variable that has one, or an error if a training has it."""
    try:
        value = variable.value
    except TypeError:  # Keras took it out, and finds nothing to initialize it with
        raise RuntimeError(_IN_USE) from None
    if _is_deleted(value):
        raise RuntimeError(_IN_USE)
    return value


def weak_reference(tensor, owner):
    """A weak reference to the traced `tensor`, which lives as long as its trace, or until the owner's next one.

    `jax.jit` keeps alive what is used in it. `jax.grad` and `jax.vmap` do not, so they are given a copy to keep. The
    copy refers to its trace weakly. Otherwise the two would wait for the garbage collector, with all they refer to.
    """
    trace = tensor._trace
    if hasattr(trace, "__dict__"):  # all but that of `jax.jit`
        tensor = copy.copy(tensor)
        tensor._trace = weakref.proxy(trace)
        setattr(trace, f"held_for_{owner}", tensor)
    else:
        jax.numpy.copy(tensor)  # uses the tensor; the compiler leaves it out
    return weakref.ref(tensor)


def with_numpy_dtype(tensor):
    """The tensor, in a dtype that NumPy knows."""
    return tensor
