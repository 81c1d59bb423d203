"""What `explain.capture` costs: writes capture.json, which a page of the site shows.

Beside a model of the scores made by hand, `keras.Model(inputs, scores).predict`; and, for attention that is not Keras'
own, which no such model reaches, beside `predict` of the model itself. Times are taken in turn in one process a
backend, the first call, which compiles, apart from later ones; peak memory in a process of its own each.
"""

import functools
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

from child import in_a_process

BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
ROUNDS = 5
QUARTILES = (0.25, 0.5, 0.75)
SAMPLES = 10_000
MEMORY_SAMPLES = (10_000, 20_000)
FOREIGN = {"Llama": {}, "Gemma": {"head_dim": 32}}  # backbones of KerasHub, with what is special to each
TEXTS, TOKENS = 512, 128
# Times are taken in a process that keeps freed memory: how fast a virtual machine gets new pages varies tenfold.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def model_and_scores():
    """A transformer of two blocks over 32 features, and the model of its scores that its author could write."""
    import keras

    from kerasfactory.layers import FeatureTokenizer

    inputs = keras.Input((32,))
    x, scores = FeatureTokenizer(64)(inputs), []
    for _ in range(2):
        attended, of_layer = keras.layers.MultiHeadAttention(8, 8, dropout=0.1)(x, x, return_attention_scores=True)
        scores.append(of_layer)
        x = keras.layers.LayerNormalization()(x + attended)
        x = keras.layers.LayerNormalization()(x + keras.layers.Dense(64)(keras.layers.Dense(128, "gelu")(x)))
    outputs = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs), keras.Model(inputs, scores)


def data(samples):
    import numpy as np

    return np.random.default_rng(0).normal(size=(samples, 32)).astype("float32")


def seconds(call, x, batch_size):
    start = time.perf_counter()
    call(x, batch_size=batch_size, verbose=0)
    return time.perf_counter() - start


def speed():
    """Seconds of `capture` and of the model by hand, (first, later), in turn."""
    import keras

    from kerasfactory import explain

    x = data(SAMPLES)
    result = {"first": [], "later": []}
    for _ in range(ROUNDS):
        keras.backend.clear_session()
        model, by_hand = model_and_scores()
        for when in ("first", "later", "later", "later"):
            capture = functools.partial(explain.capture, model)
            result[when].append([seconds(capture, x, 256), seconds(by_hand.predict, x, 256)])
    return result


def foreign():
    """Seconds of `capture` and of `predict` for models of 4 layers and 8 heads, by name, (first, later), in turn."""
    import keras_hub
    import numpy as np

    from kerasfactory import explain

    ids = np.random.default_rng(0).integers(1, 1000, size=(TEXTS, TOKENS)).astype("int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    sizes = {"vocabulary_size": 1000, "hidden_dim": 256, "intermediate_dim": 1024, "num_layers": 4}
    heads = {"num_query_heads": 8, "num_key_value_heads": 4}
    result = {}
    for name, special in FOREIGN.items():
        model = getattr(keras_hub.models, f"{name}Backbone")(**sizes, **heads, **special)
        capture = functools.partial(explain.capture, model)
        pairs = [[seconds(capture, x, 32), seconds(model.predict, x, 32)] for _ in range(1 + 2 * ROUNDS)]
        result[name] = {"first": pairs[:1], "later": pairs[1:]}
    return result


def memory(who, samples):
    """MiB that the process held at most, above what it held before, and the size of the result (on Linux)."""
    from kerasfactory import explain

    model, by_hand = model_and_scores()
    x = data(samples)
    calls = {
        "capture": lambda x: explain.capture(model, x, batch_size=256, verbose=0).values(),
        "by hand": lambda x: by_hand.predict(x, batch_size=256, verbose=0),
    }
    calls[who](x[:300])  # what compiling takes is not the question
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    result = sum(array.nbytes for array in calls[who](x))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"above": round((peak - before) / 2**20), "result": round(result / 2**20)}


def main():
    import numpy as np

    rows = []
    for backend, name in BACKENDS.items():
        row = {"backend": name}
        for when, pairs in in_a_process(__file__, backend, "speed", **KEEP_MEMORY).items():
            by_hand_to_ours = [by_hand / ours for ours, by_hand in pairs]
            low, middle, high = np.quantile(by_hand_to_ours, QUARTILES)
            row[when] = {
                "throughput": round(float(middle), 2),
                "quartiles": [round(float(low), 2), round(float(high), 2)],
                "samples_per_second": round(SAMPLES / float(np.median(pairs, axis=0)[0])),
            }
        for who in ("capture", "by hand"):
            row[who] = {samples: in_a_process(__file__, backend, "memory", who, samples) for samples in MEMORY_SAMPLES}
        row["foreign"] = {}
        for name, of_model in in_a_process(__file__, backend, "foreign", **KEEP_MEMORY).items():
            ratios = {when: [ours / model for ours, model in pairs] for when, pairs in of_model.items()}
            row["foreign"][name] = {when: np.quantile(of, QUARTILES).round(2).tolist() for when, of in ratios.items()}
        rows.append(row)
        print(json.dumps(row))
    packages = ("keras", "keras-hub", "tensorflow", "jax", "torch", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions,
        "samples": SAMPLES,
        "rounds": ROUNDS,
        "rows": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] in ("speed", "foreign"):
        print(json.dumps({"speed": speed, "foreign": foreign}[sys.argv[1]]()))
    else:
        print(json.dumps(memory(sys.argv[2], int(sys.argv[3]))))
