"""The built site: strict build, links and anchors, and the API pages against the package."""

import ast
import collections
import html.parser
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import statistics
import subprocess
import sys
import urllib.parse
import zipfile
import zlib
from pathlib import Path

import keras
import nbformat
import pytest

import kerasfactory
from kerasfactory.explain._audit.schema import RECORD

ROOT = Path(__file__).parents[1]
PUBLIC_NAMES = [
    (package.name, name)
    for package in pkgutil.iter_modules(kerasfactory.__path__)
    if package.ispkg and not package.name.startswith("_")
    for name in importlib.import_module(f"kerasfactory.{package.name}").__all__
]


class Links(html.parser.HTMLParser):
    """What a page links to and shows, and the places in it."""

    def __init__(self, path):
        super().__init__()
        self.targets, self.places = [], {"", "top"}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.targets += [given[key] for key in ("href", "src", "poster") if given.get(key)]
        self.places |= {given.get("id"), given.get("name") if tag == "a" else None}


def lost_links(site):
    """The links of all pages, raw HTML and pictures too, that lead to no file or to no place in it."""
    pages = {path.resolve(): Links(path) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for target in page.targets:
            link = urllib.parse.urlsplit(target)
            if link.scheme or link.netloc:
                continue  # elsewhere, or a picture in the page itself
            start = site if link.path.startswith("/") else path.parent
            file = (start / urllib.parse.unquote(link.path).lstrip("/")).resolve() if link.path else path
            file = file / "index.html" if file.is_dir() else file
            has_place = file not in pages or urllib.parse.unquote(link.fragment) in pages[file].places
            if not file.is_file() or not has_place:
                yield f"{path.relative_to(site.resolve())}: {target}"


def test_links_and_anchors_lead_somewhere(site):
    # MkDocs checks links between Markdown files; this also reads raw HTML, pictures and downloads.
    assert list(lost_links(site)) == []


def test_links_that_are_lost_are_noticed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text('<h1 id="there">Other</h1><a href="../#here">back</a>')
    (tmp_path / "index.html").write_text(
        '<a id="here" href="other/#there"></a><a href="https://elsewhere.org/no"></a><a href="/other/"></a>'
        '<a href="other/#no"></a><img src="no.png"><a href="/no/"></a><a href="#no"></a>'
    )
    assert list(lost_links(tmp_path)) == [f"index.html: {target}" for target in ("other/#no", "no.png", "/no/", "#no")]


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


def _article(page):
    """The text of a built page, without tags, its white space made single."""
    article = re.search(r"<article.*?</article>", page.read_text(), flags=re.DOTALL)[0]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", article)).split())


def _places(site):
    """Where the pages of the public names are, as the site tells other sites."""
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    return {line.split()[0]: line.split()[3].partition("#")[0] for line in inventory.splitlines()}


@pytest.mark.parametrize(("package", "name"), PUBLIC_NAMES)
def test_every_public_name_has_a_page(site, package, name):
    places = _places(site)
    # A layer has a file of its name, and is known by that.
    place = places.get(f"kerasfactory.{package}.{name}") or places[f"kerasfactory.{package}.{name}.{name}"]
    page = (site / place / "index.html").read_text()
    short = name if package == "layers" else f"{package}.{name}"
    assert re.sub(r"<[^>]*>", "", re.search(r"<h1.*?</h1>", page, flags=re.DOTALL)[0]).split() == [short, "&para;"]
    assert f'id="kerasfactory.{package}.{name}"' in page
    source = re.search(r"Source: <code>(kerasfactory/[\w/]+\.py)</code>", page)[1]
    assert re.search(rf"^(def|class) {name}\b", (ROOT / source).read_text(), re.MULTILINE)
    overview = (site / "api" / package / "index.html").read_text()
    assert f'<tr id="kerasfactory.{package}.{name}">' in overview, "its address before it had a page of its own"
    assert f'href="{place.removeprefix(f"api/{package}/")}#kerasfactory.{package}.{name}"' in overview


@pytest.mark.parametrize(("package", "name"), PUBLIC_NAMES)
def test_every_public_name_is_used_in_a_recipe(site, package, name):
    places = _places(site)
    place = places.get(f"kerasfactory.{package}.{name}") or places[f"kerasfactory.{package}.{name}.{name}"]
    _, _, recipes = (site / place / "index.html").read_text().partition('id="recipes-that-use-it"')
    assert re.search(r'<li><a href="../../../recipes/\w+/">', recipes), f"no recipe uses {package}.{name}"


def test_the_page_of_a_name_lists_the_recipes_whose_code_uses_it(site):
    for name, words in {"explain/rollout": "explain.rollout(", "plot/text": "plot.text("}.items():
        users = set()
        for path in (ROOT / "examples").glob("*.ipynb"):
            cells = nbformat.read(path, as_version=4).cells
            if any(words in cell.source for cell in cells if cell.cell_type == "code"):
                users.add(path.stem)
        _, _, recipes = (site / "api" / name / "index.html").read_text().partition('id="recipes-that-use-it"')
        assert set(re.findall(r'<li><a href="../../../recipes/(\w+)/">', recipes)) == users


def test_arguments_that_the_layer_passes_on_are_described_with_their_defaults(site):
    text = _article(site / "api" / "layers" / "InterpretableMultiHeadAttention" / "index.html")
    described = text[text.index("Other Parameters") : text.index("Call arguments")]
    for name, parameter in inspect.signature(keras.layers.MultiHeadAttention.__init__).parameters.items():
        if name not in {"self", "kwargs", "num_heads", "key_dim", "dropout"}:
            default = json.dumps(parameter.default) if isinstance(parameter.default, str) else str(parameter.default)
            assert re.search(rf"\b{name} – [^–]*Defaults to {re.escape(default)}(?!\w)", described), name


def test_every_text_that_is_raised_is_on_the_page_of_errors(site):
    text = _article(site / "help" / "errors" / "index.html").replace("`", "").replace("¶", "")
    for path in (ROOT / "kerasfactory").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.search(r"(Error|\bwarn)$", ast.unparse(node.func)) and node.args:
                said = node.args[0]
                for part in said.values if isinstance(said, ast.JoinedStr) else [said]:
                    words = " ".join(str(getattr(part, "value", "")).replace("`", "").split())
                    if isinstance(part, ast.Constant) and len(words) > 12 and not words.startswith(". Received"):
                        # The first sentence is a heading, the rest stands below.
                        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", words):
                            is_echo = re.fullmatch(r"Received: \S*", sentence)  # of what was given: it says nothing
                            assert is_echo or sentence in text, f"{path.name}, line {node.lineno}"


def _pages(site):
    """The text of each page, by its place."""
    return {str(path.parent.relative_to(site)): path.read_text() for path in sorted(site.rglob("index.html"))}


def _tags(page):
    """What a page says of itself in its head."""
    return dict(re.findall(r'<meta (?:name|property)="([\w:]+)" content="([^"]*)">', page))


def test_every_page_describes_itself_and_has_a_preview(site):
    described = {}
    for place, page in _pages(site).items():
        tags = _tags(page)
        assert tags["og:title"], place
        assert html.unescape(tags["og:description"]) == html.unescape(tags["description"]), place
        described.setdefault(tags["description"], []).append(place)
        assert (site / place / tags["og:image"]).resolve().is_file(), place
        if cover := re.search(r'<img [^>]*class="figure cover" [^>]*?src="([^"]*)"', page):
            assert tags["og:image"] == cover[1], place
    assert not {places[0]: places for places in described.values() if len(places) > 1}, "one description for several"


@pytest.fixture(scope="module")
def public_site(tmp_path_factory):
    """The site as it is built for a public address."""
    folder = tmp_path_factory.mktemp("public")
    addresses = {"SITE_URL": "https://example.org/docs/", "SOURCE_URL": "https://github.com/someone/kerasfactory"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    subprocess.run(command, check=True, env=os.environ | addresses)
    yield folder
    # The recipes' pages were written with these addresses, and are written again by whoever builds next.
    shutil.rmtree(ROOT / "docs" / "recipes")


def test_addresses_appear_once_they_are_configured(site, public_site):
    pages, public = _pages(site), _pages(public_site)
    assert set(pages) == set(public)
    for place, page in public.items():
        address = f"https://example.org/docs/{place}/".replace("/./", "/")
        assert f'<link rel="canonical" href="{address}">' in page
        assert _tags(page)["og:url"] == address
        assert _tags(page)["og:image"].startswith("https://example.org/docs/")
        edited = re.search(r'"https://github.com/someone/kerasfactory/edit/main/([^"]+)"', page)[1]
        assert (ROOT / edited).is_file(), f"{place} is made of {edited}, which is not there"
        assert "https://github.com/someone/kerasfactory/issues/new?" in page
        colab = (
            f"https://colab.research.google.com/github/someone/kerasfactory/blob/main/examples/{Path(place).name}.ipynb"
        )
        assert (colab in page) == (place.startswith("recipes/")), place
        for sign in ('rel="canonical"', "og:url", "Edit this page", "colab.research"):
            assert sign not in pages[place], place
    for of, address in ((site, "ADDRESS"), (public_site, "https://github.com/someone/kerasfactory")):
        assert f"git clone {address} kerasfactory" in _article(of / "start" / "install" / "index.html")
    locations = re.findall(r"<loc>(.*?)</loc>", (public_site / "sitemap.xml").read_text())
    assert {f"https://example.org/docs/{place}/".replace("/./", "/") for place in public} == set(locations)


def test_language_models_get_every_page(site, public_site):
    index, texts = (site / "llms.txt").read_text(), (site / "llms-full.txt").read_text()
    assert index.startswith("# kerasfactory\n\n> ")
    for place in _pages(site):
        address = f"/{place}/".replace("/./", "/")
        assert re.search(rf"^- \[.+\]\({re.escape(address)}\): .+", index, re.MULTILINE), place
        assert f"Address: {address}\n" in texts
    assert "](https://example.org/docs/start/install/)" in (public_site / "llms.txt").read_text()
    assert "\n:::" not in texts, "a docstring is missing"
    assert "{{" not in re.sub(r"```.*?```|`[^`]*`", "", texts, flags=re.DOTALL)
    assert "From the layer's name to its scores" in texts  # a docstring
    assert not re.search(r"\]\((?!/|#|\w+:)[^)]*\.md", texts), "a link that needs a page around it"


def test_archive_of_the_notebooks_is_always_the_same(site, public_site):
    path = Path("recipes") / "downloads" / "notebooks.zip"
    with zipfile.ZipFile(site / path) as archive:
        notebooks = {Path(name).name: archive.read(name) for name in archive.namelist()}
    assert notebooks == {file.name: file.read_bytes() for file in (ROOT / "examples").glob("*.ipynb")}
    assert (site / path).read_bytes() == (public_site / path).read_bytes()


def _weights(site, place, page):
    """Bytes of what a page loads before somebody does something, but for what is searched, by the kind of file."""
    files = re.findall(r'<(?:script|img|link)\b[^>]*? (?:src|href)="([^"?#]+\.(?:css|js|svg|png))', page)
    files = {(site / place / file).resolve() for file in files}
    files |= {*(site / "assets" / "javascripts" / "workers").glob("search*.js"), site / "assets" / "search.js"}
    weights = collections.Counter({"page": len(page.encode())})
    for file in files:
        weights[file.suffix] += file.stat().st_size
    return weights


def test_pages_are_light(site):
    weights = {place: _weights(site, place, page) for place, page in _pages(site).items()}
    assert statistics.median(weight.total() for weight in weights.values()) < 700_000
    assert weights["recipes"][".png"] < 700_000, "the pictures of the gallery: run `make notebooks`"
    assert (site / "search" / "search_index.json").stat().st_size < 1_000
    gallery = (site / "recipes" / "index.html").read_text()
    at_once = [image for image in re.findall(r"<img [^>]*>", gallery) if 'loading="lazy"' not in image]
    assert len(at_once) <= 5  # with two logos


def test_code_in_one_piece_is_what_the_script_runs(site):
    for script in (site / "recipes" / "downloads").glob("*.py"):
        page = (site / "recipes" / script.stem / "index.html").read_text()
        piece = re.search(r'<details class="example">.*?<code>(.*?)</code>', page, flags=re.DOTALL)[1]
        code = html.unescape(re.sub(r"<[^>]*>", "", piece))
        assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(script.read_text())), script.name


def test_interactive_output_of_a_recipe_is_on_its_page_as_it_is(site):
    fragments = {}
    for path in (ROOT / "examples").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            outputs = [output.get("data", {}) for output in cell.get("outputs", [])]
            pieces = [data["text/html"] for data in outputs if "text/html" in data]
            if "interactive" in cell.metadata.get("tags", []):
                assert pieces, f"nothing to embed in {path.name}:\n{cell.source}"
                fragments.setdefault(path.stem, []).extend(pieces)
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
    assert "<math" in (site / "api/layers/InterpretableMultiHeadAttention/index.html").read_text()
