"""The built site: strict build, links and anchors, and the API pages against the package."""

import importlib
import pkgutil
import re
import subprocess
import sys
import zlib
from pathlib import Path

import nbformat
import pytest

import kerasfactory
from kerasfactory.explain._audit.schema import RECORD

ROOT = Path(__file__).parents[1]
# Every public package has an API page of its name.
PACKAGES = [
    package.name
    for package in pkgutil.iter_modules(kerasfactory.__path__)
    if package.ispkg and not package.name.startswith("_")
]


def test_links_and_anchors_lead_somewhere(site_url, tmp_path):
    # MkDocs checks links between Markdown files; this also reads raw HTML, pictures and downloads.
    settings = tmp_path / "linkcheckerrc"
    settings.write_text("[checking]\nmaxrequestspersecond=1000\n[AnchorCheck]\n")
    command = [sys.executable, "-m", "linkcheck", f"--config={settings}", "--no-status", "--no-robots"]
    check = subprocess.run([*command, site_url, f"{site_url}404.html"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_repository_lead_to_its_files(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_fields_for_regulated_users_are_those_of_an_audit():
    text = (ROOT / "docs" / "about" / "regulated.md").read_text()
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*)`", text)) - {"id"}  # which a sentence names without its path
    assert set(RECORD) <= named, "the table of fields lacks some"
    for path in named:
        rule = RECORD
        for part in path.split("/"):
            rule = getattr(rule, "rule", rule)  # what may be null
            rule = rule[0] if isinstance(rule, list) else rule
            assert isinstance(rule, dict), path
            assert part in rule, path
            rule = rule[part]


def test_citation_names_the_version():
    assert f"\nversion: {kerasfactory.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"{{{kerasfactory.__version__}}}" in (ROOT / "docs" / "about" / "cite.md").read_text()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_its_api_page(site, package):
    module, page = f"kerasfactory.{package}", f"api/{package}"
    html = (site / page / "index.html").read_text()
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    for name in importlib.import_module(module).__all__:
        assert f'id="{module}.{name}"' in html, f"{name} has no anchor on {page}"
        assert re.search(rf"^{re.escape(module)}\.(\w+\.)?{name} py:(class|function) ", inventory, re.MULTILINE), (
            f"{name} has no entry in the API index: add `::: {module}.{name}.{name}` to docs/{page}.md"
        )


def test_interactive_output_of_a_recipe_is_on_its_page_as_it_is(site):
    fragments = {}
    for path in (ROOT / "examples").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            outputs = [output.get("data", {}) for output in cell.get("outputs", [])]
            html = [data["text/html"] for data in outputs if "text/html" in data]
            if "interactive" in cell.metadata.get("tags", []):
                assert html, f"nothing to embed in {path.name}:\n{cell.source}"
                fragments.setdefault(path.stem, []).extend(html)
    assert "visualization" in fragments
    for recipe, pieces in fragments.items():
        page = (site / "recipes" / recipe / "index.html").read_text()
        for piece in pieces:
            assert piece in page


def test_formulas_are_mathml(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "arithmatex" not in text, f"a formula was left as source on {page}"
        assert not re.search(r"<mi>(&#x029F5;|[a-z]{2,})", text), f"a sign without font, or a slanted name, on {page}"
    assert "<math" in (site / "api/layers/index.html").read_text()
