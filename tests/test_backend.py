"""One file per backend with the same functions; and what happens where a library lacks a private name."""

import ast
import os
import pathlib
import subprocess
import sys
import textwrap

import keras

from kerasfactory import _backend

FOLDER = pathlib.Path(_backend.__file__).parent
BACKEND = keras.config.backend()


def functions(backend):
    """The public functions of a backend's file, with their signatures, without importing it."""
    tree = ast.parse((FOLDER / f"{backend}.py").read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    names = [node.name for node in found]
    assert len(set(names)) == len(names), f"{backend}.py defines a function twice"
    assert names == sorted(names)
    return {node.name: ast.unparse(node.args) for node in found}


def test_all_backends_have_the_same_functions():
    assert functions("tensorflow") == functions("jax") == functions("torch")


def test_the_package_offers_every_function_of_the_backend():
    for name in functions(BACKEND):
        assert getattr(_backend, name).__module__ == f"kerasfactory._backend.{BACKEND}"


def test_no_name_is_given_two_meanings():
    for path in FOLDER.glob("*.py"):
        bound = []
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound.append(node.name)
            elif isinstance(node, ast.Assign):
                bound += [target.id for target in node.targets]
            elif isinstance(node, ast.Import | ast.ImportFrom):
                bound += [alias.asname or alias.name for alias in node.names]
        assert len(set(bound)) == len(bound), path.name


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[1],
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_layers_work_on_a_keras_that_moved_its_masks():
    """As on the branch `pluggable_backend` of Keras."""
    printed = run("""
        import keras.src.backend

        # Keras' own layers, all imported by now, read the two from here, as attributes.
        import keras

        moved = {name: vars(keras.src.backend).pop(name) for name in ("get_keras_mask", "set_keras_mask")}
        import kerasfactory.layers

        vars(keras.src.backend).update(moved)  # what follows is about the package, not about this Keras
        import numpy as np

        layer = kerasfactory.layers.InterpretableMultiHeadAttention(4, 2)
        tokens = keras.layers.Embedding(5, 8, mask_zero=True)(np.array([[1, 2, 0]]))
        layer(tokens)
        print(np.abs(keras.ops.convert_to_numpy(layer.attention_scores))[..., 2].max())
        """)
    assert printed == "0.0"


def test_a_private_name_that_keras_lost_is_named_when_it_is_needed():
    printed = run("""
        import keras
        from keras.src.backend.common import masking
        from keras.src.trainers import compile_utils

        del masking.get_keras_mask, compile_utils.get_loss
        import kerasfactory.layers
        from kerasfactory import _backend

        for function, arguments in ((_backend.get_keras_mask, (1,)), (_backend.get_loss, ("mse", 1, 1))):
            try:
                function(*arguments)
            except ImportError as error:
                print(error)
        """)
    masks, losses = printed.splitlines()
    lost = "`keras.src.backend.common.masking.get_keras_mask`"
    assert f"{lost}, a private name that the installed keras {keras.__version__} does not have" in masks
    assert "`keras.src.trainers.compile_utils.get_loss`" in losses
    assert "Install an older version of keras, or a newer one of kerasfactory." in losses


# For each backend that needs a private module: a function that needs it, and how it comes to be called.
LOST = {
    "jax": ("jax._src.core", "trace_ctx", "jax.make_jaxpr(_backend.in_scope)(1.0)"),
    "torch": ("torch._C._functorch", "is_functorch_wrapped_tensor", "_backend.is_usable(keras.ops.ones(3))"),
}
if BACKEND in LOST:

    def test_a_private_name_that_the_backend_lost_is_named_when_it_is_needed():
        module, name, call = LOST[BACKEND]
        printed = run(f"""
            import sys
            import types

            import {BACKEND}
            import keras

            sys.modules[{module!r}] = types.ModuleType({module!r})
            import kerasfactory.layers
            from kerasfactory import _backend

            layer = kerasfactory.layers.InterpretableMultiHeadAttention(4, 2)
            layer(keras.ops.ones((1, 3, 4)))
            print(layer.attention_scores.shape)
            try:
                {call}
            except ImportError as error:
                print(error)
            """)
        assert f"needs `{module}.{name}`, a private name that the installed {BACKEND} " in printed
        assert f"Install an older version of {BACKEND}, or a newer one of kerasfactory." in printed


def test_a_backend_without_a_file_is_refused_by_name():
    printed = run(
        """
        import kerasfactory
        try:
            import kerasfactory.layers
        except ImportError as error:
            print(error)
        """,
        KERAS_BACKEND="numpy",
    )
    assert printed.startswith("kerasfactory runs on the Keras backends tensorflow, jax, torch.")
    assert "Received: keras.config.backend()='numpy'. Set the environment variable KERAS_BACKEND" in printed
