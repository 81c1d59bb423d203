"""What the layer costs beside `keras.layers.MultiHeadAttention`: writes layer.json, which the performance page shows.

Both are timed in one process, call by call in turn, on the same data; a ratio is the median of the paired ratios.
"""

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

import keras
import numpy as np

from kerasfactory.layers import InterpretableMultiHeadAttention

ROUNDS = 41


def model(layer, length, width):
    """A model of nothing but attention, so that nothing else dilutes the ratio."""
    inputs = keras.Input(shape=(length, width))
    built = keras.Model(inputs, layer(inputs, inputs))
    built.compile("sgd", "mse")
    return built


def seconds(call, *arguments):
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def compare(length, dropout, batch=8, width=64):
    """Ratios ours : Keras, of a training step and of a prediction."""
    data = np.random.default_rng(0).normal(size=(batch, length, width)).astype("float32")
    ours = model(InterpretableMultiHeadAttention(16, 4, dropout_rate=dropout), length, width)
    plain = model(keras.layers.MultiHeadAttention(4, 16, dropout=dropout), length, width)
    row = {"length": length, "dropout": dropout, "batch": batch, "width": width}
    for what, mine, theirs in [
        ("train", ours.train_on_batch, plain.train_on_batch),
        ("predict", ours.predict_on_batch, plain.predict_on_batch),
    ]:
        arguments = (data, data) if what == "train" else (data,)
        pairs = [(seconds(mine, *arguments), seconds(theirs, *arguments)) for _ in range(ROUNDS + 3)][3:]
        low, middle, high = np.quantile([a / b for a, b in pairs], [0.25, 0.5, 0.75])
        row[what] = {
            "ratio": round(float(middle), 2),
            "quartiles": [round(float(low), 2), round(float(high), 2)],
            "milliseconds": round(1e3 * float(np.median(pairs, axis=0)[0]), 1),
        }
    return row


def main():
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "backend": keras.config.backend(),
        "versions": {name: importlib.metadata.version(name) for name in ("keras", "tensorflow", "numpy")},
        "rounds": ROUNDS,
        "rows": [compare(length, dropout) for length in (32, 128, 512) for dropout in (0.0, 0.1)],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
