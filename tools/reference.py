"""The reference: one page for each public name, with the recipes that use it, from the code itself."""

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import griffe
from notebooks import EXAMPLES, ROOT

_PREFIXES = {"layers": "", "explain": "explain.", "plot": "plot."}
_TABLE = re.compile(r"^\{\{ reference (.+?) \}\}$", re.MULTILINE)


class Name(NamedTuple):
    """What people import, and where its code is."""

    package: str
    name: str
    code: griffe.Object

    @property
    def path(self) -> str:
        """As people import it."""
        return f"kerasfactory.{self.package}.{self.name}"

    @property
    def short(self) -> str:
        """As people write it in their code."""
        return _PREFIXES[self.package] + self.name

    @property
    def page(self) -> str:
        """The file of its page. `Audit` and `audit` are one name to some file systems."""
        name = f"{self.name}-class" if self.name == "Audit" else self.name
        return f"api/{self.package}/{name}.md"

    @property
    def source(self) -> str:
        """The file of its code, in the repository."""
        return self.code.filepath.relative_to(ROOT).as_posix()

    @property
    def sentence(self) -> str:
        """The first sentence of its docstring."""
        return self.code.docstring.value.partition("\n\n")[0].replace("\n", " ")


def _names() -> Iterator[Name]:
    for package in _PREFIXES:
        module = griffe.load(f"kerasfactory.{package}", search_paths=[ROOT], allow_inspection=False)
        for name in module.exports:
            member = module[name]
            # The file of a layer has the layer's name.
            yield Name(package, name, member[name] if member.is_module else member.final_target)


NAMES = {name.short: name for name in _names()}


def overview(markdown: str) -> str:
    """A page with its tables: `{{ reference NAME NAME }}` is one, with a line for each name."""
    return _TABLE.sub(lambda match: _table([NAMES[name] for name in match[1].split()]), markdown)


def _table(names: list[Name]) -> str:
    rows = [f"| [`{name.short}`][{name.path}] | {name.sentence} |" for name in names]
    return "\n".join(["| name | what it does |", "|---|---|", *rows])


def with_anchors(page: str) -> str:
    """The rows of a table have the names that stood on this page when it was all of the reference."""
    return re.sub(r'<tr>(?=\s*<td><a [^>]*href="[^"]*#(kerasfactory\.\w+\.\w+)")', r'<tr id="\1">', page)


def in_order(package: str) -> list[Name]:
    """The names of a package, as its page lists them."""
    text = (ROOT / "docs" / "api" / f"{package}.md").read_text()
    return [NAMES[name] for names in _TABLE.findall(text) for name in names.split()]


def pages(recipes: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The path and the text of each page. `recipes` are titles, by the names of the examples."""
    used = {recipe: used_in(EXAMPLES / f"{recipe}.py") for recipe in recipes}
    for name in NAMES.values():
        users = [f"- [{title}](../../recipes/{recipe}.md)" for recipe, title in recipes.items() if name in used[recipe]]
        yield name.page, _page(name, users)


def used_in(example: Path) -> set[Name]:
    """What the code of an example uses, and the classes of ours that it is given by what it calls."""
    tree, used = ast.parse(example.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in {f"kerasfactory.{package}" for package in _PREFIXES}:
            package = node.module.rpartition(".")[2]
            used |= {NAMES[_PREFIXES[package] + alias.name] for alias in node.names}
        elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)) in NAMES:
            used.add(NAMES[name])
    given = {str(name.code.returns) for name in used if name.code.is_function}
    return used | {name for name in NAMES.values() if name.code.is_class and name.name in given}


def _page(name: Name, users: list[str]) -> str:
    description = html.escape(re.sub(r"[`*]|\[(.+?)\]\(.+?\)", r"\1", name.sentence))
    return f"""---
title: {name.short}
description: "{description}"
---
[](){{ #{name.path} }}

::: {name.code.path}
    options:
      heading: {name.short}
      heading_level: 1
      show_source: true

## Recipes that use it

{chr(10).join(users) or "None yet."}

Source: `{name.source}`. Back to [{name.package}](../{name.package}.md).
"""
