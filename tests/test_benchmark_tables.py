"""Tables of measurements: what a page shows of a result, and what it says in words."""

import pytest

from tools import benchmark_tables

pytestmark = pytest.mark.backend_independent


def share(count, of, low, high):
    return {"count": count, "of": of, "interval": [low, high]}


RESULT = {
    "level": 0.05,
    "kinds": [
        {
            "process": "counts",
            "what": "Feature 0 is a count.",
            "skill": 0.613,
            "false_models": share(3, 200, 0.005, 0.043),
            "false_refuted": share(30, 400, 0.053, 0.105),
            "power": share(390, 400, 0.955, 0.986),
            "coverage": share(760, 800, 0.933, 0.963),
        },
        {
            "process": "series, `block`",
            "what": "Rows follow each other.",
            "skill": -0.2,
            "false_models": share(60, 200, 0.241, 0.367),
        },
    ],
    "coverage": [{"effect": "normal", "samples": 300, "covered": share(188, 200, 0.898, 0.965)}],
}


def test_kinds_of_data_have_a_line_each_and_those_that_err_too_often_are_named():
    header, _, counts, series, _, said = benchmark_tables.TABLES["claims.json kinds"](RESULT)
    assert header.count("|") == counts.count("|") == series.count("|") == 7
    assert "**counts**<br><small>Feature 0 is a count.</small> | 0.61 | **3 of 200 (0.5–4.3 %)**" in counts
    assert "30 of 400 (5.3–10.5 %) | 390 of 400 (95.5–98.6 %) | 760 of 800 (93.3–96.3 %)" in counts
    assert series.endswith("| **60 of 200 (24.1–36.7 %)** | – | – | – |")
    assert "a false “supported” on *series, `block`*, and for a true feature “refuted” on *counts*." in said


def test_where_nothing_errs_too_often_the_words_say_so():
    kinds = [{**RESULT["kinds"][0], "false_refuted": share(1, 400, 0.0, 0.014)}]
    *_, said = benchmark_tables.TABLES["claims.json kinds"]({**RESULT, "kinds": kinds})
    assert said.count("no kind of data") == 2


def test_coverage_of_intervals():
    *_, row = benchmark_tables.TABLES["claims.json coverage"](RESULT)
    assert row == "| normal | 300 | **188 of 200 (89.8–96.5 %)** |"


def read(result, captured, said=(), error=None):
    return {"result": result, "captured": captured, "said": list(said), "error": error}


def test_backbones_say_what_is_read_and_what_is_left_out_in_silence():
    rows = [
        {"row": "BertBackbone", "attention": 2, "results": {"PyTorch": read("complete", 2, error=2e-7)}},
        {"row": "BertBackbone, no dropout", "attention": 2, "results": {"PyTorch": read("complete", 2, error=0.0)}},
        {"row": "GPT2Backbone", "attention": 2, "results": {"PyTorch": read("complete", 2, error=0.0)}},
        {"row": "GPT2Backbone, no dropout", "attention": 2, "results": {"PyTorch": read("none", 0, ["it is hidden"])}},
        {
            "row": "QwenBackbone",
            "attention": 4,
            "results": {"PyTorch": {"failed": "No module"}, "JAX": read("part", 1)},
        },
        {"row": "VGGBackbone", "attention": 0, "results": {"PyTorch": read("no attention", 0, ["it has none"])}},
    ]
    result = {"also": {"QwenBackbone": ["Qwen2Backbone"]}, "rows": rows}
    said, _, _, _, *lines = benchmark_tables.TABLES["backbones.json"](result)
    assert said.startswith(
        "Of 3 backbone classes that attend, 2 are read completely, 1 in part, 0 not at all. 1 do not"
    )
    assert said.endswith("`VGG`.")
    assert lines == [
        "| `Bert` | 2 | all |  |  | 2e-07 |",
        "| `GPT2` | 2 | all |  |  | 0 |",
        "| `GPT2`, no dropout | 2 | none |  |  |  |",
        "| `Qwen`, `Qwen2` | 4 | does not run | 1 of 4, in silence |  |  |",
        "",
        "- *it is hidden* `GPT2`, no dropout",
        "- *No module* `Qwen`, `Qwen2`",
    ]
