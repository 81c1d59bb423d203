"""What MkDocs runs around a build: executed examples become recipe pages, formulas become MathML."""

import base64
import hashlib
import html
import itertools
import json
import posixpath
import re
import struct
from collections.abc import Callable
from pathlib import Path

import for_machines  # beside this file, where MkDocs lets a hook look
import nbformat
import raised_texts
import reference
import yaml
from benchmark_tables import table
from latex2mathml.converter import convert
from markdown.extensions.toc import slugify
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter
from notebooks import DOTS_PER_INCH, EXAMPLES, ROOT, RUN_TIMES, cover

RECIPES = ROOT / "docs" / "recipes"
_LONG = 40  # characters in the cell of a table: on a phone, several columns of such cells are too narrow to be read
COLUMNS = 88  # of code and of what it prints, for which a page has room

_command = "build"
_titles: dict[str, str] = {}  # of the recipes, in the order of the navigation
_texts: dict[str, str] = {}  # of all pages, by their addresses, as Markdown
_nav = None


def on_startup(command, **_):
    """MkDocs says whether it builds the site or serves it."""
    global _command
    _command = command


def on_config(config):
    """Write the recipe pages, in the order of the navigation, before MkDocs collects its files."""
    _complete(config.nav)
    names = [Path(page).stem for page in _pages(config.nav) if page.startswith("recipes/")]
    names.remove("index")
    RECIPES.mkdir(exist_ok=True)
    run_times = json.loads(RUN_TIMES.read_text())
    recipes = [{**_read(name), "seconds": run_times[name]} for name in names]
    _titles.clear()
    _titles.update({recipe["name"]: recipe["title"] for recipe in recipes})
    written = {_write(RECIPES / "index.md", _gallery(recipes, _tasks(config.nav)))}
    notebooks = [EXAMPLES / f"{name}.ipynb" for name in names]
    written.add(_write(RECIPES / "downloads" / "notebooks.zip", for_machines.bundle(notebooks)))
    for recipe in recipes:
        text = _page(recipe, config.extra["source_url"])
        written.add(_write(RECIPES / f"{recipe['name']}.md", text))
        for path, content in recipe["pictures"].items():
            written.add(_write(RECIPES / path, content))
        for suffix in (".ipynb", ".py"):
            source = EXAMPLES / f"{recipe['name']}{suffix}"
            written.add(_write(RECIPES / "downloads" / source.name, source.read_bytes()))
    for path in RECIPES.rglob("*"):
        if path.is_file() and path not in written:
            path.unlink()
    return config


def on_files(files, config):
    """Pages that are in no file."""
    for path, text in reference.pages(_titles):
        files.append(File.generated(config, path, content=text))
    return files


def on_nav(nav, **_):
    """The order of the pages."""
    global _nav
    _nav = nav


def on_page_markdown(markdown, page, config, **_):
    """Numbers of a benchmark come from its result, and files of the repository are shown as they are."""
    markdown = reference.overview(markdown)
    markdown = re.sub(r"\{\{ raised by (\w+) \}\}", lambda match: raised_texts.section(match[1]), markdown)
    markdown = re.sub(r"\{\{ benchmarks/(.*?) \}\}", lambda match: table(match[1]), markdown)
    markdown = markdown.replace("{{ clone }}", for_machines.clone(config.extra["source_url"]))
    markdown = re.sub(r"\{\{ file (\S+) \}\}", lambda match: _file(match[1], page.file.src_uri), markdown)
    if "description" in page.meta:  # which the theme puts into an attribute as it is
        page.meta["description"] = html.escape(html.unescape(page.meta["description"]))
    _texts[page.url] = for_machines.plain(markdown, page)
    return markdown


def on_page_context(context, page, **_):
    """A list of contents as long as the page is no help. The search, which reads it, was here before."""
    if not for_machines.PUBLIC:
        page.canonical_url = None
    if page.file.src_uri == "help/errors.md":
        for entry in page.toc.items[0].children:
            entry.children = []
    if page.file.src_uri == "recipes/index.md":  # which names its tasks itself
        page.toc.items[0].children = []
    return context


