"""How attention moves while a model trains."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import xarray as xr

from kerasfactory import _backend
from kerasfactory._arguments import positive_integer
from kerasfactory.explain._engine.attention import float_scores
from kerasfactory.explain._engine.labels import attributes_of, axis_names
from kerasfactory.explain._engine.observe import observe
from kerasfactory.explain._heads import add_sums, check_dims, statistics_of


class AttentionMonitor(keras.callbacks.Callback):
    r"""Records, as a callback, what the heads of a model do with fixed samples while the model trains.

    Before the first epoch and after every `every`-th one, the samples run through the model as in `capture`, batch by
    batch, and the four numbers of `head_statistics` are kept for each head. (With an attention sink, they are those of
    the weights of the real keys, divided by their sum.) Scores are not kept, and take the memory of one batch.
    `history` grows with the epochs, by 8 (3 H + H²) bytes a record for a layer with H heads.

    The monitor does not disturb training: the trained weights are the same with and without it, bit by bit. Dropout is
    off while it records, and it draws no random number.

    Args:
        x: The samples to record, as for `capture`: a few dozen, preferably from the validation data. A generator does
            not work, because it can be read only once.
        layers: Names of the attention layers, as for `capture`.
        every: Record after each epoch whose number, from 1, is a multiple of this.
        log_dir: A directory for TensorBoard. Scalars are called `attention/LAYER/entropy/HEAD` and so on, those of
            redundancy `attention/LAYER/redundancy/HEAD-OTHER`, and their step is the number of epochs done. On
            TensorFlow nothing else is needed; with the other backends tensorboard or tensorflow.
        batch_size: Samples in a batch, as for `capture`.

    Attributes:
        history: A dictionary from the layer's name, as in `capture`, to a Dataset with the variables of
            `head_statistics` along a further dimension: `entropy`, `confidence`, `distance` (epoch, head) and
            `redundancy` (epoch, head, head_other). The coordinate `epoch` counts the epochs done: 0 is before training.
            Empty before that. A `fit` that goes on, with `initial_epoch`, adds to it; one that starts at an epoch
            before the last one recorded starts it again. It stays while the callback does; it is not part of a saved
            model. Numbers are NaN once the model's weights are.

    Raises:
        ValueError: If `every` is not a positive integer, or `x` can be read only once. In `fit`, before the first
            epoch, what `capture` and `head_statistics` raise.
        ImportError: If `log_dir` is given, and nothing is installed that writes for TensorBoard.

    Warns:
        UserWarning: In `fit`, as `capture`, if a layer cannot be captured.

    Example:
        ```python
        import keras
        import numpy as np

        from kerasfactory import explain

        inputs = keras.Input((4, 8))
        attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")
        attended = attention(inputs, inputs)
        model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))
        model.compile(loss="mse")

        x = np.random.default_rng(0).normal(size=(100, 4, 8))
        monitor = explain.AttentionMonitor(x[:20])
        model.fit(x, x[:, 0, 0], epochs=3, verbose=0, callbacks=[monitor])

        print(monitor.history["attention"]["entropy"].sizes)
        #> Frozen({'epoch': 4, 'head': 2})
        print(monitor.history["attention"]["epoch"].values)
        #> [0 1 2 3]
        ```
    """

    def __init__(
        self,
        x: Any,
        *,
        layers: str | Sequence[str] | None = None,
        every: int = 1,
        log_dir: str | os.PathLike[str] | None = None,
        batch_size: int | None = None,
    ):
        super().__init__()
        if isinstance(x, Iterator):
            raise ValueError(
                "`x` is read in every epoch, but this can be read only once. Give an array, or something that yields "
                f"the same batches each time. Received: x of type {type(x).__name__}"
            )
        self.x = x
        self.layers = layers
        self.every = positive_integer("every", every)
        self.batch_size = batch_size
        self._writer: Any = None if log_dir is None else _backend.summary_writer(os.fspath(log_dir))
        self._records: dict[int, dict[str, xr.Dataset]] = {}
        self._starts = False

    @property
    def history(self) -> dict[str, xr.Dataset]:
        """The statistics recorded so far, by layer."""
        records = list(self._records.values())
        return {
            name: xr.concat([record[name] for record in records], "epoch", combine_attrs="override").assign_coords(
                epoch=list(self._records)
            )
            for name in (records[0] if records else ())
        }

    def on_train_begin(self, logs=None):
        self._starts = True

    def on_epoch_begin(self, epoch, logs=None):
        if not self._starts:
            return
        self._starts = False
        if self._records and epoch < max(self._records):
            self._records = {}
        if epoch not in self._records:
            self._record(epoch)

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0:
            self._record(epoch + 1)

    def _record(self, epoch: int) -> None:
        sums: dict[str, dict] = {}
        # `self.model`, and not `self._model`: with JAX it brings the weights up to date.
        for batch in observe(self.model, self.x, self.layers, self.batch_size, 0, float_scores):
            for name, scores in batch.measured.items():
                check_dims(name, ["sample", *axis_names(batch.found[name].layer, len(scores.shape))])
                has_sink = batch.found[name].has_sink
                add_sums(sums.setdefault(name, {}), _backend.as_numpy(scores), name, has_sink)
        self._records[epoch] = {
            name: statistics_of(of_layer).assign_attrs(attributes_of(batch.found[name]))
            for name, of_layer in sums.items()
        }
        if self._writer is not None:
            self._write(epoch)

    def _write(self, epoch: int) -> None:
        for layer, statistics in self._records[epoch].items():
            for variable, values in statistics.items():
                if values.ndim == 1:
                    scalars = {str(head): value for head, value in enumerate(values.values)}
                else:
                    heads = range(len(values))
                    scalars = {f"{a}-{b}": values.values[a, b] for a in heads for b in heads if a < b}
                for label, value in scalars.items():
                    self._writer.add_scalar(f"attention/{layer}/{variable}/{label}", value, epoch)
        self._writer.flush()
