"""The private functions of Keras that the package uses. One that Keras has not, says so when it is called."""

import importlib

from kerasfactory._backend._shared import missing

# From the module or class that owns private names to those that its user relies on. `tests/test_private_names.py`
# looks for all of them in the installed libraries.
PRIVATE_NAMES = {
    "keras.src.backend.common.masking": ("get_keras_mask", "set_keras_mask"),
    "keras.src.trainers.compile_utils": ("get_loss",),
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
get_loss = _private("keras.src.trainers.compile_utils", "get_loss", "Computing the loss of each sample")
