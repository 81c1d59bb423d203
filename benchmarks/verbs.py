"""What an audit costs: writes verbs.json, which a page of the site shows.

CPU seconds of `explain.audit`, beside those of `sklearn.inspection.permutation_importance` with 5 repeats and of the
fewest predictions that either takes, and the peak memory above the data. Each size has a process of its own.
"""

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
SIZES = [(500, 10), (2_000, 20), (10_000, 30), (200_000, 20)]
REPEATS = 5
BATCH = 1024  # at which `predict` is fastest
SETTINGS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


def data(samples, features):
    """Four columns matter, two of them together."""
    import numpy as np

    generator = np.random.default_rng(0)
    x = generator.normal(size=(samples, features)).astype("float32")
    y = x[:, 0] + x[:, 1] * x[:, 2] + 0.5 * x[:, 3] + generator.normal(size=samples)
    return x, y.astype("float32")[:, None]


def trained(features):
    import keras

    from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

    keras.utils.set_random_seed(0)
    inputs = keras.Input((features,))
    tokens = FeatureTokenizer(32)(inputs)
    for _ in range(2):
        tokens = keras.layers.LayerNormalization()(tokens + InterpretableMultiHeadAttention(8, 4)(tokens))
    hidden = keras.layers.Dense(32, "relu")(keras.layers.Flatten()(tokens))
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(keras.optimizers.Adam(0.005), "mse")
    x, y = data(4_000, features)
    model.fit(x, y, batch_size=256, epochs=5, verbose=0)
    return model


class Estimator:
    """The model as scikit-learn knows one."""

    def __init__(self, model):
        self.model = model

    def fit(self, x, y):
        return self

    def predict(self, x):
        return self.model.predict(x, batch_size=BATCH, verbose=0)[:, 0]


def cpu_seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def measured(samples, features):
    """CPU seconds of the first and the second audit, of the importance and of a prediction, and MiB above the data."""
    from sklearn.inspection import permutation_importance

    from kerasfactory import explain

    model = trained(features)
    x, y = data(samples, features)
    estimator = Estimator(model)
    estimator.predict(x[:BATCH])  # compiled
    explain.audit(model, x[:200], y[:200], verbose=0)  # what importing takes is not the question
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    audits = [cpu_seconds(lambda: explain.audit(model, x, y, verbose=0)) for _ in range(2)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    options = {"scoring": "neg_mean_squared_error", "n_repeats": REPEATS}
    importance = cpu_seconds(lambda: permutation_importance(estimator, x, y[:, 0], **options))
    return {"audit": audits, "importance": importance, "memory": round(peak / 2**10)}


def main():
    rows = []
    for backend, name in BACKENDS.items():
        for size in SIZES:
            child = subprocess.run(
                [sys.executable, __file__, *map(str, size)],
                env=os.environ | SETTINGS | {"KERAS_BACKEND": backend},
                capture_output=True,
                text=True,
                check=True,
            )
            rows.append(
                {"backend": name, "samples": size[0], "features": size[1], **json.loads(child.stdout.splitlines()[-1])}
            )
            print(json.dumps(rows[-1]))
    packages = ("keras", "tensorflow", "jax", "torch", "numpy", "scikit-learn")
    versions = {name: importlib.metadata.version(name) for name in packages}
    result = {"rows": rows, "versions": versions, "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measured(int(sys.argv[1]), int(sys.argv[2]))))
    else:
        main()
