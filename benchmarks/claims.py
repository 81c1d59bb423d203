"""Whether the verdicts of an audit are right where the truth is known: writes claims.json, which the site shows.

Small models are trained on data made by five processes of which one knows what matters, and the claims that their mean
attention makes are tested on other data of the same process. What is counted: features that say nothing and are called
"supported" nevertheless, and features that matter and are called so. The test of the validator makes its data here.
"""

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")  # trains small models fastest

import keras
import numpy as np
from scipy import stats

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

SAMPLES = 400  # to train on
FEATURES = 6
LEVEL = 0.05
GROUP = 5  # models from as many seeds, on the same data
# The process, how many samples claims are tested on, and on how many models.
RUNS = [
    ("noise", 400, 150),
    ("noise", 60, 50),
    ("additive", 400, 30),
    ("interaction", 400, 30),
    ("redundant copies", 400, 30),
    ("shortcut", 400, 100),
]


def columns(generator, samples):
    """Five normal columns, neighbors correlated by 0.4, and one of three categories, which are integers."""
    x = generator.normal(size=(samples, FEATURES))
    for column in range(1, FEATURES - 1):
        x[:, column] = 0.4 * x[:, column - 1] + 0.84**0.5 * x[:, column]
    x[:, -1] = generator.integers(3, size=samples)
    return x


def noise(generator, samples, training):
    """The outcome has nothing to do with any feature."""
    return columns(generator, samples), generator.normal(size=samples)


def additive(generator, samples, training):
    """Three features matter, each by itself."""
    x = columns(generator, samples)
    return x, x[:, 0] + 0.8 * x[:, 2] + 0.6 * (x[:, 5] - 1) + 0.5 * generator.normal(size=samples)


def interaction(generator, samples, training):
    """Two features matter by their product alone."""
    x = columns(generator, samples)
    return x, x[:, 0] * x[:, 3] + 0.5 * generator.normal(size=samples)


def redundant_copies(generator, samples, training):
    """Feature 4 matters, and what feature 0 says is also in 1, the same, 2, up to noise, and 3, on another scale."""
    x = columns(generator, samples)
    x[:, 4] = generator.normal(size=samples)
    x[:, 1] = x[:, 0]
    x[:, 2] = x[:, 0] + 0.1 * generator.normal(size=samples)
    x[:, 3] = np.tanh(x[:, 0])
    return x, x[:, 0] + 0.7 * x[:, 4] + 0.5 * generator.normal(size=samples)


def shortcut(generator, samples, training):
    """Features 0 and 2 matter. In the data to train on, and only there, feature 4 gives the outcome away."""
    x = columns(generator, samples)
    y = x[:, 0] + 0.7 * x[:, 2] + 0.7 * generator.normal(size=samples)
    x[:, 4] = y + 0.3 * generator.normal(size=samples)
    if not training:
        generator.shuffle(x[:, 4])
    return x, y


# The process; the features that matter; those on which the trained model relies though they do not.
PROCESSES = {
    "noise": (noise, [], []),
    "additive": (additive, [0, 2, 5], []),
    "interaction": (interaction, [0, 3], []),
    "redundant copies": (redundant_copies, [4], [0, 1, 2, 3]),
    "shortcut": (shortcut, [0, 2], [4]),
}


def small_model():
    """Attention over the features of a table, and a regression from the mean of the tokens."""
    inputs = keras.Input((FEATURES,))
    tokens = FeatureTokenizer(8, cardinalities={FEATURES - 1: 3})(inputs)
    attended = InterpretableMultiHeadAttention(8, 2, dropout_rate=0.0, name="attention")(tokens)
    hidden = keras.layers.Dense(16, "relu")(keras.layers.GlobalAveragePooling1D()(tokens + attended))
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(keras.optimizers.Adam(0.01), "mean_squared_error")
    model.optimizer.build(model.trainable_variables)
    return model


def trainer():
    """A function of a process and a seed that returns a model trained on it: always the same two models, compiled once.

    Training sets attributes of a model, and whoever has compiled it, to read scores, compiles it again. So one is
    trained, and the other gets its weights.
    """
    model, its_twin = small_model(), small_model()
    fresh = [variable.numpy() for variable in model.optimizer.variables]

    def trained(process, seed, epochs, data_seed=None):
        keras.utils.set_random_seed(seed)
        generator = np.random.default_rng([seed, 0])
        for variable in model.trainable_variables:
            spread = 0.35 if len(variable.shape) > 1 else 0.0  # biases of layers begin at 0, those of tokens do not
            variable.assign(generator.uniform(-spread, spread, variable.shape))
        for variable, value in zip(model.optimizer.variables, fresh, strict=True):
            variable.assign(value)
        x, y = process(np.random.default_rng([seed if data_seed is None else data_seed, 1]), SAMPLES, training=True)
        model.fit(x.astype("float32"), y, batch_size=50, epochs=epochs, verbose=0)
        its_twin.set_weights(model.get_weights())
        return its_twin

    return trained


def claims(trained, name, seed, samples=SAMPLES, epochs=25):
    """What is claimed of a model trained on the process, and the verdicts, on as many other samples."""
    process = PROCESSES[name][0]
    model = trained(process, seed, epochs)
    x, y = process(np.random.default_rng([seed, 2]), samples, training=False)
    x = x.astype("float32")
    scores = explain.capture(model, x, batch_size=SAMPLES, verbose=0)["attention"]
    attribution = scores.mean(["head", "query"]).rename(key="feature")
    return explain.feature_claims(model, x, y, attribution, level=LEVEL, batch_size=SAMPLES, verbose=0, seed=seed)


