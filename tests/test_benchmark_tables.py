"""Tables of measurements: what a page shows of a result, and what it says in words."""

import re

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


def of(text):
    """Counts and intervals as a page writes them: in one line each."""
    return re.sub(r"(\d+) of (\d+) \((.*?)–(.*?)\)", r"\1&nbsp;of&nbsp;\2 <small>(\3–&NoBreak;\4)</small>", text)


def test_kinds_of_data_have_a_line_each_and_those_that_err_too_often_are_named():
    header, _, counts, series, _, said = benchmark_tables.TABLES["claims.json kinds"](RESULT)
    assert header.count("|") == counts.count("|") == series.count("|") == 7
    assert of("**counts**<br><small>Feature 0 is a count.</small> | 0.61 | **3 of 200 (0.5–4.3%)**") in counts
    assert of("30 of 400 (5.3–10.5%) | 390 of 400 (95.5–98.6%) | 760 of 800 (93.3–96.3%)") in counts
    assert series.endswith(of("| **60 of 200 (24.1–36.7%)** | – | – | – |"))
    assert "a false “supported” on *series, `block`*, and for a true feature “refuted” on *counts*." in said


def test_where_nothing_errs_too_often_the_words_say_so():
    kinds = [{**RESULT["kinds"][0], "false_refuted": share(1, 400, 0.0, 0.014)}]
    *_, said = benchmark_tables.TABLES["claims.json kinds"]({**RESULT, "kinds": kinds})
    assert said.count("no kind of data") == 2


def test_coverage_of_intervals():
    *_, row = benchmark_tables.TABLES["claims.json coverage"](RESULT)
    assert row == of("| normal | 300 | **188 of 200 (89.8–96.5%)** |")


def read(result, captured, said=(), error=None):
    return {"result": result, "captured": captured, "said": list(said), "error": error}


def test_backbones_say_what_is_read_and_why_the_rest_is_not():
    rows = [
        {"row": "bBackbone", "attention": 2, "results": {"PyTorch": read("complete", 2, error=2e-7)}},
        {"row": "bBackbone, no dropout", "attention": 2, "results": {"PyTorch": read("complete", 2, error=0.0)}},
        {"row": "ABackbone", "attention": 2, "results": {"PyTorch": read("complete", 2, error=0.0)}},
        {"row": "ABackbone, no dropout", "attention": 2, "results": {"PyTorch": read("none", 0, ["it is hidden"])}},
        {
            "row": "CBackbone",
            "attention": 4,
            "results": {"PyTorch": {"failed": "No module"}, "JAX": read("part", 4, ["it is a `Sum`: it sums"])},
        },
        {"row": "DBackbone", "attention": 0, "results": {"PyTorch": read("none", 0, ["it is a `Sum`: it sums"])}},
        {"row": "EBackbone", "attention": 3, "results": {"PyTorch": read("silent", 1)}},
        {"row": "FBackbone", "attention": 0, "results": {"PyTorch": read("no attention", 0)}},
    ]
    result = {"also": {"CBackbone": ["OtherBackbone"]}, "rows": rows}
    assert benchmark_tables.TABLES["backbones.json caption"](result) == [
        "**4 of 5 backbone classes with attention are read, or named with the reason: 2 completely, 1 in part, "
        "1 not at all.**"
    ]
    _, _, *lines = benchmark_tables.TABLES["backbones.json"](result)
    assert lines == [
        "| `A` | 2 | all | 0 |",
        "| `A`, no dropout | 2 | none, named |  |",
        "| `b` | 2 | all | 2e&#8209;07 |",
        "| `C`, `Other` | 4 | does not run on PyTorch; in part, the rest is named on JAX |  |",
        "| `D` | 0 | none, named |  |",
        "| `E` | 3 | **1 of 3** |  |",
        "",
        "- `A`, no dropout: it is hidden.",
        "- `C`, `Other`: on PyTorch, No module.",
        "- `C`, `Other`, `D`: `Sum`: it sums.",
        "- Without attention, and without a false alarm (1): `F`.",
    ]
