"""What differs between backends, and the few things that Keras' public API does not offer."""

import contextlib
import copy
import weakref

import keras
import numpy as np
from keras import ops
from keras.src.backend import get_keras_mask, set_keras_mask
from keras.src.trainers.compile_utils import get_loss

__all__ = [
    "as_numpy",
    "as_tensor",
    "compiled",
    "concrete",
    "get_keras_mask",
    "gradient",
    "hold",
    "is_live",
    "is_usable",
    "on_cpu",
    "outside",
    "predict_step",
    "readable",
    "set_keras_mask",
    "summary_writer",
    "unreduced_loss",
]


def hold(tensor, owner):
    """A weak reference to the traced `tensor`, which its graph holds, so that it cannot leak out of it."""
    return weakref.ref(tensor)


def readable(tensor):
    """The tensor, in a dtype that NumPy knows."""
    return tensor


def is_usable(tensor):
    """Whether the tensor can be used here: it holds values, or belongs to the function being traced here."""
    return concrete(tensor) is not None or is_live(tensor)


def as_numpy(tensor):
    """The values of a tensor, not copied where that can be helped."""
    return np.asarray(tensor)


def predict_step(model, state, data):
    """What `model.predict` does with a batch, on the variables' values in `state` instead of the variables.

    Returns the outputs and the state after them. PyTorch and TensorFlow would write into the variables.
    """
    variables = model.trainable_variables + model.non_trainable_variables
    with keras.StatelessScope(zip(variables, [*state[0], *state[1]], strict=True)) as scope:
        outputs = model.predict_step(data)
    return outputs, (state[0], [scope.get_current_value(variable) for variable in model.non_trainable_variables])


def unreduced_loss(loss, targets, outputs):
    """What `model.compile(loss=loss)` makes of targets and outputs, one of each, before it reduces it to a number."""
    loss = get_loss(loss, targets, outputs)
    return loss.call(ops.cast(targets, loss.dtype), ops.cast(outputs, loss.dtype))


def summary_writer(log_dir):
    """Something with `add_scalar(tag, value, step)` and `flush()` that writes for TensorBoard into a directory."""
    if keras.config.backend() != "tensorflow":
        with contextlib.suppress(ImportError):
            from tensorboard.summary import Writer  # needs none of the backends

            return Writer(log_dir)
    try:
        import tensorflow
    except ImportError:
        raise ImportError(
            "Writing for TensorBoard needs tensorboard or tensorflow: `pip install tensorboard`."
        ) from None
    return _TensorFlowWriter(tensorflow, log_dir)


class _TensorFlowWriter:
    """Writes scalars as `tf.summary.scalar` does, which has to have TensorBoard installed."""

    def __init__(self, tensorflow, log_dir):
        self._summary = tensorflow.summary
        self._writer = tensorflow.summary.create_file_writer(log_dir)
        self._metadata = tensorflow.compat.v1.SummaryMetadata()
        self._metadata.plugin_data.plugin_name = "scalars"

    def add_scalar(self, tag, value, step):
        with self._writer.as_default():
            self._summary.write(tag, np.float32(value), step, self._metadata)

    def flush(self):
        self._writer.flush()


if keras.config.backend() == "tensorflow":
    import tensorflow as tf

    def as_tensor(array):
        """A tensor of the array's memory, which must begin at a multiple of 64 bytes, and not change any more."""
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())

    def outside():
        """Out of all functions that are being traced; where there is none, gradients go on being recorded."""
        return contextlib.nullcontext() if tf.executing_eagerly() else tf.init_scope()

    def on_cpu(tensor):
        """Whether computing with the tensor is up to the CPU."""
        return not (tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU"))

    def concrete(tensor):
        """The tensor itself if it holds values, `None` if it belongs to a function being traced."""
        return tensor if hasattr(tensor, "numpy") else None

    def is_live(tensor):
        """Whether the traced `tensor` can be used here: in its own graph or one nested in it."""
        graph = tf.compat.v1.get_default_graph()
        while graph is not None and graph is not tensor.graph:
            graph = getattr(graph, "outer_graph", None)
        return graph is not None

    def gradient(function, given):
        """The gradient by `given`, tensors in dictionaries or lists, of the first that `function(given)` returns.

        And the second, which is not differentiated.
        """
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(given)
            value, others = function(given)
        return tape.gradient(value, given, unconnected_gradients="zero"), others

    def compiled(step, run_eagerly, jit_compile, once=False):
        """`step(state, data)`, compiled as `model.predict` would be; if it runs but once, where that pays."""
        if run_eagerly or once:
            return step
        function = tf.function(step, reduce_retracing=True, autograph=False, jit_compile=jit_compile or None)
        function._omit_frequent_tracing_warning = True  # each model has its own functions, and TensorFlow sees a loop

        def relaxed(tensor):
            spec = tf.type_spec_from_value(tensor)
            return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype) if isinstance(spec, tf.TensorSpec) else spec

        def call(state, data):
            # One graph for all sizes of batch, as in `predict`. A model may need to know the size: it gets graphs then.
            if function.experimental_get_tracing_count() == 0:
                with contextlib.suppress(Exception):
                    function.get_concrete_function(state, tf.nest.map_structure(relaxed, data))
            return function(state, data)

        return call

