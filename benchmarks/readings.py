"""Which reading of a model finds the planted truth? Writes readings.json, which the site shows.

Each process makes data of which we know what matters: some columns of a table, or some words of a text. Small models
with two attention layers are trained on the data, and each reading says of each model what matters to it. The readings
are those of `explain.attribute`, the effect in `explain.feature_claims`, permutation importance (scikit-learn), SHAP
and Captum's integrated gradients. The score of a reading is how well it tells the true features from the others.

It runs on PyTorch, because Captum explains no other models, and because no reading has to be compiled there.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these models are too small to share among cores

import keras
import numpy as np
from scipy import stats
from sklearn.inspection import permutation_importance

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

RESULT = Path(__file__).with_suffix(".json")
PEERS = Path(__file__).parents[1] / ".venv" / "peers"  # where `make bench` puts what only benchmarks need

MODELS = 30
TRAINING, HELD_OUT = 400, 200  # samples
NOISE = 0.5  # its standard deviation in the outcome
EPOCHS = 30
WORDS, LENGTH = 40, 12  # in the vocabulary, where 0 is padding; in a text
BACKGROUND = 10  # samples from which SHAP takes the values of what it removes
SHAP_SAMPLES = 50  # that SHAP explains, since it takes the longest by far
STEPS = 32  # of integrated gradients
LEVEL = 0.05
METHODS = ("random", "attention", "rollout", "attention_gradient", "value_norm", "integrated_gradients")


# Each process takes a generator and a number of samples. It returns x, the outcome without noise, and which features
# are true: the same for all samples of a table, in a text those of each sample.


def columns(generator, samples, features=8, weights=None):
    """Independent normal columns. The outcome is a weighted sum of some."""
    x = generator.normal(size=(samples, features))
    truth = np.isin(np.arange(features), list(weights or ()))
    return x, sum((weight * x[:, column] for column, weight in (weights or {}).items()), np.zeros(samples)), truth


def additive(generator, samples):
    """Three of eight columns add up."""
    return columns(generator, samples, weights={0: 1.0, 2: 0.8, 5: 0.6})


def interaction(generator, samples):
    """Two of eight columns matter, by their product alone."""
    x, _, _ = columns(generator, samples)
    return x, x[:, 0] * x[:, 3], np.isin(np.arange(8), [0, 3])


def switch(generator, samples):
    """The sign of one column decides which of two others is the outcome."""
    x, _, _ = columns(generator, samples)
    return x, np.where(x[:, 1] > 0, x[:, 4], x[:, 6]), np.isin(np.arange(8), [1, 4, 6])


def proxies(generator, samples):
    """Two columns add up. Four others are correlated with one of them (0.9), and add nothing."""
    x, signal, truth = columns(generator, samples, weights={0: 1.0, 4: 0.8})
    for column, cause in ((1, 0), (2, 0), (5, 4), (6, 4)):
        x[:, column] = 0.9 * x[:, cause] + 0.19**0.5 * x[:, column]
    return x, signal, truth


def loud_nulls(generator, samples):
    """As additive, but the numbers in three of the five other columns are five times as large."""
    x, signal, truth = additive(generator, samples)
    x[:, [1, 4, 7]] *= 5
    return x, signal, truth


def weak_effects(generator, samples):
    """One column matters much, and two others little: a hundredth of its share of the variance each."""
    return columns(generator, samples, weights={0: 1.0, 3: 0.1, 6: 0.1})


def thirty_columns(generator, samples):
    """Five of thirty columns add up, some with small weights."""
    return columns(generator, samples, 30, {0: 1.0, 7: 0.4, 13: 0.25, 18: 0.15, 25: 0.1})


def correlated_blocks(generator, samples):
    """Two blocks of four columns, correlated by 0.98 within a block. Of each block one column matters."""
    x = 0.02**0.5 * generator.normal(size=(samples, 8))
    x += 0.98**0.5 * np.repeat(generator.normal(size=(samples, 2)), 4, axis=1)
    return x, x[:, 0] + 0.7 * x[:, 5], np.isin(np.arange(8), [0, 5])


def text(generator, samples, shortest=LENGTH):
    """Of 39 words, three are good and three bad. The outcome is what they add up to, relative to the length."""
    x = generator.integers(7, WORDS, size=(samples, LENGTH))
    lengths = generator.integers(shortest, LENGTH + 1, size=samples)
    planted = generator.random((samples, LENGTH)) < 0.25
    planted[np.arange(samples), generator.integers(0, lengths)] = True
    x[planted] = generator.integers(1, 7, size=int(planted.sum()))
    x[np.arange(LENGTH) >= lengths[:, None]] = 0
    good, bad = (x >= 1) & (x <= 3), (x >= 4) & (x <= 6)
    return x, 4 * (good.sum(axis=1) - bad.sum(axis=1)) / lengths, good | bad


def padded_text(generator, samples):
    """The same with 3 to 12 words, and padding after them."""
    return text(generator, samples, shortest=3)


PROCESSES = {
    "additive": additive,
    "interaction": interaction,
    "switch": switch,
    "proxies": proxies,
    "loud nulls": loud_nulls,
    "weak effects": weak_effects,
    "30 columns": thirty_columns,
    "correlated blocks": correlated_blocks,
    "text": text,
    "padded text": padded_text,
}


HARD = ("weak effects", "30 columns", "correlated blocks", "text", "padded text")


class Case(NamedTuple):
    """A trained model, data that are new to it, and what matters in them."""

    model: keras.Model
    x: np.ndarray
    y: np.ndarray
    truth: np.ndarray  # (feature,), or (sample, feature) in texts
    background: np.ndarray  # some of the data that the model was trained on
    seed: int
    process: int  # its number: no two processes share a seed for the random control

    @property
    def is_text(self):
        return self.truth.ndim == 2


def small_model(features, is_text):
    """Two attention layers, each with a residual connection, and a regression from the mean of the tokens."""
    inputs = keras.Input((features,), dtype="int32" if is_text else "float32")
    if is_text:
        tokens = keras.layers.Embedding(WORDS, 16, mask_zero=True, name="tokens")(inputs)
    else:
        tokens = FeatureTokenizer(16, name="tokens")(inputs)
    return keras.Model(inputs, after(tokens))


def after(tokens):
    for name in ("first", "second"):
        attended = InterpretableMultiHeadAttention(16, 2, dropout_rate=0.0, name=name)(tokens)
        tokens = keras.layers.Add()([tokens, attended])
    hidden = keras.layers.Dense(32, "relu")(keras.layers.GlobalAveragePooling1D()(tokens))
    return keras.layers.Dense(1)(hidden)


def trained(name, seed, epochs=EPOCHS):
    """A model of its own data, and as many held-out samples as readings are given."""
    process = list(PROCESSES).index(name)
    generator = np.random.default_rng([seed, process])
    x, signal, truth = PROCESSES[name](generator, TRAINING + HELD_OUT)
    y = (signal + NOISE * generator.normal(size=len(x))).astype("float32")
    x = x.astype("int32" if x.dtype.kind == "i" else "float32")
    keras.utils.set_random_seed(seed)
    model = small_model(x.shape[1], truth.ndim == 2)
    model.compile(keras.optimizers.Adam(0.01), "mean_squared_error")
    model.fit(x[:TRAINING], y[:TRAINING], batch_size=50, epochs=epochs, verbose=0)
    held_out = x[TRAINING:], y[TRAINING:], truth if truth.ndim == 1 else truth[TRAINING:]
    return Case(model, *held_out, x[:BACKGROUND], seed, process), signal[TRAINING:]


def predicted(case, x):
    return case.model.predict_on_batch(np.asarray(x).astype(case.x.dtype))[:, 0]


# Each reading returns a number for each feature, or one for each feature of each sample, of which the size counts.


def by_method(case, method):
    return explain.attribute(
        case.model, case.x, method=method, batch_size=HELD_OUT, verbose=0, seed=100 * case.process + case.seed
    ).values


def conditional_effect(case):
    everything = np.ones(case.x.shape)  # what is claimed does not change an effect
    claims = explain.feature_claims(case.model, case.x, case.y, everything, verbose=0, seed=case.seed)
    return claims["effect"].values[: case.x.shape[1]]  # groups of near-copies follow


def permutation(case):
    def score(model, x, y):
        return -np.mean((predicted(case, x) - y) ** 2)

    result = permutation_importance(case.model, case.x, case.y, scoring=score, random_state=case.seed)
    return result.importances_mean


def shapley(case):
    import shap

    features = case.x.shape[1]
    masker = shap.maskers.Independent(case.background, max_samples=BACKGROUND)
    explainer = shap.PermutationExplainer(lambda x: predicted(case, x), masker, seed=case.seed)
    return explainer(case.x[:SHAP_SAMPLES], max_evals=2 * features + 1, silent=True).values


def captum_gradients(case):
    """Of a table from its mean row; of a text from embeddings of 0."""
    import torch
    from captum.attr import IntegratedGradients

    x = torch.as_tensor(case.x)
    if not case.is_text:
        baseline = torch.as_tensor(case.x.mean(axis=0, keepdims=True))
        explainer = IntegratedGradients(lambda x: case.model(x)[:, 0])
        return explainer.attribute(x, baseline, n_steps=STEPS).detach().numpy()
    embedded = case.model.get_layer("tokens")(x).detach()
    inputs = keras.Input(embedded.shape[1:])
    rest = keras.Model(inputs, after(inputs))
    rest.set_weights(case.model.get_weights()[1:])
    rest.supports_masking = True  # Keras 3.15 warns otherwise, and uses the mask all the same
    explainer = IntegratedGradients(lambda embedded, mask: rest(embedded, mask=mask)[:, 0])
    values = explainer.attribute(embedded, additional_forward_args=(x != 0,), n_steps=STEPS)
    return values.sum(-1).detach().numpy()


def readings_at_hand(is_text):
    """From the name of each reading to its function. Permuting a position says nothing of the words of one text."""
    readings = {method: lambda case, method=method: by_method(case, method) for method in METHODS}
    if not is_text:
        readings["conditional effect"] = conditional_effect
        readings["permutation importance"] = permutation
    if PEERS.is_dir() and str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    if importlib.util.find_spec("shap"):
        readings["SHAP"] = shapley
    if keras.config.backend() == "torch":
        readings["integrated gradients, Captum"] = captum_gradients
    return readings


def scores(reading, case):
    """The AUC of the true against the other features, and whether exactly the true ones are on top; means of texts."""
    sizes = np.abs(np.asarray(reading, "float64"))
    if case.is_text:
        rows = [(row[seen], truth[seen]) for row, truth, seen in zip(sizes, case.truth, case.x > 0, strict=False)]
    else:
        importance = sizes.mean(axis=0) if sizes.ndim == 2 else np.asarray(reading, "float64")
        rows = [(importance, case.truth)]
    found = []
    for row, truth in rows:
        if not truth.all():  # in a text of nothing but planted words there is nothing to tell apart
            true, others = row[truth], row[~truth]
            pairs = np.sign(true[:, None] - others) / 2 + 0.5  # equal numbers count half
            found.append((pairs.mean(), true.min() > others.max()))
    return np.mean(found, axis=0)


def summary(values, is_text, generator):
    """Means over models, and their 95 % intervals, from (model, AUC and exact)."""

    def bootstrap(numbers):
        means = generator.choice(numbers, (2000, len(numbers))).mean(axis=1)
        return np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])

    aucs, exact = np.transpose(values)
    if is_text:
        interval = bootstrap(exact)  # each is a share of texts
    else:
        interval = stats.binomtest(int(exact.sum()), len(exact)).proportion_ci(method="wilson")
    return {
        "auc": round(float(aucs.mean()), 4),
        "auc_interval": [round(float(end), 4) for end in bootstrap(aucs)],
        "exact": round(float(exact.mean()), 4),
        "exact_interval": [round(float(end), 4) for end in interval],
    }


def measured(name, models=MODELS, epochs=EPOCHS):
    """What each reading finds of a process, over models of as many seeds."""
    found, skills, attainable = {}, [], []
    for seed in range(models):
        case, signal = trained(name, seed, epochs)
        skills.append(1 - np.mean((predicted(case, case.x) - case.y) ** 2) / case.y.var())
        attainable.append(1 - np.mean((signal - case.y) ** 2) / case.y.var())
        for reading, function in readings_at_hand(case.is_text).items():
            found.setdefault(reading, []).append(scores(function(case), case))
        keras.utils.clear_session()
    generator = np.random.default_rng(0)
    return {
        "process": name,
        "what": PROCESSES[name].__doc__,
        "text": case.is_text,
        "hard": name in HARD,
        "features": case.x.shape[1],
        "true": None if case.is_text else int(case.truth.sum()),
        "models": models,
        "skill": {
            "median": round(float(np.median(skills)), 3),
            "lowest": round(min(map(float, skills)), 3),
            "attainable": round(float(np.median(attainable)), 3),
        },
        "readings": {reading: summary(values, case.is_text, generator) for reading, values in found.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="two models of one process, and nothing is written")
    parser.add_argument("--models", type=int, default=MODELS, help="of each process")
    parser.add_argument("--only", nargs="*", default=PROCESSES, help="processes; nothing is written")
    arguments = parser.parse_args()
    if arguments.short:
        print(json.dumps(measured("additive", models=2), indent=2))
        return
    rows = []
    for name in arguments.only:
        start = time.perf_counter()
        rows.append(measured(name, arguments.models))
        print(f"{time.perf_counter() - start:.0f} s", json.dumps(rows[-1]), flush=True)
    if arguments.only is not PROCESSES:
        return
    packages = ("keras", keras.config.backend(), "numpy", "scikit-learn", "shap", "captum")
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "training": TRAINING,
        "held_out": HELD_OUT,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
