"""Execute the examples: NAME.py, which people edit, becomes NAME.ipynb, which tests compare and pages show.

`python tools/notebooks.py` executes the stale ones; `--all` executes every one.
"""

import argparse
import ast
import base64
import hashlib
import importlib.metadata
import io
import json
import os
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RUN_TIMES = EXAMPLES / "run_times.json"
FRONT_PICTURE = ROOT / "docs" / "assets" / "quickstart.png"  # on the first page and in the README

DOTS_PER_INCH = 130  # of the figures, as tools/ipython says

# Outputs must not depend on the machine. Kernels inherit this, here and in the tests.
ENVIRONMENT = {
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "CUDA_VISIBLE_DEVICES": "-1",
    "OPENBLAS_NUM_THREADS": "1",
    "IPYTHONDIR": str(ROOT / "tools" / "ipython"),
}


def sources() -> list[Path]:
    """The examples, as their authors write them."""
    return sorted(EXAMPLES.glob("*.py"))


def from_source(source: Path) -> nbformat.NotebookNode:
    """The notebook that `source` describes, not executed, always with the same cell ids."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata.pop("jupytext", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["kerasfactory"] = {"fingerprint": fingerprint(notebook), **versions()}
    return notebook


def versions() -> dict[str, str]:
    """What an output can depend on, besides the code."""
    backends = ("tensorflow", "jax", "torch")
    names = ("keras", "keras-hub", *backends, "numpy", "scipy", "scikit-learn", "xarray", "matplotlib")
    return {name: importlib.metadata.version(name).partition("+")[0] for name in names}


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """Changes whenever the outputs might: with the code cells, the package's code, or a version."""
    parts = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    parts += [_without_docstrings(path.read_text()) for path in sorted((ROOT / "kerasfactory").rglob("*.py"))]
    parts.append(json.dumps(versions()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _without_docstrings(code: str) -> str:
    lines = code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines[docstring.lineno - 1 : docstring.end_lineno] = [""] * (docstring.end_lineno - docstring.lineno + 1)
    return "\n".join(line for line in lines if line.strip())


def is_stale(source: Path) -> bool:
    """Whether the stored outputs may differ from what the code gives now."""
    stored = source.with_suffix(".ipynb")
    if not stored.exists():
        return True
    metadata = nbformat.read(stored, as_version=4).metadata
    return metadata.get("kerasfactory", {}).get("fingerprint") != fingerprint(jupytext.read(source))


def cover(notebook: nbformat.NotebookNode) -> bytes:
    """The picture that answers the recipe's question."""
    (cell,) = (cell for cell in notebook.cells if "cover" in cell.metadata.get("tags", []))
    (picture,) = (output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    return base64.b64decode(picture)


def execute(source: Path) -> float:
    """Write the executed notebook beside `source`; return the seconds it took. Errors in a cell are raised."""
    notebook = from_source(source)
    client = NotebookClient(
        notebook,
        timeout=120,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(EXAMPLES)}},
    )
    start = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - start
    # The patch release of Python is not part of the result.
    notebook.metadata["language_info"].pop("version", None)
    _write(notebook, source)
    return seconds


def refresh(source: Path) -> None:
    """Bring text and metadata of a notebook up to date that need not be executed again."""
    notebook, stored = from_source(source), nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    notebook.metadata["language_info"] = stored.metadata["language_info"]
    executed = iter(cell for cell in stored.cells if cell.cell_type == "code")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            before = next(executed)
            cell.outputs, cell.execution_count = before.outputs, before.execution_count
    _write(notebook, source)


def _write(notebook: nbformat.NotebookNode, source: Path) -> None:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                picture = in_few_colors(base64.b64decode(output.data["image/png"]))
                output.data["image/png"] = base64.b64encode(picture).decode()
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    if source.stem == FRONT_PICTURE.stem:
        FRONT_PICTURE.write_bytes(cover(notebook))


def in_few_colors(picture: bytes) -> bytes:
    """The same picture at about a third of the weight: 256 colors are enough for a chart."""
    from PIL import Image  # which the site, for which this file is imported too, does without

    image = Image.open(io.BytesIO(picture))
    if image.mode == "P":
        return picture
    buffer = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    """Execute what needs it, and note how long each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="execute every example, stale or not")
    everything = parser.parse_args().all
    os.environ.update(ENVIRONMENT)
    run_times = json.loads(RUN_TIMES.read_text()) if RUN_TIMES.exists() else {}
    for source in sources():
        if everything or is_stale(source):
            run_times[source.stem] = round(execute(source))
            print(f"{source.name}: {run_times[source.stem]} s")
        else:
            refresh(source)
            print(f"{source.name}: up to date")
    RUN_TIMES.write_text(json.dumps(run_times, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