def on_page_content(content, page, config, **_):
    """Finish what Markdown cannot say: formulas, boxes that scroll, the size of a picture before it is there."""
    content = re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', _mathml, content, flags=re.DOTALL)
    content = re.sub(r"<table>.*?</table>", _table, content, flags=re.DOTALL)
    content = re.sub(r'<img (?=[^>]*src="(\S+\.png)")', lambda match: match[0] + _size(page.url, match[1]), content)
    # A phone shows a wide figure at a size at which its letters can be read, in a box that scrolls. It leads to itself.
    figure = r'<img (?=[^>]*class="figure)[^>]*src="(\S+)"[^>]*>'
    content = re.sub(figure, r'<a class="enlarge" href="\1">\g<0></a>', content)
    content = content.replace(
        '<details class="mkdocstrings-source"', '<details class="mkdocstrings-source" data-search-exclude'
    )
    # A long name breaks between its words.
    name = r'(<h1 [^>]*class="doc doc-heading">\s*)([\w.]+)'
    content = re.sub(name, lambda match: match[1] + re.sub("(?<=[a-z])(?=[A-Z])", "<wbr>", match[2]), content)
    # A name for links to point at is not itself a link.
    content = re.sub(r'<a href="" (id="[^"]+"></a>)', r"<a \1", content)
    content = _lazy(content) + for_machines.invitation(page.file.src_uri, config.extra["source_url"])
    printed = r'<div class="([^"]*highlight)">(<span class="filename">Output<.*?</pre>)'
    return re.sub(printed, _printed, content, flags=re.DOTALL)


def on_post_page(output, page=None, config=None, **_):
    """Say in each page what may run and load in it: what the site brings itself, and nothing else."""
    tags = for_machines.head(page, config) if page else '<meta name="robots" content="noindex">'
    output = _replaced(output, "</head>", lambda match: f"{tags}\n</head>")
    output = _replaced(output, r'("search": "[^"]*?)(javascripts/workers/search\.\w+\.min\.js)"', r'\1search.js?\2"')
    if page and re.fullmatch(r"api/\w+\.md", page.file.src_uri):
        output = reference.with_anchors(output)
    if _command == "serve":  # which puts a script of its own into each page afterward
        return output
    head = '<meta charset="utf-8">'
    return output.replace(head, f'{head}\n<meta http-equiv="Content-Security-Policy" content="{_policy(output)}">', 1)


def on_post_template(output, template_name, **_):
    """The page that stands where there is none is no page to MkDocs, nor is the map of the site."""
    return on_post_page(output) if template_name.endswith(".html") else output


def on_post_build(config):
    """Give the search what people type: see `tools/keywords.yml`. Write the site for language models."""
    path = Path(config.site_dir) / "search" / "search_index.json"
    index, keywords = json.loads(path.read_text()), yaml.safe_load((ROOT / "tools" / "keywords.yml").read_text())
    places = {_place(page): words for page, words in keywords.items()}
    for entry in index["docs"]:
        if entry["location"] in places:
            entry["keywords"] = places.pop(entry["location"])
    if places:
        raise PluginError(f"tools/keywords.yml names pages that are not there: {', '.join(map(repr, places))}")
    # They weigh more than a page. `docs/assets/search.js` loads them with the first question.
    path.with_name("documents.json").write_text(json.dumps(index.pop("docs"), separators=(",", ":")))
    path.write_text(json.dumps({**index, "docs": []}))
    texts = {page.url: _texts[page.url] for page in _nav.pages}
    (Path(config.site_dir) / "llms.txt").write_text(for_machines.llms(_nav.pages, config))
    (Path(config.site_dir) / "llms-full.txt").write_text(for_machines.llms_full(texts))