def size_of_numbers(model, x):
    """An attribution that knows nothing of the model."""
    return np.abs(x)


def about_the_map(trained):
    """The claims of an audit about a whole map: for each, models of which it is known to be false, and others."""

    def held_out(name, seed):
        x, _ = PROCESSES[name][0](np.random.default_rng([seed, 2]), 100, training=False)
        return x.astype("float32")

    def attributed(name, seed, epochs, data_seed):
        model = trained(PROCESSES[name][0], seed, epochs, data_seed)
        return explain.attribute(model, held_out(name, data_seed), batch_size=100, verbose=0)

    def agreement(name, group, epochs):
        seeds = range(GROUP * group, GROUP * (group + 1))
        return explain.seed_agreement([attributed(name, seed, epochs, group) for seed in seeds], seed=group)

    def in_weights(name, seed, epochs, method="attention"):
        model = trained(PROCESSES[name][0], seed, epochs)
        return explain.parameter_randomization(model, held_out(name, seed), method=method, verbose=0, seed=seed)

    def faithful(name, seed, method):
        model, x = trained(PROCESSES[name][0], seed, 25), held_out(name, seed)
        attribution = explain.attribute(model, x, method=method, batch_size=100, verbose=0, seed=seed)
        return explain.faithfulness(model, x, attribution, verbose=0, seed=seed)

    cases = [
        (
            "the ranking is faithful",
            "random weights, additive data",
            False,
            100,
            lambda k: faithful("additive", k, "random"),
        ),
        (
            "the ranking is faithful",
            "attention, additive data",
            None,
            30,
            lambda k: faithful("additive", k, "attention"),
        ),
        ("other seeds agree", "never trained", False, 400, lambda k: agreement("noise", k, 0)),
        ("other seeds agree", "noise", None, 10, lambda k: agreement("noise", k, 25)),
        ("other seeds agree", "additive", None, 10, lambda k: agreement("additive", k, 25)),
        ("other seeds agree", "redundant copies", None, 10, lambda k: agreement("redundant copies", k, 25)),
        (
            "it is in the weights",
            "size of the numbers",
            False,
            30,
            lambda k: in_weights("additive", k, 0, size_of_numbers),
        ),
        ("it is in the weights", "attention, never trained", True, 30, lambda k: in_weights("noise", k, 0)),
        ("it is in the weights", "attention, additive data", True, 30, lambda k: in_weights("additive", k, 25)),
    ]
    for claim, what, truth, runs, run in cases:
        p_values = np.array([run(number)["p_value"].item() for number in range(runs)])
        yield {"claim": claim, "of": what, "truth": truth, "significant": share(p_values <= LEVEL)}


def share(hits):
    """A share, with its Wilson interval."""
    interval = stats.binomtest(int(np.sum(hits)), np.size(hits)).proportion_ci(method="wilson")
    return {
        "count": int(np.sum(hits)),
        "of": int(np.size(hits)),
        "interval": [round(float(end), 4) for end in interval],
    }


def measured(trained, name, samples, models):
    """The counts for a process, over models and over the claims that attention makes of them."""
    _, relevant, misleading = PROCESSES[name]
    irrelevant = [feature for feature in range(FEATURES) if feature not in relevant]
    start = time.perf_counter()
    results = [claims(trained, name, seed, samples) for seed in range(models)]
    attributions = np.stack([result["attribution"].values for result in results])
    claimed = attributions > attributions.mean(axis=1, keepdims=True)
    verdicts = np.stack([result["verdict"].values for result in results])
    supported, refuted = verdicts == "supported", verdicts == "refuted"
    significant = np.stack([result["p_adjusted"].values for result in results]) <= LEVEL
    row = {
        "process": name,
        "samples": samples,
        "models": models,
        "loss": round(float(np.median([result.attrs["loss"] / result.attrs["base_loss"] for result in results])), 3),
        "seconds": round(time.perf_counter() - start),
        "false_models": share(supported[:, irrelevant].any(axis=1)),
        "false_claims": share(supported[:, irrelevant][claimed[:, irrelevant]]),
        "significant_models": share(significant[:, irrelevant].any(axis=1)),
    }
    for kind, features in (("relevant", relevant), ("misleading", misleading)):
        if features:
            of_claims = claimed[:, features]
            row[kind] = {
                "claimed": share(of_claims),
                "supported": share(supported[:, features]),
                "supported_of_claimed": share(supported[:, features][of_claims]),
                "refuted_of_claimed": share(refuted[:, features][of_claims]),
                "significant": share(significant[:, features]),
            }
    return row


def main():
    trained, rows = trainer(), []
    for name, samples, models in RUNS:
        rows.append(measured(trained, name, samples, models))
        print(json.dumps(rows[-1]), flush=True)
    maps = []
    for row in about_the_map(trained):
        maps.append(row)
        print(json.dumps(row), flush=True)
    backend = keras.config.backend()
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("keras", backend, "numpy", "scipy")},
        "level": LEVEL,
        "training_samples": SAMPLES,
        "features": FEATURES,
        "rows": rows,
        "group": GROUP,
        "maps": maps,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
