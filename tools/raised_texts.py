"""The texts of all errors and warnings of the package, from its code, with what people call that raises them."""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import reference
from notebooks import ROOT

GAP = "…"  # what differs from one time to the next
_LONGEST_HEADING = 110
_MOST_CALLERS = 6  # that are named; more of them are "many functions"


@dataclass
class Definition:
    """A function or class at the top of a module, or what else is there: the texts it raises, and what it mentions."""

    module: str
    nodes: list[ast.AST]
    texts: dict[str, str] = field(default_factory=dict)  # to the kinds of error
    mentioned: set[tuple[str, str]] = field(default_factory=set)


class Raised(NamedTuple):
    """A text, the name of its class or `warning`, and what of the public names raises it."""

    text: str
    kind: str
    by: list[reference.Name]


class Package:
    """The code of the package, as far as its errors go."""

    def __init__(self):
        self.trees = {_module(path): ast.parse(path.read_text()) for path in (ROOT / "kerasfactory").rglob("*.py")}
        self.imported = {module: dict(self._imports(tree)) for module, tree in self.trees.items()}
        self.constants: dict[tuple[str, str], ast.expr] = {}
        self.definitions: dict[tuple[str, str], Definition] = {}
        for module, tree in self.trees.items():
            for node in tree.body:
                defines = isinstance(node, ast.FunctionDef | ast.ClassDef)
                key = module, node.name if defines else ""
                self.definitions.setdefault(key, Definition(module, [])).nodes.append(node)
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self.constants[module, node.targets[0].id] = node.value
        for definition in self.definitions.values():
            definition.texts = dict(self._texts(definition))
            definition.mentioned = set(self._mentioned(definition))

    @property
    def raised(self) -> list[Raised]:
        """Every text, with what is raised and the public names that raise it."""
        kinds = {text: kind for definition in self.definitions.values() for text, kind in definition.texts.items()}
        reached = {name: self._reached(name) for name in reference.NAMES.values()}
        return [
            Raised(text, kind, [name for name, texts in reached.items() if text in texts])
            for text, kind in sorted(kinds.items(), key=lambda item: re.sub(r"\W+", " ", item[0]).strip().lower())
        ]

    def _reached(self, name: reference.Name) -> set[str]:
        module, _, own = name.code.path.rpartition(".")
        texts, seen, waiting = set(), set(), [(module, own)]
        while waiting:
            key = waiting.pop()
            if key not in seen and key in self.definitions:
                seen.add(key)
                texts |= set(self.definitions[key].texts)
                waiting += self.definitions[key].mentioned
        return texts

    def _texts(self, definition: Definition) -> Iterator[tuple[str, str]]:
        for node in _walk(definition):
            if isinstance(node, ast.Call) and node.args and (kind := _kind(node.func)):
                for text in self._variants(node.args[0], definition):
                    if re.search(r"\w{3}", re.sub("Received|Layer", "", text)):
                        yield text, kind

    def _variants(self, node: ast.expr, definition: Definition) -> list[str]:
        """The text; if it begins with a variable that is given texts beside it, one for each of these."""
        text = self._text(node, definition.module)
        first = node.values[0] if isinstance(node, ast.JoinedStr) else None
        if isinstance(first, ast.FormattedValue) and isinstance(first.value, ast.Name):
            assigned = [
                self._text(other.value, definition.module)
                for other in _walk(definition)
                if isinstance(other, ast.Assign) and ast.unparse(other.targets[0]) == first.value.id
            ]
            beginnings = [beginning for beginning in assigned if re.search(r"\w{3}", beginning)]
            return [beginning + text.removeprefix(GAP) for beginning in beginnings] or [text]
        return [text]

    def _imports(self, tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield from ((alias.asname or alias.name, (node.module, alias.name)) for alias in node.names)

    def _text(self, node: ast.expr, module: str) -> str:
        text = GAP
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            text = "".join(self._text(part, module) if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            text = self._text(node.left, module) + self._text(node.right, module)
        elif isinstance(node, ast.Name) and (module, node.id) in self.constants:
            text = self._text(self.constants[module, node.id], module)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            text = re.sub(r"\{.*?\}", GAP, self._text(node.func.value, module))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            text = self._returned(*self._home(module, node.func.id))
        return text

    def _returned(self, module: str, name: str) -> str:
        if (module, name) not in self.definitions:
            return GAP
        returns = [node.value for node in _walk(self.definitions[module, name]) if isinstance(node, ast.Return)]
        return self._text(returns[-1], module) if returns and returns[-1] else GAP

    def _mentioned(self, definition: Definition) -> Iterator[tuple[str, str]]:
        yield definition.module, ""  # which runs when the module is imported
        for node in _walk(definition):
            if isinstance(node, ast.Name):
                yield self._home(definition.module, node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = self._home(definition.module, node.value.id)
                yield f"{module}.{name}", node.attr

    def _home(self, module: str, name: str) -> tuple[str, str]:
        """Where a name of a module is defined."""
        return self.imported[module].get(name, (module, name))


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _walk(definition: Definition) -> Iterator[ast.AST]:
    for node in definition.nodes:
        yield from ast.walk(node)


def _kind(function: ast.expr) -> str:
    """The name of an error, `warning`, or nothing."""
    name = getattr(function, "id", getattr(function, "attr", ""))
    name = {"NoSpreadError": "ValueError", "_NoAuditError": "ValueError"}.get(name, name)
    return "warning" if name == "warn" else name if name.endswith("Error") else ""


def section(package: str) -> str:
    """The texts of a package, as Markdown: the beginning of each is a heading."""
    entries: dict[str, list[str]] = {}
    for raised in _all():
        if _package(raised) == package:
            heading, said = _heading_and_rest(raised.text)
            entries.setdefault(heading, []).append(f"{said}{_by(raised)}")
    return "\n\n".join("\n\n".join([f"### {heading}", *said]) for heading, said in entries.items())


@functools.cache
def _all() -> list[Raised]:
    return Package().raised


def _package(raised: Raised) -> str:
    packages = {name.package for name in raised.by}
    return packages.pop() if len(packages) == 1 else "explain"


def _heading_and_rest(text: str) -> tuple[str, str]:
    """A text, without what was received, which differs each time: its first sentence, and what follows."""
    text = re.sub(rf"{GAP}+(?={GAP})|(?<=[.:] ){GAP}(?=[A-Z])|(?<=\.){GAP}$", "", text)
    text = re.sub(rf"\s*\bReceived: [^\s.]*{GAP}\W*$", "", text)
    heading, *rest = re.split(r"(?<=[.?!])\s+(?=[A-Z`…])", text, maxsplit=1)
    if len(heading) > _LONGEST_HEADING:
        heading, rest = heading[:_LONGEST_HEADING].rpartition(" ")[0] + " " + GAP, [text]
    heading = heading if heading.count("`") % 2 == 0 else heading.replace("`", "")
    said = f"{_markdown(rest[0])}\n\n" if rest and re.search(r"\w", rest[0]) else ""
    return _markdown(heading), said


def _by(raised: Raised) -> str:
    said = "Warning from" if raised.kind == "warning" else f"`{raised.kind}`, raised by"
    if not raised.by or len(raised.by) > _MOST_CALLERS:
        return f"{said} many functions of [`explain`](../api/explain.md)."
    return f"{said} " + ", ".join(f"[`{name.short}`][{name.path}]" for name in raised.by) + "."


def _markdown(text: str) -> str:
    """The text as it is: only its code is code."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        part if number % 2 else re.sub(r"([\\*_\[\]<>&{}$#`|])", r"\\\1", part) for number, part in enumerate(parts)
    )
