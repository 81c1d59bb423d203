"""The few things that Keras' public API does not offer. Nothing else in the layers looks past it."""

import keras
from keras.src.backend import get_keras_mask, set_keras_mask

__all__ = ["concrete", "get_keras_mask", "is_live", "set_keras_mask"]

if keras.config.backend() == "tensorflow":
    import tensorflow as tf

    def concrete(tensor):
        """The tensor itself if it holds values, `None` if it belongs to a function being traced."""
        return tensor if hasattr(tensor, "numpy") else None

    def is_live(tensor):
        """Whether the traced `tensor` can be used here: in its own graph or one nested in it."""
        graph = tf.compat.v1.get_default_graph()
        while graph is not None and graph is not tensor.graph:
            graph = getattr(graph, "outer_graph", None)
        return graph is not None

elif keras.config.backend() == "jax":
    import jax
    from jax._src.core import trace_ctx

    def concrete(tensor):
        """The tensor itself if it holds values, `None` if it belongs to a function being traced."""
        return None if isinstance(tensor, jax.core.Tracer) else tensor

    def is_live(tensor):
        """Whether the traced `tensor` can be used here: while its own trace is the running one."""
        return tensor._trace is trace_ctx.trace

else:

    def concrete(tensor):
        """The tensor, detached, if it holds values; `None` if it only carries a shape."""
        if tensor.device.type == "meta":
            return None
        tensor = tensor.detach()
        return tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor  # NumPy has no bfloat16

    def is_live(tensor):
        """PyTorch has no graph to live in: a tensor without values is of no use to anybody."""
        return False
