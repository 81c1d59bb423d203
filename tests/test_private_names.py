"""Which private names of Keras, JAX, PyTorch and TensorFlow the package relies on, and that the installed ones exist.

A file that uses private names lists them in `PRIVATE_NAMES`, from the module or class that owns them, as a dotted
path. The tests read those tables from the source, so that no backend but the one in use has to be imported.
"""

import ast
import importlib
import inspect
import pathlib
import textwrap

import keras
import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "kerasfactory"
ROOMS = ("_backend", "layers", "explain")
FILES = sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]
PRIVATE_MODULES = ("keras.src", "jax._src", "torch._C", "tensorflow.python")


def module_name(path):
    return ".".join(("kerasfactory", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def tables():
    """The `PRIVATE_NAMES` of all files, those of other backends left out: (file, owner, name)."""
    for path in FILES:
        other_backend = path.parent.name == "_backend" and path.stem in {"tensorflow", "jax", "torch"} - {
            keras.config.backend()
        }
        if "PRIVATE_NAMES" in path.read_text() and not other_backend:
            for owner, names in importlib.import_module(module_name(path)).PRIVATE_NAMES.items():
                for name in names:
                    yield path.name, owner, name


def find(dotted_path):
    """The module or class at a dotted path, or the last of its parts that exists."""
    parts = dotted_path.split(".")
    found = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        found = getattr(found, part, None) or importlib.import_module(".".join(parts[:number]))
    return found


def assigned_to_self(tree):
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}


def has(owner, name):
    """Whether a module or class has a name, or the class gives it to its instances."""
    if hasattr(owner, name) or not inspect.isclass(owner):
        return hasattr(owner, name)
    sources = [inspect.getsource(parent) for parent in owner.__mro__ if parent.__module__ != "builtins"]
    return any(name in assigned_to_self(ast.parse(textwrap.dedent(source))) for source in sources)


@pytest.mark.parametrize(("file", "owner", "name"), list(tables()), ids=lambda argument: argument)
def test_the_installed_version_has_the_private_name(file, owner, name):
    assert has(find(owner), name), f"{owner}.{name}, on which {file} relies, is gone"


def test_the_canary_names_what_is_missing():
    assert has(keras.layers.MultiHeadAttention, "_softmax")  # only instances have this one
    assert has(keras.layers.MultiHeadAttention, "_compute_attention")
    assert not has(keras.layers.MultiHeadAttention, "_soft_max")
    assert has(find("keras.src.backend.common.masking"), "get_keras_mask")
    assert not has(find("keras.src.backend.common.masking"), "get_mask")


def is_private(name):
    documented = ("_replace", "_asdict")  # of every named tuple
    return name.startswith("_") and not name.endswith("__") and name not in documented


def own_names(tree):
    """What a file defines: its functions, methods and classes, and what it assigns."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | assigned_to_self(tree)


def listed_names(tree):
    """The strings in the file's `PRIVATE_NAMES`: the owners and the names."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PRIVATE_NAMES":
            return {constant.value for constant in ast.walk(node.value) if isinstance(constant, ast.Constant)}
    return set()


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_private_name_of_somebody_else_is_listed_where_it_is_used(path):
    tree = ast.parse(path.read_text())
    listed = listed_names(tree)
    foreign = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in own_names(tree))
    }
    assert foreign <= listed, f"{path.name} reads {sorted(foreign - listed)} and does not list them in PRIVATE_NAMES"
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    private = {name for name in imported if name.startswith(PRIVATE_MODULES)}
    assert private <= listed, f"{path.name} imports from {sorted(private - listed)} and does not list them"


@pytest.mark.parametrize(("room", "file"), [("layers", "_attention.py"), ("explain", "attention.py")])
def test_one_file_of_each_room_uses_private_names(room, file):
    files = [path.name for path in FILES if room in path.parts and "PRIVATE_NAMES" in path.read_text()]
    assert files == [file]
