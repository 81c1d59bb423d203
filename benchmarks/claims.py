"""Whether the verdicts of an audit are right where the truth is known: writes claims.json, which the site shows.

Small models are trained on data made by processes of which one knows what matters, and the claims that their mean
attention makes are tested on other data of the same process. What is counted: features that say nothing and are called
"supported" nevertheless, features that matter and are called so, and those that matter and are "refuted". The test of
the validator makes its data here.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")  # trains small models fastest

import keras
import numpy as np
from scipy import special, stats

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


# Data that people have: counts, codes, one-hot columns, rows that depend on each other, and models gone wrong.

TESTED = 400  # samples
CODES = 12  # levels of a category
BLOCK = 20  # samples of a series that are exchanged together
PATIENT = 10  # samples of each


def normal(generator, samples):
    return generator.normal(size=(samples, FEATURES))


def counts(generator, samples, training):
    """Feature 0 is a count that matters, and feature 1 counts a part of it, which adds nothing. So does feature 2."""
    x = normal(generator, samples)
    x[:, 0] = generator.poisson(10, size=samples)
    x[:, 1] = generator.binomial(x[:, 0].astype(int), 0.8)
    return x, (x[:, 0] - 10) / 10**0.5 + 0.7 * x[:, 2] + 0.5 * generator.normal(size=samples)


def of_codes(samples_of_codes):
    """What the codes of a category stand for: always the same numbers, in no order."""
    return np.random.default_rng(0).normal(size=CODES)[samples_of_codes]


def codes(generator, samples, training):
    """Features 0 and 1 are two codes of one category. It matters, and so does feature 2."""
    x = normal(generator, samples)
    x[:, 0] = generator.integers(CODES, size=samples)
    x[:, 1] = np.random.default_rng(1).permutation(CODES)[x[:, 0].astype(int)]
    return x, of_codes(x[:, 0].astype(int)) + 0.7 * x[:, 2] + 0.5 * generator.normal(size=samples)


def code_and_number(generator, samples, training):
    """Feature 0 is a category, and feature 1 a number that it determines and that matters. So does feature 2."""
    x = normal(generator, samples)
    x[:, 0] = generator.integers(CODES, size=samples)
    x[:, 1] = of_codes(x[:, 0].astype(int))
    return x, x[:, 1] + 0.7 * x[:, 2] + 0.5 * generator.normal(size=samples)


def one_hot(generator, samples, training):
    """The only cause is a category of four levels, in the columns 0 to 3."""
    x = normal(generator, samples)
    level = generator.integers(4, size=samples)
    x[:, :4] = np.eye(4)[level]
    return x, np.array([-1.2, -0.4, 0.4, 1.2])[level] + 0.5 * generator.normal(size=samples)


def series(generator, samples, training):
    """Rows follow each other in time, and the outcome has nothing to do with any feature."""
    steps = np.empty((samples, FEATURES + 1))
    steps[0] = generator.normal(size=FEATURES + 1)
    for time_step in range(1, samples):
        steps[time_step] = 0.9 * steps[time_step - 1] + 0.19**0.5 * generator.normal(size=FEATURES + 1)
    return steps[:, :-1], steps[:, -1]


def patients(generator, samples, training):
    """Ten rows of each patient, alike in all columns. The outcome has nothing to do with any feature."""
    own = np.repeat(generator.normal(size=(samples // PATIENT, FEATURES + 1)), PATIENT, axis=0)
    rows = 0.9**0.5 * own + 0.1**0.5 * generator.normal(size=own.shape)
    return rows[:, :-1], rows[:, -1]


def duplicates(generator, samples, training):
    """Each row is there four times, and the outcome has nothing to do with any feature."""
    x, y = noise(generator, samples // 4, training)
    return np.repeat(x, 4, axis=0), np.repeat(y, 4)


def rare_class(generator, samples, training):
    """Of all samples, 4% belong to the class. Features 0 and 2 decide which."""
    x = normal(generator, samples)
    return x, (x[:, 0] + 0.8 * x[:, 2] + 0.3 * generator.normal(size=samples) > 2.3).astype("float32")


def shifted(generator, samples, training):
    """As additive, but in the data that claims are tested on the outcome is 20 more."""
    x, y = additive(generator, samples, training)
    return x, y if training else y + 20


def sign_wrong(generator, samples, training):
    """As additive, but in the data that claims are tested on the outcome is negated."""
    x, y = additive(generator, samples, training)
    return x, y if training else -y


class Kind(NamedTuple):
    """A process, and what is known about claims on it. Features go by their names in the result: groups are "0 + 1"."""

    data: Callable
    true: tuple[str, ...] = ()  # they tell the model what the others do not
    members: tuple[str, ...] = ()  # parts of a true group: to support one of them is false, and so is to refute it
    models: int = 200
    model: Mapping[str, Any] = MappingProxyType({})  # arguments of `small_model`
    training: int = SAMPLES
    epochs: int = 25
    arguments: Mapping[str, Any] = MappingProxyType({})  # of `feature_claims`
    on_training_rows: bool = False


_COLUMNS = {"cardinalities": None}
_CODED = {"cardinalities": {0: CODES, 1: CODES}}
KINDS = {
    "counts": Kind(counts, ("0", "2"), model=_COLUMNS),
    "two codes": Kind(codes, ("0 + 1", "2"), ("0", "1"), model=_CODED),
    "code and number": Kind(code_and_number, ("0 + 1", "2"), ("0", "1"), model={"cardinalities": {0: CODES}}),
    "one-hot": Kind(one_hot, ("0 + 1 + 2 + 3",), ("0", "1", "2", "3"), model=_COLUMNS, models=60),
    "one-hot, `feature_mask`": Kind(
        one_hot, ("0 + 1 + 2 + 3",), model=_COLUMNS, arguments={"feature_mask": [0, 0, 0, 0, 1, 2]}, models=60
    ),
    "time series": Kind(series, model=_COLUMNS),
    "time series, `block`": Kind(series, model=_COLUMNS, arguments={"block": BLOCK}),
    "patients": Kind(patients, model=_COLUMNS),
    "patients, `groups`": Kind(
        patients, model=_COLUMNS, arguments={"groups": np.repeat(np.arange(TESTED // PATIENT), PATIENT)}
    ),
    "duplicates": Kind(duplicates),
    "rare class": Kind(rare_class, ("0", "2"), model=_COLUMNS | {"loss": "binary_crossentropy"}, models=60),
    "shifted outcome": Kind(shifted, ("0", "2", "5"), models=60),
    "sign wrong": Kind(sign_wrong, members=("0", "2", "5"), models=60),
    "over-fitted, noise": Kind(noise, training=60, epochs=150),
    "over-fitted, additive": Kind(additive, ("0", "2", "5"), training=60, epochs=150, models=60),
    "tested on its training rows": Kind(noise, on_training_rows=True),
}


_LAST_IS_A_CATEGORY = MappingProxyType({FEATURES - 1: 3})


def small_model(cardinalities=_LAST_IS_A_CATEGORY, loss="mean_squared_error"):
    """Attention over the features of a table, and a regression from the mean of the tokens."""
    inputs = keras.Input((FEATURES,))
    tokens = FeatureTokenizer(8, cardinalities=cardinalities)(inputs)
    attended = InterpretableMultiHeadAttention(8, 2, dropout_rate=0.0, name="attention")(tokens)
    hidden = keras.layers.Dense(16, "relu")(keras.layers.GlobalAveragePooling1D()(tokens + attended))
    activation = "sigmoid" if loss == "binary_crossentropy" else None
    model = keras.Model(inputs, keras.layers.Dense(1, activation)(hidden))
    model.compile(keras.optimizers.Adam(0.01), loss)
    model.optimizer.build(model.trainable_variables)
    return model


def trainer(**arguments):
    """A function of a process and a seed that returns a model trained on it: always the same two models, compiled once.

    Training sets attributes of a model, and whoever has compiled it, to read scores, compiles it again. So one is
    trained, and the other gets its weights.
    """
    model, its_twin = small_model(**arguments), small_model(**arguments)
    fresh = [variable.numpy() for variable in model.optimizer.variables]

    def trained(process, seed, epochs, data_seed=None, samples=SAMPLES):
        keras.utils.set_random_seed(seed)
        generator = np.random.default_rng([seed, 0])
        for variable in model.trainable_variables:
            spread = 0.35 if len(variable.shape) > 1 else 0.0  # biases of layers begin at 0, those of tokens do not
            variable.assign(generator.uniform(-spread, spread, variable.shape))
        for variable, value in zip(model.optimizer.variables, fresh, strict=True):
            variable.assign(value)
        x, y = process(np.random.default_rng([seed if data_seed is None else data_seed, 1]), samples, training=True)
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
    results = [
        claims(trained, name, seed, samples).isel(feature=slice(FEATURES)) for seed in range(models)
    ]  # without groups, which follow
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


def claims_of_kind(trained, kind, seed):
    """What is claimed of a model trained on data of the kind, and the verdicts."""
    model = trained(kind.data, seed, kind.epochs, samples=kind.training)
    own_rows = kind.on_training_rows
    x, y = kind.data(np.random.default_rng([seed, 1 if own_rows else 2]), TESTED, training=own_rows)
    x = x.astype("float32")
    scores = explain.capture(model, x, batch_size=TESTED, verbose=0)["attention"]
    attribution = scores.mean(["head", "query"]).rename(key="feature")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies among the samples, which is what we made
        return explain.feature_claims(
            model, x, y, attribution, level=LEVEL, batch_size=TESTED, verbose=0, seed=seed, **kind.arguments
        )


def measured_kind(name, models=None):
    """How often verdicts are wrong on a kind of data, how often they are right, and whether intervals cover."""
    kind = KINDS[name]
    models = models or kind.models
    trained, start = trainer(**kind.model), time.perf_counter()
    found, skills = {"null": [], "true": [], "members": []}, []
    any_false, any_needed = [], []
    for seed in range(models):
        result = claims_of_kind(trained, kind, seed)
        skills.append(result.attrs["skill"])
        mine = {key: [] for key in found}
        for feature in result["feature"].values:
            of = "true" if str(feature) in kind.true else "members" if str(feature) in kind.members else "null"
            one = result.sel(feature=feature)
            mine[of].append((one["verdict"].item(), *one["interval"].values))
        missing = set(kind.true) - {str(feature) for feature in result["feature"].values}
        mine["true"] += [("not noticed", np.nan, np.nan)] * len(missing)  # a group of columns that depend on each other
        for key, values in mine.items():
            found[key] += values
        false = [verdict for verdict, *_ in mine["null"] + mine["members"]]
        any_false.append("supported" in false)
        any_needed.append(any(verdict in ("supported", "needed, not claimed") for verdict in false))

    def counted(kinds, *verdicts):
        return share([verdict in verdicts for key in kinds for verdict, *_ in found[key]])

    row = {
        "process": name,
        "what": kind.data.__doc__,
        "models": models,
        "skill": round(float(np.median(skills)), 3),
        "seconds": round(time.perf_counter() - start),
        "false_models": share(any_false),
        "false_needed_models": share(any_needed),
        "false_supported": counted(("null", "members"), "supported"),
    }
    if kind.true or kind.members:
        row["false_refuted"] = counted(("true", "members"), "refuted")
    if kind.true:
        row["power"] = counted(("true",), "supported", "needed, not claimed")
        row["supported"] = counted(("true",), "supported")
    # Drawn from its true distribution, a feature that tells nothing of its own changes the loss by nothing on average.
    ends = np.array([bounds for key in ("null",) for _, *bounds in found[key]])
    ends = ends[np.isfinite(ends).all(axis=1)]
    if len(ends) and not kind.on_training_rows:
        row["coverage"] = share((ends[:, 0] <= 0) & (ends[:, 1] >= 0))
    return row


def lognormal(generator, size):
    return (generator.lognormal(size=size) - np.exp(0.5)) / ((np.e - 1) * np.e) ** 0.5


# A distribution of variance 1, the loss, and the effect: the mean (absolute) difference of two values, squared or not.
EFFECTS = {
    "normal": (lambda generator, size: generator.normal(size=size), "mean_squared_error", 2),
    "lognormal": (lognormal, "mean_absolute_error", 2 * np.exp(0.5) * special.erf(0.5) / ((np.e - 1) * np.e) ** 0.5),
    "lognormal, squared": (lognormal, "mean_squared_error", 2),
    "flag of 2%": (
        lambda generator, size: ((generator.random(size) < 0.02) - 0.02) / (0.02 * 0.98) ** 0.5,
        "mean_squared_error",
        2,
    ),
}


def coverage(name, samples=300, models=200):
    """How often the interval of an effect covers it, in a linear model that is right.

    The feature has variance 1, the weight 1, and nothing to do with the others. So its effect on the squared error is
    the mean square of the difference of two of its values: 2. For the absolute error nothing else moves the outcome.
    """
    distribution, loss, effect = EFFECTS[name]
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
    model.set_weights([np.array([[1.0], [0.5], [0.0]])])
    model.compile(loss=loss)
    hits = []
    for seed in range(models):
        generator = np.random.default_rng([seed, 3])
        x = generator.normal(size=(samples, 3))
        x[:, 0] = distribution(generator, samples)
        noise = generator.normal(size=samples) * (loss == "mean_squared_error")
        y = x @ [1.0, 0.5, 0.0] + noise
        attribution = np.ones(x.shape) * [3, 2, 1]
        result = explain.feature_claims(model, x, y, attribution, level=LEVEL, batch_size=samples, verbose=0, seed=seed)
        lower, upper = result["interval"].values[0]
        hits.append(lower <= effect <= upper)
    return {"effect": name, "samples": samples, "covered": share(hits)}


LENGTH, WORDS = 10, 30


def padded_texts(generator, samples):
    """Texts of 2 to 10 of 10 words, with padding after them. Two words of 29 are good, and two bad."""
    lengths = generator.integers(2, LENGTH + 1, size=samples)
    x = np.where(np.arange(LENGTH) < lengths[:, None], generator.integers(1, WORDS, size=(samples, LENGTH)), 0)
    x[np.arange(samples), generator.integers(0, lengths)] = generator.integers(1, 5, size=samples)
    effect = ((x == 1) | (x == 2)).astype(float) - ((x == 3) | (x == 4))
    return x.astype("int32"), 4 * effect.sum(axis=1) / lengths, (x >= 1) & (x <= 4)


def padded_model(seed):
    """Attention over the words of a text, and a regression from their mean."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((LENGTH,), dtype="int32")
    tokens = keras.layers.Embedding(WORDS, 8, mask_zero=True)(inputs)
    attended = InterpretableMultiHeadAttention(8, 2, dropout_rate=0.0, name="attention")(tokens)
    pooled = keras.layers.GlobalAveragePooling1D()(keras.layers.Add()([tokens, attended]))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(16, "relu")(pooled)))
    model.compile(keras.optimizers.Adam(0.01), "mean_squared_error")
    x, y, _ = padded_texts(np.random.default_rng([seed, 1]), SAMPLES)
    model.fit(x, y, batch_size=50, epochs=15, verbose=0)
    return model


