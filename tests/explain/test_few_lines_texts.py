"""A new user's tasks take few lines: these programs are what stands in a cell after `fit` or `load_model`."""

import re

import keras
import numpy as np
import pytest
from keras import layers

from kerasfactory.layers import FeatureTokenizer

pytestmark = pytest.mark.backend_independent


def run(program, most_lines, **variables):
    """Execute the program with these variables, and return what it leaves. It has at most so many lines of code."""
    lines = [line for line in program.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= most_lines
    assert max(map(len, lines)) <= 88
    exec(program, variables)
    return variables


@pytest.fixture(scope="module")
def texts():
    """Texts of 4 to 8 words, of which one says the label."""
    rng = np.random.default_rng(0)
    others = ["the", "film", "we", "saw", "on", "a", "long", "evening", "with", "friends"]
    labels = rng.integers(0, 2, 300)
    words = [[*rng.choice(others, rng.integers(3, 8)), ["bad", "good"][label]] for label in labels]
    return np.array([" ".join(rng.permutation(row)) for row in words]), labels


TEXT_TO_SHADED_WORDS = """
from kerasfactory import explain, plot

ids = keras.ops.convert_to_numpy(vectorize(new_texts))
words = vectorize.get_vocabulary().__getitem__
weights = explain.attribute(
    model, ids, method="integrated_gradients", feature_names=words, verbose=0
)
shaded = plot.text(weights, top_k=1)
"""


def test_a_text_to_shaded_words(texts):
    texts, labels = texts
    new_texts, texts, labels = texts[:8], texts[8:], labels[8:]
    vectorize = layers.TextVectorization(output_sequence_length=8)
    vectorize.adapt(texts)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,), dtype="int32")
    tokens = layers.Embedding(vectorize.vocabulary_size(), 8, mask_zero=True)(inputs)
    attended = layers.MultiHeadAttention(1, 8)(tokens, tokens)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(attended)))
    model.compile(keras.optimizers.Adam(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(keras.ops.convert_to_numpy(vectorize(texts)), labels, batch_size=292, epochs=20, verbose=0)

    shaded = run(TEXT_TO_SHADED_WORDS, 12, keras=keras, model=model, vectorize=vectorize, new_texts=new_texts)["shaded"]

    sentences = re.findall(r'<p class="sentence".*?</p>', shaded)
    assert len(sentences) == 8
    for sentence, text in zip(sentences, new_texts, strict=True):
        spans = re.findall(r'<span class="([^"]*)" style="--share:(\d+)%" title="[^"]*">(\w+)<', sentence)
        assert [word for *_, word in spans] == text.split()  # padding is not shown
        (planted,) = {"bad", "good"} & set(text.split())
        assert max(spans, key=lambda span: int(span[1]))[2] == planted
        assert [word for classes, _, word in spans if "top" in classes] == [planted]


LOADED_MODEL_TO_AUDIT = """
from kerasfactory import explain

model = keras.models.load_model(path)
features = {"patient": [0, 1, 2], "visit": [3, 4]}  # the numbers of the columns
names = ["age", "dose", "pulse", "day", "place"]
settings = {"feature_names": names, "feature_mask": features, "verbose": 0}
report = explain.audit(model, x, y, path.with_suffix(".html"), **settings)
needed = report.features["verdict"].isin(["supported", "needed, not claimed"])
"""


def test_a_loaded_model_of_two_inputs_to_an_audit(tmp_path):
    rng = np.random.default_rng(0)
    x = {"patient": rng.normal(size=(450, 3)), "visit": rng.normal(size=(450, 2))}
    y = x["patient"][:, 1] + x["visit"][:, 0] + 0.2 * rng.normal(size=450)
    keras.utils.set_random_seed(0)
    inputs = {name: keras.Input(table.shape[1:], name=name) for name, table in x.items()}
    tokens = layers.Concatenate(axis=1)([FeatureTokenizer(8)(table) for table in inputs.values()])
    attended = layers.MultiHeadAttention(2, 8, name="attention")(tokens, tokens)
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(attended)))
    model.compile(keras.optimizers.Adam(0.02), "mse")
    model.fit({name: table[:350] for name, table in x.items()}, y[:350], batch_size=50, epochs=12, verbose=0)
    model.save(tmp_path / "model.keras")

    x = {name: table[350:] for name, table in x.items()}
    found = run(LOADED_MODEL_TO_AUDIT, 10, keras=keras, path=tmp_path / "model.keras", x=x, y=y[350:])

    assert found["needed"][found["needed"]].index.tolist() == ["dose", "day"]
    assert (tmp_path / "model.html").exists()
