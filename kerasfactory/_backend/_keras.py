"""The private functions of Keras that the package uses. One that Keras has not, says so when it is called."""

import importlib

import keras

from kerasfactory._backend._shared import missing

# From the module or class that owns private names to those that its user relies on. `tests/test_private_names.py`
# looks for all of them in the installed libraries.
PRIVATE_NAMES = {
    "keras.src.backend.common.masking": ("get_keras_mask", "set_keras_mask"),
    "keras.src.trainers.compile_utils": ("get_loss",),
    "keras.src.backend.common.global_state": ("get_global_attribute",),
    "keras.src.backend.nn": ("softmax", "dot_product_attention"),
    "keras.src.backend.numpy": ("einsum", "matmul"),
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


def operations():
    """Where the functions stand that attention goes through: (name, module, its name in there)."""
    nn, numpy = (importlib.import_module("keras.src.backend").__dict__[name] for name in ("nn", "numpy"))
    places = [("softmax", nn), ("dot_product_attention", nn), ("einsum", numpy), ("matmul", numpy)]
    for name, module in places:
        if not hasattr(module, name):
            raise missing(f"keras.src.backend.{module.__name__.rpartition('.')[2]}.{name}", "Reading attention")
    return [(name, module, name) for name, module in places]
