"""What is read of every backbone of KerasHub, against the table on the site, benchmarks/backbones.json.

All of them on PyTorch, where this takes least, and a few on the other two. How they are made and run, and how the
number of times that they attend is found, is in benchmarks/backbones.py.
"""

import json
import pathlib
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from benchmarks import backbones

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of KerasHub itself and what it imports
    import keras_hub  # noqa: F401 (a run without it is to fail)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the backbones; what `capture` says is compared
RUN = backbones.BACKENDS[keras.config.backend()]
RESULT = json.loads(pathlib.Path(backbones.__file__).with_suffix(".json").read_text())
TABLE = {row["row"]: row for row in RESULT["rows"]}
MEASURED = [name for name, row in TABLE.items() if RUN in row["results"]]
ROWS = MEASURED if RUN == "PyTorch" else [name for name in MEASURED if name in backbones.SELECTION]
OUT_OF_DATE = (
    "If that is meant, `python benchmarks/backbones.py` renews the table, with `--backend torch --renew` a part of it."
)


@pytest.mark.backend_independent
def test_the_table_has_all_backbones():
    assert list(TABLE) == backbones.rows(), OUT_OF_DATE


@pytest.mark.parametrize("name", ROWS)
def test_a_backbone_is_read_as_the_table_says(name):
    row = TABLE[name]
    expected = row["results"][RUN]
    if "failed" in expected:
        pytest.skip(expected["failed"])
    model = backbones.model_of(name)
    if RUN == "JAX":
        assert backbones.attention_calls(model, backbones.inputs(model)) == row["attention"], OUT_OF_DATE
    found = backbones.measure(model)
    assert found["captured"] == expected["captured"], OUT_OF_DATE
    assert found["said"] == expected["said"], OUT_OF_DATE
    assert found["unchanged"]
    assert found["difference"] in (None, 0) or found["difference"] < 1e-5
    assert found["error"] is None or found["error"] < 1e-5


@pytest.mark.backend_independent
def test_all_attention_is_read_or_named_and_nothing_else_is():
    for name, row in TABLE.items():
        results = [found for found in row["results"].values() if "failed" not in found]
        assert results, name
        for found in results:
            assert found["result"] == backbones.result_of(row["attention"], found["captured"], found["said"])
            assert found["result"] in ("complete", "part", "none", "no attention"), name
    for name in ("MixtralBackbone", "QwenMoeBackbone", "Qwen3MoeBackbone", "GptOssBackbone", "EfficientNetBackbone"):
        # Routers and gates have a softmax or a sigmoid, and values that they weight.
        assert {found["result"] for found in TABLE[name]["results"].values()} <= {"complete", "no attention"}


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("attention", "captured", "said", "expected"),
    [
        (2, 2, [], "complete"),
        (2, 2, ["it is a `X`: it samples"], "part"),
        (2, 1, ["it is a `X`: it samples"], "part"),
        (2, 1, [], "silent"),
        (2, 0, [], "silent"),
        (0, 0, [], "no attention"),
        (0, 0, ["it is a `X`: it samples"], "none"),
        (2, 3, [], "false alarm"),
    ],
)
def test_results_in_a_word(attention, captured, said, expected):
    assert backbones.result_of(attention, captured, said) == expected


def by_hand(kind):
    """A model whose attention, or none, is written with operations of Keras."""
    generator = np.random.default_rng(0)
    inputs = keras.Input((5, 8))
    query, key, value = (layers.Dense(8)(inputs) for _ in range(3))
    scores = ops.matmul(query, ops.transpose(key, (0, 2, 1)))
    gates = ops.softmax(layers.Dense(3)(inputs))
    bins = generator.normal(size=(8, 1)).astype("float32")
    outputs = {
        "softmax and matmul": lambda: ops.matmul(ops.softmax(scores), value),
        "two heads, einsum": lambda: ops.einsum("bhqk,bkd->bqhd", ops.softmax(ops.stack([scores, -scores], 1)), value),
        "masked after the softmax": lambda: ops.matmul(ops.where(scores > 0, ops.softmax(scores), 0.0), value),
        "a column more, dropped": lambda: ops.matmul(
            ops.softmax(ops.pad(scores, [[0, 0], [0, 0], [0, 1]]))[..., :-1], value
        ),
        "Attention": lambda: layers.Attention()([query, value, key]),
        "AdditiveAttention": lambda: layers.AdditiveAttention()([query, value, key]),
        "MultiHeadAttention, called twice": lambda: _twice(layers.MultiHeadAttention(2, 4), inputs),
        "gates": lambda: ops.sum(gates[..., None] * ops.stack([query, key, value], axis=2), axis=2),
        "best of the gates": lambda: ops.top_k(gates, 2)[0],
        "classes": lambda: ops.softmax(value),
        "bins": lambda: ops.matmul(ops.softmax(value), bins),
        "softmax over queries": lambda: ops.matmul(ops.softmax(scores, axis=1), value),
        "linear attention": lambda: ops.matmul(query, ops.matmul(ops.transpose(key, (0, 2, 1)), value)),
    }[kind]()
    return keras.Model(inputs, outputs), generator.normal(size=(2, 5, 8)).astype("float32")


def _twice(layer, inputs):
    once = layer(inputs, inputs)
    return layer(once, inputs)


@pytest.mark.parametrize(
    ("kind", "attention"),
    []
    if RUN != "JAX"
    else [
        ("softmax and matmul", 1),
        ("two heads, einsum", 1),
        ("masked after the softmax", 1),
        ("a column more, dropped", 1),
        ("Attention", 1),
        ("AdditiveAttention", 1),
        ("MultiHeadAttention, called twice", 2),
        ("gates", 0),
        ("best of the gates", 0),
        ("classes", 0),
        ("bins", 0),
        ("softmax over queries", 0),
        ("linear attention", 0),
    ],
)
def test_how_often_a_model_attends(kind, attention):
    assert backbones.attention_calls(*by_hand(kind)) == attention
