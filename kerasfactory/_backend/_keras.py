"""The private functions of Keras that the package uses. One that Keras has not, says so when it is called."""

import importlib
import inspect
from collections.abc import Callable

import keras

from kerasfactory._backend._shared import (
    Operation,
    missing,
    read_einsum,
    read_matmul,
    read_reshape,
    read_sum,
    read_swap,
    read_transpose,
    read_two,
)

# From the module or class that owns private names to those that its user relies on. `tests/test_private_names.py`
# looks for all of them in the installed libraries.
PRIVATE_NAMES = {
    "keras.src.backend.common.masking": ("get_keras_mask", "set_keras_mask"),
    "keras.src.trainers.compile_utils": ("get_loss",),
    "keras.src.backend.common.global_state": ("get_global_attribute",),
    "keras.src.backend.nn": ("softmax", "log_softmax", "sparsemax", "dot_product_attention"),
    "keras.src.backend.math": ("logsumexp", "top_k"),
    "keras.src.backend.numpy": (
        *("einsum", "matmul", "multiply", "add", "maximum", "divide", "true_divide", "sum", "mean"),
        *("reshape", "transpose", "swapaxes", "moveaxis", "repeat", "tile", "broadcast_to", "split", "log"),
    ),
    "keras.src.backend.core": ("unstack",),
}


def _private(module, name, purpose):
    def unavailable(*args, **kwargs):
        raise missing(f"{module}.{name}", purpose)

    try:
        return getattr(importlib.import_module(module), name, unavailable)
    except ImportError:
        return unavailable


# Not from `keras.src.backend`, which does not offer the first two on all branches of Keras.
get_keras_mask = _private("keras.src.backend.common.masking", "get_keras_mask", "Reading the mask of a tensor")
set_keras_mask = _private("keras.src.backend.common.masking", "set_keras_mask", "Setting the mask of a tensor")
_global_attribute = _private(
    "keras.src.backend.common.global_state", "get_global_attribute", "Finding out which layer is being called"
)
get_loss = _private("keras.src.trainers.compile_utils", "get_loss", "Computing the loss of each sample")


def layers_being_called():
    """The layers in whose `call` this thread is, the outermost first."""
    # Keras opens a scope for each call, for the names of what is made in it.
    callers = [getattr(scope, "caller", None) for scope in _global_attribute("name_scope_stack") or ()]
    return [caller for caller in callers if isinstance(caller, keras.layers.Layer)]


def operations_of_keras():
    """Keras' own functions that attention goes through, as a list of `Operation`."""
    modules = importlib.import_module("keras.src.backend").__dict__
    functions: list[tuple[str, str, Callable]] = [
        *(("softmax", f"nn.{name}", _read_softmax) for name in ("softmax", "log_softmax", "sparsemax")),
        ("softmax", "math.logsumexp", lambda original, x, axis=None, keepdims=False: (x, axis)),
        ("attention", "nn.dot_product_attention", _read_attention),
        ("contraction", "numpy.einsum", read_einsum),
        ("contraction", "numpy.matmul", read_matmul),
        ("product", "numpy.multiply", read_two),
        *(("shifted", f"numpy.{name}", read_two) for name in ("add", "maximum")),
        *(("quotient", f"numpy.{name}", read_two) for name in ("divide", "true_divide")),
        ("total", "numpy.sum", read_sum),
        ("average", "numpy.mean", read_sum),
        ("chosen", "math.top_k", lambda original, x, *others, **options: (x,)),
        ("moved", "numpy.reshape", read_reshape),
        ("moved", "numpy.transpose", read_transpose),
        ("moved", "numpy.swapaxes", read_swap),
        ("moved", "numpy.moveaxis", _read_moveaxis),
        *(("moved", f"numpy.{name}", _read_repeat) for name in ("repeat", "tile", "broadcast_to")),
        ("moved", "numpy.split", _read_split),
        ("moved", "core.unstack", _read_unstack),
        ("logarithm", "numpy.log", lambda original, x: (x,)),
    ]
    found = []
    for kind, path, read in functions:
        module, name = path.split(".")
        if not hasattr(modules[module], name):
            raise missing(f"keras.src.backend.{path}", "Reading attention")
        found.append(Operation(kind, modules[module], name, read))
    return found


def _read_moveaxis(original, x, source, destination):
    order = list(range(len(x.shape)))
    if isinstance(source, int) and isinstance(destination, int):
        order.insert(destination % len(order), order.pop(source))
        return x, order
    return x, None


def _read_repeat(original, x, *others, **options):
    return x, range(len(x.shape))


def _read_split(original, x, indices_or_sections, axis=0):
    return x, [-1 if place == axis % len(x.shape) else place for place in range(len(x.shape))]


def _read_unstack(original, x, num=None, axis=0):
    return x, [place for place in range(len(x.shape)) if place != axis % len(x.shape)]


def _read_softmax(original, x, axis=-1):
    return x, axis


def _read_attention(original, query, key, value, *others, **options):
    names = list(inspect.signature(original).parameters)[3:]
    given = {"query": query, "key": key, "value": value, **dict(zip(names, others, strict=False)), **options}
    return original, given, lambda output: output, lambda output: output
