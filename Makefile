# Needs python3 >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
BIN = .venv/bin

export NO_MKDOCS_2_WARNING = 1

.PHONY: serve site test notebooks lint lock clean

serve: .venv/ready ## build the site and serve it on http://localhost:8000
	$(BIN)/mkdocs serve

site: .venv/ready ## build the site into site/
	$(BIN)/mkdocs build --strict

test: lint ## everything that CI checks
	$(BIN)/pytest

notebooks: .venv/ready ## execute the examples whose code, or the code they run on, has changed
	$(BIN)/python tools/notebooks.py

lint: .venv/ready ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

lock: .venv/ready ## renew requirements.txt from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --fork-strategy fewest --upgrade \
		--generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements.txt

clean:
	rm -rf .venv site docs/recipes

.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "kerasfactory needs Python 3.11, 3.12 or 3.13 for its development environment (TensorFlow has no other). Found %d.%d. Choose another with: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch .venv/ready
