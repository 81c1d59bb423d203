"""The site, built and served once for all tests that look at it."""

import functools
import http.server
import subprocess
import sys
import threading

import pytest


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stdout + build.stderr
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