def _place(page: str) -> str:
    """Where a page is on the site."""
    return re.sub(r"(^|/)index\.md$|\.md$", "/", page).removeprefix("/")


def _replaced(output: str, pattern: str, by: str | Callable) -> str:
    """The theme's HTML with one thing replaced; an error if the theme has changed."""
    output, count = re.subn(pattern, by, output)
    if count != 1:
        raise PluginError(f"The theme's pages hold {pattern} {count} times instead of once.")
    return output


def _policy(page: str) -> str:
    """Scripts and styles that stand in the page itself are allowed one by one, by their hashes."""
    # A frame obeys the policy of the page that it stands in.
    parts = [page, *map(html.unescape, re.findall(r'<iframe [^>]*srcdoc="([^"]*)"', page))]

    def hashes(pattern):
        found = {text for part in parts for text in re.findall(pattern, part, flags=re.DOTALL)}
        digests = sorted(hashlib.sha256(text.encode()).digest() for text in found)
        return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]

    attributes = hashes(r'<[^>]* style="([^"]*)"')
    if attributes:
        attributes = ["'unsafe-hashes'", *attributes]  # without it the hash of an attribute does not count
    rules = {
        "default-src": ["'none'"],
        "script-src": ["'self'", *hashes(r"<script>(.*?)</script>")],
        "style-src": ["'self'", *hashes(r"<style>(.*?)</style>"), *attributes],
        "img-src": ["'self'", "data:"],
        "connect-src": ["'self'"],
        "worker-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    return "; ".join(" ".join([name, *sources]) for name, sources in rules.items())


def _file(name: str, page: str) -> str:
    """A file at the top of the repository: code, or a text without its title, whose links work from this page."""
    text = (ROOT / name).read_text().strip()
    if not name.endswith(".md"):
        return f"```yaml\n{text}\n```"
    start = posixpath.relpath(".", posixpath.dirname(page))
    text = re.sub(r"\]\(docs/", f"]({start}/", text)
    return text.partition("\n")[2].strip()


def _complete(nav):
    """Put the pages of the reference behind the overview of their package."""
    for entry in nav:
        for title, target in entry.items():
            if isinstance(target, list):
                _complete([child for child in target if isinstance(child, dict)])
            elif match := re.fullmatch(r"api/(\w+)\.md", target):
                pages = [{name.short: name.page} for name in reference.in_order(match[1])]
                entry[title] = [{"Overview": target}, *pages]


def _tasks(nav) -> dict[str, list[str]]:
    """The names of the recipes for each task, as the navigation groups them."""
    (groups,) = (entry["Recipes"] for entry in nav if "Recipes" in entry)
    tasks = {task: pages for group in groups for task, pages in group.items() if isinstance(pages, list)}
    return {task: [Path(page).stem for page in pages] for task, pages in tasks.items()}


def _pages(nav):
    for entry in nav:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [target] if isinstance(target, str) else _pages(target)


def _mathml(match):
    """The browser itself draws formulas: no script, no font, no other host."""
    latex = html.unescape(match[2]).strip()
    latex = latex.removeprefix(r"\(").removesuffix(r"\)").removeprefix(r"\[").removesuffix(r"\]")
    latex = latex.replace(
        r"\setminus", r"\mathrm{\backslash}"
    )  # the sign that it is converted to is in hardly any font
    display = "inline" if match[1] == "span" else "block"
    # A name of several letters, such as ln, is upright, and apart from what follows.
    mathml = re.sub(r"<mi>([a-z]{2,})</mi>", r'<mi mathvariant="normal">\1</mi>', convert(latex, display=display))
    mathml = re.sub(r'(?<!<msub>)(<mi mathvariant="normal">\w+)(?=</mi>)', r"\1&#x2009;", mathml)
    return mathml if display == "inline" else _scrolling("Formula", mathml)


def _table(match):
    head, _, body = match[0].partition("</thead>")
    heads, cells = (
        [
            html.unescape(re.sub(r"<[^>]+>", "", text))
            for text in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", part, flags=re.DOTALL)
        ]
        for tag, part in (("th", head), ("td", body))
    )
    if len(heads) > 2 and max(map(len, cells)) > _LONG:  # a phone shows each cell with its head, below each other
        head = head.replace("<table>", '<table data-wide="">')
        names = itertools.cycle(heads)
        body = re.sub(r"<td\b", lambda cell: f'{cell[0]} data-head="{html.escape(next(names))}"', body)
    head = re.sub(r"<th( [^>]*)?></th>", r"<td\1></td>", head)  # an empty cell is the header of nothing
    return _scrolling("Table: " + ", ".join(filter(None, heads)), f"{head}</thead>{body}")


def _scrolling(name: str, content: str) -> str:
    """A box that scrolls sideways on a narrow screen, also with the keyboard, which needs the focus for it."""
    name = html.escape(html.unescape(name))
    return f'<div class="scroll" role="group" aria-label="{name}" tabindex="0">{content}</div>'


def _printed(match) -> str:
    """What code printed. Columns tell a table, which a narrow screen does not break into lines."""
    lines = html.unescape(re.sub(r"<.*?>", "", match[2].partition("<code>")[2])).splitlines()
    columns = any(re.search(r"\S {2,}\S", line) for line in lines)
    aligned = " aligned" * (columns and max(map(len, lines)) <= COLUMNS)
    return f'<div class="{match[1]} output no-copy{aligned}">{match[2]}'


def _lazy(content: str) -> str:
    """Pictures are loaded as a reader comes near them, but for the first few, which may be in the first view."""
    numbers = itertools.count()
    first = 3 if "gallery" in content else 1
    return re.sub(r"<img ", lambda match: match[0] + 'loading="lazy" ' * (next(numbers) >= first), content)


def _size(url: str, picture: str) -> str:
    """Width and height, from the head of the PNG file: the page then does not jump when the picture arrives.

    In the browser's pixels, so that a figure is as large as it was drawn, and its letters as those of the text.
    """
    path = ROOT / "docs" / posixpath.normpath(posixpath.join(url, picture))
    if not path.is_file():
        return ""  # MkDocs says what is missing
    width, height = (round(96 / DOTS_PER_INCH * number) for number in _dots(path.read_bytes()))
    return f'width="{width}" height="{height}" style="--drawn: {width}px" '


def _dots(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG file."""
    return struct.unpack(">II", picture[16:24])


def _write(path: Path, content: str | bytes) -> Path:
    """Write only what differs: `mkdocs serve` watches this folder, and would build forever."""
    content = content.encode() if isinstance(content, str) else content
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


def _read(name: str) -> dict:
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    exporter = MarkdownExporter(template_name="recipe", extra_template_basedirs=[str(ROOT / "tools" / "templates")])
    head = notebook.cells[0]
    title, question, answer, introduction = (head.source.removeprefix("# ") + "\n\n").split("\n\n", 3)
    (cover_cell,) = (cell for cell in notebook.cells if "cover" in cell.metadata.get("tags", []))
    code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    body, resources = exporter.from_notebook_node(
        nbformat.from_dict({**notebook, "cells": notebook.cells[1:]}),
        resources={"unique_key": name, "output_files_dir": f"{name}_files"},
    )
    pictures = resources["outputs"]
    return {
        "name": name,
        "title": title,
        "question": question.strip("*"),
        "answer": answer,
        "introduction": introduction.strip(),
        "level": head.metadata["level"],
        "data": head.metadata["data"],
        "versions": notebook.metadata["kerasfactory"],
        "body": _for_site(body),
        "code": code,
        "pictures": pictures,
        "cover": next(path for path, picture in pictures.items() if picture == cover(notebook)),
        "alt": cover_cell.metadata["alt"],
    }


def _for_site(text: str) -> str:
    """Names of the API become links to it, links between notebooks links between pages; not in what was printed."""
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)
    for name in reference.NAMES.values():
        code = re.escape(name.short)
        # A notebook by itself can lead to a page of the repository, which lists all names.
        called = rf"\[`{code}`\]\(\.\./api/\w+\.md\)|(?<!\[)`{code}`"
        parts[::2] = [re.sub(called, f"[`{name.short}`][{name.path}]", part) for part in parts[::2]]
    parts[::2] = [re.sub(r"\]\((\w+)\.ipynb", r"](\1.md", part) for part in parts[::2]]
    return "".join(parts)


def _without_links(text: str) -> str:
    """The same words in one line."""
    return re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text).replace("\n", " ")


def _page(recipe: dict, source_url: str) -> str:
    backend = (re.findall(r'"KERAS_BACKEND": "(\w+)"', recipe["code"]) or ["tensorflow"])[0]
    versions = ", ".join(f"{name} {recipe['versions'][name]}" for name in ("keras", backend, "numpy"))
    code = "\n".join(f"    {line}".rstrip() for line in recipe["code"].splitlines())
    return f"""---
title: "{recipe["title"]}"
description: "{re.sub("[`*]", "", _without_links(recipe["answer"]))}"
image: recipes/{recipe["cover"]}
---
# {recipe["title"]}

<p class="question" markdown>{recipe["question"]}</p>

{_for_site(recipe["answer"])}

![{recipe["alt"]}]({recipe["cover"]}){{ .figure .cover }}

<p class="facts" markdown>
Level: {recipe["level"]} · data: {recipe["data"]} · runs in about {recipe["seconds"]} s on two cores · verified with
{versions}
</p>

<p class="downloads" markdown>
[Notebook (.ipynb)](downloads/{recipe["name"]}.ipynb){{ download="{recipe["name"]}.ipynb" }}
[Script (.py)](downloads/{recipe["name"]}.py){{ download="{recipe["name"]}.py" }}
{for_machines.colab(recipe["name"], source_url)}
</p>

{_for_site(recipe["introduction"])}

??? example "All the code in one piece"
    ```python
{code}
    ```

{recipe["body"].strip()}
"""


def _gallery(recipes: list[dict], tasks: dict[str, list[str]]) -> str:
    cards = {recipe["name"]: _card(recipe) for recipe in recipes}
    if sorted(name for names in tasks.values() for name in names) != sorted(cards):
        raise PluginError("In mkdocs.yml, each recipe must be under one task.")
    grids = [
        "\n\n".join([f"## {task}", '<div class="grid cards gallery" markdown>', *map(cards.get, names), "</div>"])
        for task, names in tasks.items()
    ]
    return f"""---
title: Recipes
description: All recipes. Each asks one question of a model's attention and answers it with a number and a picture.
hide:
  - toc
---
# Recipes

Each recipe asks one question, answers it with a number and a picture, and says where the picture misleads. Each is an
executed notebook: our tests run it again and compare every printed number. Start with the group that fits your data or
your task.

{" · ".join(f"[{task}](#{slugify(task, '-')})" for task in tasks)}

<p class="downloads" markdown>
[All notebooks (.zip)](downloads/notebooks.zip){{ download="kerasfactory-notebooks.zip" }}
</p>

{chr(10).join(grid + chr(10) for grid in grids)}"""


def _card(recipe: dict) -> str:
    width, height = _dots(recipe["pictures"][recipe["cover"]])
    shape = " .tall" * (height > width)  # of which a card shows the upper part
    return f"""-   [![]({recipe["cover"]})]({recipe["name"]}.md){{ .thumbnail{shape} tabindex="-1" aria-hidden="true" }}

    **[{recipe["title"]}]({recipe["name"]}.md)**

    {_without_links(recipe["answer"])}

    <small>{recipe["level"]} · {recipe["data"]} · runs in about {recipe["seconds"]} s</small>"""
