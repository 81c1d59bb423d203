"""Settings that must be in place before a test, or the kernel of a notebook, imports Keras."""

import importlib.metadata
import os

from tools.notebooks import ENVIRONMENT

os.environ.update(ENVIRONMENT | {"KERAS_BACKEND": os.environ.get("KERAS_BACKEND", ENVIRONMENT["KERAS_BACKEND"])})


def pytest_report_header():
    """Tells the runs of one `make test` apart."""
    return f"keras: {importlib.metadata.version('keras')} on {os.environ['KERAS_BACKEND']}"
