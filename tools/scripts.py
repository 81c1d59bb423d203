"""Run the examples as the scripts that people download, each in an empty folder, in which it must leave nothing.

`python tools/scripts.py` runs all; `python tools/scripts.py NAME ...` some.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from notebooks import ENVIRONMENT, EXAMPLES, sources

CACHES = ("torchinductor_", "dask-scratch-space")  # which PyTorch and Dask make for themselves


def run(source: Path) -> bool:
    """Run one; say how long it took, and what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        # Where a program keeps temporary files is that folder too: those are to be gone as well.
        environment = os.environ | ENVIRONMENT | {"MPLBACKEND": "Agg", "TMPDIR": folder}
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, source], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        seconds = time.perf_counter() - start
        left = [name for name in os.listdir(folder) if not name.startswith(CACHES)]
    wrong = [f"exit status {done.returncode}:\n{done.stderr}"] * bool(done.returncode) + [f"left {left}"] * bool(left)
    print(f"{source.name}: {seconds:.0f} s", *wrong, sep=", ", flush=True)
    return not wrong


def main() -> None:
    """Run two at a time."""
    names = sys.argv[1:]
    chosen = [EXAMPLES / f"{name}.py" for name in names] or sources()
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        if not all(list(pool.map(run, chosen))):
            sys.exit(1)


if __name__ == "__main__":
    main()
