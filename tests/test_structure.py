"""The rooms of the package: who may import whom, and what stays private."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "kerasfactory").rglob("*.py")
}


def imports(module):
    """Names that a file imports from this package, anywhere in it: pairs of module and name."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kerasfactory":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full, None) if full in FILES else (node.module, alias.name)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in FILES)


IMPORTS = {module: {imported for imported, _ in imports(module)} for module in FILES}


def room(module):
    """The higher a room, the more it may import: each imports only from its own and those below."""
    parts = module.split(".")[1:]
    if not parts or parts[0] in ("_arguments", "_text", "_warnings", "_backend"):
        return 0
    if parts[0] == "layers":
        return 1
    if parts[:2] == ["explain", "_engine"]:
        return 2
    if parts[0] == "explain":
        return {"_audit": 4}.get(parts[1], 3) if len(parts) > 1 else 5
    return 6


def test_every_room_imports_only_from_rooms_below():
    for module, imported in IMPORTS.items():
        assert not [other for other in imported if room(other) > room(module)], module
    assert {room(module) for module in FILES} == {0, 1, 2, 3, 4, 5, 6}


def test_layers_and_plots_know_nothing_of_explain():
    for module, imported in IMPORTS.items():
        if room(module) in (0, 1, 6):
            assert not [other for other in imported if other.startswith("kerasfactory.explain")], module


def test_no_circle_of_imports():
    open_modules, done = [], set()

    def visit(module):
        assert module not in open_modules, " -> ".join([*open_modules[open_modules.index(module) :], module])
        if module not in done:
            open_modules.append(module)
            for other in sorted(IMPORTS[module]):
                visit(other)
            done.add(open_modules.pop())

    for module in sorted(FILES):
        visit(module)


@pytest.mark.parametrize("module", FILES)
def test_no_private_name_crosses_modules(module):
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    assert not [(other, name) for other, name in imports(module) if name and name.startswith("_") and other != package]


@pytest.mark.parametrize("module", FILES)
def test_functions_fit_on_a_screen(module):
    lines = FILES[module].read_text().splitlines()
    tree = ast.parse("\n".join(lines))
    words = set()  # lines of docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            words |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            code = [
                number
                for number in range(node.body[0].lineno, node.end_lineno + 1)
                if number not in words and lines[number - 1].strip() and not lines[number - 1].strip().startswith("#")
            ]
            assert len(code) <= 60, f"{node.name} has {len(code)} lines of code"
