"""What `explain.summarize` costs where scores do not fit: writes summary.json, which a page of the site shows.

Time is set against the floor, the least that NumPy needs to form all scores: products of queries and keys, block by
block, and their exponentials, in one process and in turn. Memory is what the process holds at most, above what it
holds at most when the same model runs without attention: queries, keys and values are projected, and the values are
what comes out. The summary itself is part of it.
"""

import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

from child import in_a_process

HEADS, SIZE, WIDTH = 8, 64, 64
ROUNDS = {16_384: 3, 65_536: 1}  # and how often time is taken
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
MEASURED = {16_384: tuple(BACKENDS), 65_536: ("tensorflow",)}


def model_and_data(length):
    import keras
    import numpy as np

    inputs = keras.Input((None, WIDTH))
    attended = keras.layers.MultiHeadAttention(HEADS, SIZE, dropout=0.1, name="attention")(inputs, inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(attended))
    return model, np.random.default_rng(0).normal(size=(1, length, WIDTH)).astype("float32")


def floor(length):
    """Seconds for all scores of a head, by as many heads as there are."""
    import numpy as np

    from kerasfactory.explain import _summary

    generator = np.random.default_rng(0)
    queries = generator.normal(size=(length, SIZE)).astype("float32") / SIZE
    keys = np.ascontiguousarray(generator.normal(size=(length, SIZE)).astype("float32").T)
    block = max(_summary._BLOCK, min(_summary._QUERIES * length, 2 * _summary._BLOCK)) // length
    scores = np.empty((block, length), "float32")
    start = time.perf_counter()
    for _ in range(HEADS):
        for first in range(0, length, block):
            np.matmul(queries[first : first + block], keys, out=scores)
            np.exp(scores, out=scores)
    return time.perf_counter() - start


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB, on Linux


def summarize(length):
    """Peak memory in MiB, and pairs of seconds: `summarize`, the floor."""
    from kerasfactory import explain

    model, x = model_and_data(length)
    explain.summarize(model, x[:, :1024], verbose=0)  # what the first call takes is not the question
    memory, pairs = None, []
    for _ in range(ROUNDS[length]):
        start = time.perf_counter()
        explain.summarize(model, x, verbose=0)
        seconds = time.perf_counter() - start
        memory = memory or peak()  # before the floor is taken
        pairs.append([seconds, floor(length)])
    return {"peak": memory, "pairs": pairs}


def without_attention(length):
    """Peak memory in MiB."""
    from kerasfactory import explain  # noqa: F401

    model, x = model_and_data(length)
    attention = model.get_layer("attention")
    attention.__dict__["_compute_attention"] = lambda query, key, value, *_, **__: (value * 1, None)
    model.compile(run_eagerly=True)
    model.predict_on_batch(x[:, :1024])
    model.predict_on_batch(x)
    return {"peak": peak()}


def main():
    import numpy as np

    rows = []
    for length, backends in MEASURED.items():
        for backend in backends:
            measured = in_a_process(__file__, backend, "summarize", length)
            extra = measured["peak"] - in_a_process(__file__, backend, "without_attention", length)["peak"]
            ratios = [ours / least for ours, least in measured["pairs"]]
            seconds, least = np.median(measured["pairs"], axis=0)
            rows.append(
                {
                    "backend": BACKENDS[backend],
                    "length": length,
                    "extra_mib": round(extra),
                    "seconds": round(float(seconds), 1),
                    "floor_seconds": round(float(least), 1),
                    "ratio": round(float(np.median(ratios)), 2),
                    "ratios": [round(ratio, 2) for ratio in sorted(ratios)],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("keras", "tensorflow", "jax", "torch", "numpy")}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads_of_blas": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        "versions": versions,
        "heads": HEADS,
        "size": SIZE,
        "rows": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        measure = summarize if sys.argv[1] == "summarize" else without_attention
        print(json.dumps(measure(int(sys.argv[2]))))
