"""What an audit costs: writes verbs.json, which a page of the site shows.

CPU seconds of `explain.audit`, its first call and the second, beside those of comparable jobs: the permutation
importance of scikit-learn with 5 repeats, on as many samples as the audit tests; on PyTorch also Captum's, and the SHAP
values of all samples by permutation. For scale, the time of one prediction for all of these samples. And the peak
memory above the data. Then what the claims about single features take beside the model's predictions, and how far the
default size of a batch is from the fastest. Each measurement has a process of its own.
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

BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
SIZES = [(500, 10), (2_000, 20), (10_000, 30), (200_000, 20), (1_000_000, 30)]
# Samples, at most: PyTorch takes four times the time of JAX.
LARGEST = {"tensorflow": 200_000, "jax": 1_000_000, "torch": 2_000}
REPEATS = 5
TESTED = 20_000  # samples, at most, as the audit does
CLAIMED = (8_000, 16)  # samples and features of the claims
BATCHES = (None, 256, 512, 1024, 2048)  # None: the default
PREDICTED = (30_000, 30)  # samples and features to compare sizes of batches by
SHAPS = 10_000  # samples times features, at most: 2 * features + 1 predictions of each sample on each of 10 others
BATCH = 1024  # at which `predict` is fastest
BACKEND = os.environ.get("KERAS_BACKEND")
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


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
    hidden = keras.layers.Dense(32, "gelu")(keras.layers.Flatten()(tokens))
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(keras.optimizers.Adam(0.003), "mse")
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


def minus_loss(estimator, x, y):
    return -((estimator.predict(x) - y) ** 2).mean()


def cpu_seconds(call):
    start = time.process_time()
    call()
    return round(time.process_time() - start, 3)


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MiB


def of_peers(model, x):
    """CPU seconds of Captum and SHAP, which run on PyTorch here."""
    import captum.attr
    import shap
    import torch

    estimator = Estimator(model)
    tensor, permuted = torch.tensor(x), captum.attr.FeaturePermutation(lambda x: model(x, training=False))

    def captum_permutation():
        with torch.no_grad():
            for _ in range(REPEATS):
                for start in range(0, len(x), BATCH):
                    permuted.attribute(tensor[start : start + BATCH])

    found = {"captum": cpu_seconds(captum_permutation)}
    if x.size <= SHAPS:
        explainer = shap.PermutationExplainer(estimator.predict, x[:10], seed=0)
        found["shap"] = cpu_seconds(lambda: explainer(x, max_evals=2 * x.shape[1] + 1, silent=True))
    return found


def measured(samples, features):
    from sklearn.inspection import permutation_importance

    from kerasfactory import explain

    model = trained(features)
    x, y = data(samples, features)
    estimator = Estimator(model)
    estimator.predict(x[:BATCH])  # compiled
    explain.audit(trained(features), x[:200], y[:200], verbose=0)  # what importing takes is not the question
    before, start = peak_memory(), time.perf_counter()
    audits = [cpu_seconds(lambda: explain.audit(model, x, y, verbose=0))]
    wall, memory = time.perf_counter() - start, peak_memory() - before
    if samples <= TESTED:
        audits.append(cpu_seconds(lambda: explain.audit(model, x, y, verbose=0)))
    x, y = x[:TESTED], y[:TESTED]
    options = {"scoring": minus_loss, "n_repeats": REPEATS, "random_state": 0}
    return {
        "tested": len(x),
        "audit": audits,
        "wall": round(wall, 1),
        "memory": round(memory),
        "importance": cpu_seconds(lambda: permutation_importance(estimator, x, y[:, 0], **options)),
        "prediction": cpu_seconds(lambda: estimator.predict(x)),
        **(of_peers(model, x) if BACKEND == "torch" else {}),
    }


def beside_the_model():
    """What `feature_claims` takes without its predictions: CPU seconds, and peak memory above the data."""
    import numpy as np

    from kerasfactory import explain
    from kerasfactory.explain import _claims

    samples, features = CLAIMED
    model, (x, y) = trained(features), data(samples, features)
    attribution = np.abs(x)
    explain.feature_claims(model, x[:200], y[:200], attribution[:200], verbose=0)
    predictions, of_model = _claims.predictions, []

    def timed(*args):
        start = time.process_time()
        result = predictions(*args)
        of_model.append(time.process_time() - start)
        return result

    _claims.predictions = timed
    before = peak_memory()
    seconds = cpu_seconds(lambda: explain.feature_claims(model, x, y, attribution, verbose=0))
    return {"seconds": round(seconds - sum(of_model), 2), "memory": round(peak_memory() - before)}


def sizes_of_batches():
    """CPU seconds of predictions, for each size of a batch."""
    import numpy as np

    from kerasfactory.explain._engine.outputs import predictions

    samples, features = PREDICTED
    model, (x, _) = trained(features), data(samples, features)
    for size in BATCHES:
        predictions(model, x[:4096], size)
    turns = [[cpu_seconds(lambda size=size: predictions(model, x, size)) for size in BATCHES] for _ in range(REPEATS)]
    return dict(zip(map(str, BATCHES), np.median(turns, axis=0).round(3).tolist(), strict=True))


def main():
    rows = []
    for backend, name in BACKENDS.items():
        for samples, features in SIZES:
            if samples <= LARGEST[backend]:
                found = in_a_process(__file__, backend, samples, features, **ONE_THREAD)
                rows.append({"backend": name, "samples": samples, "features": features, **found})
                print(json.dumps(rows[-1]), flush=True)
    beside, batches = (
        {name: in_a_process(__file__, backend, what, **ONE_THREAD) for backend, name in BACKENDS.items()}
        for what in ("beside_the_model", "sizes_of_batches")
    )
    packages = ("keras", "tensorflow", "jax", "torch", "numpy", "scikit-learn", "captum", "shap")
    versions = {name: importlib.metadata.version(name) for name in packages}
    result = {
        "rows": rows,
        "beside": beside,
        "batches": batches,
        "versions": versions,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["beside_the_model" | "sizes_of_batches" as name]:
            print(json.dumps(globals()[name]()))
        case [samples, features]:
            print(json.dumps(measured(int(samples), int(features))))
        case _:
            main()