elif keras.config.backend() == "jax":
    import jax
    from jax._src.core import trace_ctx

    def as_tensor(array):
        """A tensor of the array's memory, which must begin at a multiple of 64 bytes, and not change any more."""
        return jax.device_put(array)

    outside = jax.ensure_compile_time_eval  # of all functions that are being traced

    def on_cpu(tensor):
        """Whether computing with the tensor is up to the CPU."""
        return jax.default_backend() == "cpu"

    def concrete(tensor):
        """The tensor itself if it holds values, `None` if it belongs to a function being traced."""
        return None if isinstance(tensor, jax.core.Tracer) else tensor

    def is_live(tensor):
        """Whether the traced `tensor` can be used here: in its own trace or one nested in it."""
        trace = trace_ctx.trace
        while trace is not None and trace != tensor._trace:  # one of them may be a weak proxy
            trace = getattr(trace, "parent_trace", None)
        return trace is not None

    def hold(tensor, owner):
        """A weak reference to the traced `tensor`, which lives as long as its trace, or until the owner's next one.

        `jax.jit` keeps alive what it traces; `jax.grad` and `jax.vmap` do not, and are given a copy to keep. It refers
        to its trace weakly: the two would otherwise wait for the garbage collector, with all that they refer to.
        """
        trace = tensor._trace
        if hasattr(trace, "__dict__"):  # all but that of `jax.jit`
            tensor = copy.copy(tensor)
            tensor._trace = weakref.proxy(trace)
            setattr(trace, f"held_for_{owner}", tensor)
        return weakref.ref(tensor)

    def gradient(function, given):
        """The gradient by `given` of the first that `function(given)` returns; and the second."""
        return jax.grad(function, has_aux=True)(given)

    def compiled(step, run_eagerly, jit_compile, once=False):
        """`step(state, data)`, compiled as `model.predict` would be."""
        return step if run_eagerly or not jit_compile else jax.jit(step)

    def predict_step(model, state, data):
        """What `model.predict` does with a batch, on the variables' values in `state`."""
        outputs, non_trainable = model.predict_step(state, data)
        return outputs, (state[0], non_trainable)

else:
    import torch

    def as_tensor(array):
        """A tensor of the array's memory, which must begin at a multiple of 64 bytes, and not change any more."""
        return ops.convert_to_tensor(torch.from_numpy(array))

    outside = torch.no_grad

    def on_cpu(tensor):
        """Whether computing with the tensor is up to the CPU."""
        return tensor.device.type == "cpu"

    def concrete(tensor):
        """The tensor, detached, if it holds values; `None` if it only carries a shape."""
        return None if tensor.device.type == "meta" else tensor.detach()

    def readable(tensor):
        """The tensor, in a dtype that NumPy knows: not bfloat16."""
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor

    def is_live(tensor):
        """PyTorch has no graph to live in: a tensor without values is of no use to anybody."""
        return False

    def is_usable(tensor):
        """Whether the tensor can be used here: it holds values, and is not from within `torch.vmap`."""
        return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)

    def as_numpy(tensor):
        """The values of a tensor, not copied where that can be helped."""
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def gradient(function, given):
        """The gradient by `given` of the first that `function(given)` returns; and the second."""
        with torch.enable_grad():
            given = keras.tree.map_structure(lambda tensor: tensor.detach().requires_grad_(), given)
            value, others = function(given)
            flat = keras.tree.flatten(given)
            if value.requires_grad:
                flat = torch.autograd.grad(value, flat, allow_unused=True, materialize_grads=True)
            else:  # for which PyTorch raises an error, and the other backends return 0
                flat = [torch.zeros_like(tensor) for tensor in flat]
        return keras.tree.pack_sequence_as(given, flat), others

    def compiled(step, run_eagerly, jit_compile, once=False):
        """`step(state, data)`, without gradients. Not compiled: `torch.compile` would change nothing but the time."""
        return torch.no_grad()(step)

    stateless_predict_step = predict_step

    def predict_step(model, state, data):
        """What `model.predict` does with a batch, on the variables' values in `state`."""
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            return stateless_predict_step(model, state, data)
        finally:
            for module, training in modes:
                module.training = training
