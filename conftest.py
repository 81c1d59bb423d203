"""Settings that must be in place before a test, or a notebook's kernel, imports Keras; how a run begins and ends."""

import importlib.metadata
import os
import time
from pathlib import Path

from tools.notebooks import ENVIRONMENT

os.environ.update(ENVIRONMENT | {"KERAS_BACKEND": os.environ.get("KERAS_BACKEND", ENVIRONMENT["KERAS_BACKEND"])})
START = time.monotonic()


def pytest_report_header():
    """Tells the runs of one `make test` apart."""
    return f"keras: {importlib.metadata.version('keras')} on {os.environ['KERAS_BACKEND']}"


def pytest_terminal_summary(terminalreporter, config):
    """Adds a line to the file that `make test` shows at its end. The workers' own counts are in that of all."""
    path = os.environ.get("TEST_SUMMARY")
    if path and not hasattr(config, "workerinput"):
        outcomes = ("passed", "failed", "error", "skipped")
        counts = {outcome: len(terminalreporter.stats.get(outcome, ())) for outcome in outcomes}
        counted = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        with Path(path).open("a") as file:
            file.write(f"{counted} in {time.monotonic() - START:.0f} s, {pytest_report_header()}\n")
