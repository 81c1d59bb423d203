"""Measurements in a process of their own, so that none finds what another one left."""

import json
import os
import subprocess
import sys


def in_a_process(script, backend, *arguments, **environment):
    """What the last line says, as JSON, that the script prints when it is called with `arguments`."""
    settings = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    child = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(child.stdout.splitlines()[-1])
