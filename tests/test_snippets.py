"""Every fenced Python block of the README and the docs, and every docstring example, runs and prints what it says."""

import re
from pathlib import Path

import pytest
from pytest_examples import find_examples

EXAMPLES = [
    example
    for example in find_examples("README.md", "CONTRIBUTING.md", "docs", "kerasfactory")
    if "docs/recipes" not in example.path.as_posix()  # made of the notebooks, which nbval executes
]


def test_there_are_snippets_to_run():
    sources = {example.path.name for example in EXAMPLES}
    assert {"README.md", "index.md", "InterpretableMultiHeadAttention.py", "FeatureTokenizer.py"} <= sources


def test_no_snippet_is_written_in_a_form_that_would_not_be_run():
    texts = [
        Path("README.md"),
        Path("CONTRIBUTING.md"),
        *Path("docs").rglob("*.md"),
        *Path("kerasfactory").rglob("*.py"),
    ]
    assert not [path for path in texts if re.search(r"^\s*(~~~|>>> )", path.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_snippet(example, eval_example):
    eval_example.set_config(line_length=120)
    failure = ""
    try:
        eval_example.run_print_check(example)
    except Exception as error:
        failure = f"{example} raised {type(error).__name__}: {error}"
    # Outside of `except`: pytest 9 cannot format the example's own traceback, and would stop the whole run over it.
    if failure:
        pytest.fail(failure, pytrace=False)
