"""The site, built and served once for all tests that look at it."""

import functools
import http.server
import os
import subprocess
import sys
import threading

import pytest
from filelock import FileLock

# `make serve` installs none of these: to import one is an error here too.
MKDOCS_WITHOUT_KERAS = """
import sys
sys.modules.update(dict.fromkeys(["keras", "tensorflow", "jax", "torch", "numpy", "xarray"]))
from mkdocs.__main__ import cli
cli()
"""


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built site: one for all processes of a run, built by the first that asks for it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, unfinished = shared / "site", shared / "unfinished_site"
    with FileLock(shared / "site.lock"):
        if not folder.exists():
            command = [sys.executable, "-c", MKDOCS_WITHOUT_KERAS, "build", "--strict", "--site-dir", unfinished]
            build = subprocess.run(command, capture_output=True, text=True)
            assert build.returncode == 0, build.stdout + build.stderr
            unfinished.rename(folder)
    return folder


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def end_headers(self):
        # Else the link checker keeps to 10 requests a second, whatever it is told.
        self.send_header("LinkChecker", "as fast as you like")
        super().end_headers()


@pytest.fixture(scope="session")
def site_url(site):
    """Where the built site is served, on this machine."""
    handler = functools.partial(_QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
