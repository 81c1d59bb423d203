"""What differs between backends, and the few things that Keras' public API does not offer.

There is one file per backend, with the same functions. Those of the backend in use are offered here.
"""

import contextlib
import importlib

import keras
import numpy as np

from kerasfactory._backend._keras import get_keras_mask as get_keras_mask
from kerasfactory._backend._keras import get_loss as get_loss
from kerasfactory._backend._keras import layers_being_called as layers_being_called
from kerasfactory._backend._keras import operations_of_keras as _operations_of_keras
from kerasfactory._backend._keras import set_keras_mask as set_keras_mask
from kerasfactory._backend._shared import after_fork as after_fork
from kerasfactory._backend._shared import missing as missing

_BACKENDS = ("tensorflow", "jax", "torch")
if keras.config.backend() not in _BACKENDS:
    raise ImportError(
        f"kerasfactory runs on the Keras backends {', '.join(_BACKENDS)}. Received: "
        f"keras.config.backend()={keras.config.backend()!r}. Set the environment variable KERAS_BACKEND to one of them "
        "before Keras is imported."
    )
_chosen = importlib.import_module(f"{__name__}.{keras.config.backend()}")

as_numpy = _chosen.as_numpy
as_tensor = _chosen.as_tensor
check_process = _chosen.check_process
compiled = _chosen.compiled
concrete = _chosen.concrete
evaluation = _chosen.evaluation
gradient = _chosen.gradient
in_scope = _chosen.in_scope
is_usable = _chosen.is_usable
on_cpu = _chosen.on_cpu
operations = _chosen.operations
outside_traces = _chosen.outside_traces
padded_size = _chosen.padded_size
predict_step = _chosen.predict_step
value_of = _chosen.value_of
weak_reference = _chosen.weak_reference
with_numpy_dtype = _chosen.with_numpy_dtype


def all_operations():
    """The functions that attention goes through, Keras' and the backend's own, as a list of `Operation`."""
    return [*_operations_of_keras(), *operations()]


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
