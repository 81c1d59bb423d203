"""The committed notebooks belong to the code. (That they compute what they show is nbval's part of the run.)"""

import json
import re

import nbformat
import pytest
import yaml

from tools import notebooks

SOURCES = notebooks.sources()
DESCRIBING = ("tags", "alt", "level", "data", "summary")  # what the site takes from a cell's metadata
DATA = {"table", "text", "picture", "time series", "any"}
each_example = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def stored(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def content(cell):
    metadata = {name: value for name, value in cell.metadata.items() if name in DESCRIBING}
    return cell.cell_type, cell.source, metadata


def test_the_examples_of_the_cookbook_are_all_here():
    wanted = {"quickstart", "sequential", "functional", "advanced_config", "medical", "finance", "visualization"}
    assert wanted <= {source.stem for source in SOURCES}
    assert {path.stem for path in notebooks.EXAMPLES.glob("*.ipynb")} == {source.stem for source in SOURCES}


@each_example
def test_notebook_has_the_cells_of_its_source(source):
    expected = [content(cell) for cell in notebooks.from_source(source).cells]
    assert [content(cell) for cell in stored(source).cells] == expected, "run `make notebooks`"


@each_example
def test_notebook_is_fresh(source):
    assert not notebooks.is_stale(source), f"{source.name} or the package has changed: run `make notebooks`"


@each_example
def test_notebook_was_executed_from_top_to_bottom(source):
    counts = [cell.execution_count for cell in stored(source).cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@each_example
def test_notebook_prints_no_warning_and_no_error(source):
    outputs = [output for cell in stored(source).cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [output for output in outputs if "WARNING" in output.get("text", "")]


@each_example
def test_pictures_have_a_description_and_one_is_the_cover(source):
    notebook = stored(source)
    for cell in notebook.cells:
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert cell.metadata.get("alt", "").strip(), f"the figure of this cell needs an alt text:\n{cell.source}"
    assert notebooks.cover(notebook).startswith(b"\x89PNG")


@each_example
def test_recipe_starts_with_title_question_level_and_data_and_ends_with_what_it_does_not_say(source):
    cells = stored(source).cells
    title, question = cells[0].source.split("\n\n")[:2]
    assert title.startswith("# ")
    assert question.startswith("**")
    assert question.endswith("?**")
    assert cells[0].metadata["level"] in ("first steps", "beginner", "intermediate", "advanced")
    assert set(cells[0].metadata["data"].split(", ")) <= DATA
    assert "**It does not say**" in cells[-1].source


@each_example
def test_recipe_says_what_to_replace_for_own_data_by_names_that_are_in_its_code(source):
    cells = stored(source).cells
    prose, code = (
        "\n\n".join(cell.source for cell in cells if cell.cell_type == kind) for kind in ("markdown", "code")
    )
    start = r"(?:\*\*Use your own data:\*\*|^## Use your own data$)"
    names = re.findall(
        r"`([A-Za-z_][\w.]*)`", re.search(rf"{start}(.*?)(?=\n\n\*\*|\Z)", prose, re.DOTALL | re.MULTILINE)[1]
    )
    assert names
    assert [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code)] == []


@each_example
def test_no_line_of_code_scrolls_sideways(source):
    cells = [cell.source for cell in notebooks.from_source(source).cells if cell.cell_type == "code"]
    assert [line for line in "\n".join(cells).splitlines() if len(line) > 88] == []


@each_example
def test_recipe_took_under_20_seconds_when_it_was_last_executed(source):
    assert json.loads(notebooks.RUN_TIMES.read_text())[source.stem] < 20


def test_the_front_picture_is_the_quick_starts():
    assert notebooks.FRONT_PICTURE.read_bytes() == notebooks.cover(stored(notebooks.EXAMPLES / "quickstart.py"))


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_shortest_program_is_the_one_that_makes_the_front_picture(page):
    cells = stored(notebooks.EXAMPLES / "quickstart.py").cells
    (program,) = (cell.source for cell in cells if "program" in cell.metadata.get("tags", []))
    assert program in (notebooks.ROOT / page).read_text()


def test_every_recipe_is_in_the_navigation():
    config = (notebooks.ROOT / "mkdocs.yml").read_text()
    nav = yaml.safe_load(config[config.index("\nnav:") :])["nav"]
    assert {f"recipes/{source.stem}.md" for source in SOURCES} <= set(_leaves(nav))


def _leaves(entry):
    if isinstance(entry, str):
        return [entry]
    return [leaf for child in (entry.values() if isinstance(entry, dict) else entry) for leaf in _leaves(child)]


def test_a_change_of_code_makes_a_notebook_stale_and_a_change_of_docstring_does_not(tmp_path, monkeypatch):
    package = tmp_path / "kerasfactory"
    package.mkdir()
    module = package / "layer.py"
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    notebook = notebooks.from_source(SOURCES[0])

    def fingerprint_with(code):
        module.write_text(code)
        return notebooks.fingerprint(notebook)

    before = fingerprint_with('def f():\n    """Old words."""\n    return 1\n')
    assert fingerprint_with('def f():\n    """New\n\n    words."""\n    return 1\n') == before
    assert fingerprint_with('def f():\n    """Old words."""\n    return 2\n') != before
