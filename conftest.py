"""Settings that must be in place before a test, or the kernel of a notebook, imports Keras."""

import os

from tools.notebooks import ENVIRONMENT

os.environ.update(ENVIRONMENT | {"KERAS_BACKEND": os.environ.get("KERAS_BACKEND", ENVIRONMENT["KERAS_BACKEND"])})