def about_padding(models=200, trainings=10):
    """The null of `faithfulness` where texts have different lengths: controls that know nothing, and the truth."""
    fitted = [padded_model(seed) for seed in range(trainings)]

    def p_value(seed, removal, knows):
        model = fitted[seed % trainings]
        x, _, truth = padded_texts(np.random.default_rng([seed, 2]), 100)
        attribution = (
            truth.astype("float32") if knows else explain.attribute(model, x, method="random", seed=seed, verbose=0)
        )
        return explain.faithfulness(model, x, attribution, removal=removal, verbose=0, seed=seed)["p_value"].item()

    for knows, what, runs in ((False, "random weights", models), (True, "the planted words", max(models // 10, 1))):
        for removal in ("mask", "marginal"):
            p_values = np.array([p_value(seed, removal, knows) for seed in range(runs)])
            yield {
                "claim": "the ranking is faithful",
                "of": f"{what}, padded texts, removal {removal}",
                "truth": knows,
                "significant": share(p_values <= LEVEL),
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=int, help="of each kind of data, in place of 200; nothing is written")
    parser.add_argument("--only", nargs="*", help="kinds of data; nothing is written")
    arguments = parser.parse_args()
    if arguments.models or arguments.only:
        for name in arguments.only or KINDS:
            print(json.dumps(measured_kind(name, arguments.models)), flush=True)
        if not arguments.only:
            for name in EFFECTS:
                print(json.dumps(coverage(name, models=arguments.models)), flush=True)
            for row in about_padding(arguments.models, trainings=2):
                print(json.dumps(row), flush=True)
        return
    trained, rows = trainer(), []
    for name, samples, models in RUNS:
        rows.append(measured(trained, name, samples, models))
        print(json.dumps(rows[-1]), flush=True)
    maps = []
    for row in about_the_map(trained):
        maps.append(row)
        print(json.dumps(row), flush=True)
    maps += about_padding()
    kinds = []
    for name in KINDS:
        kinds.append(measured_kind(name))
        print(json.dumps(kinds[-1]), flush=True)
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
        "kinds": kinds,
        "coverage": [coverage(name) for name in EFFECTS],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
