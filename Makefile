# Needs python3 >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/pip --quiet --quiet --disable-pip-version-check
UV = $(BIN)/uv --quiet pip install --python $(BIN)/python
# What another backend can change, and what another Keras can: the layers, and what reaches inside those of Keras.
BACKEND_TESTS = -m "not backend_independent" tests/layers tests/explain
KERAS_TESTS = -m "not backend_independent" tests/layers \
	$(patsubst %,tests/explain/test_%.py,attribution capture edit heads monitor summary)
PYTEST = TEST_SUMMARY=$(SUMMARY) $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --durations 10
# Each run of pytest adds its line, which are shown together at the end.
SUMMARY = .venv/summary
START := $(shell date +%s)
SHOW_SUMMARY = @echo; echo 'What `make $@` ran:'; cat $(SUMMARY); \
	echo "$$(($$(date +%s) - $(START))) s in all"
OLDEST_KERAS = $(shell sed -n 's/^dependencies = \["keras>=\([0-9.]*\)".*/\1/p' pyproject.toml)

export NO_MKDOCS_2_WARNING = 1

.PHONY: serve site test summary test-jax test-torch keras-versions notebooks bench lint lock clean

serve: .venv/docs ## build the site and serve it on http://localhost:8000
	$(BIN)/mkdocs serve

site: .venv/docs ## build the site into site/
	$(BIN)/mkdocs build --strict

test: summary lint ## everything, on TensorFlow; then what a backend can change on the other two
	$(PYTEST)
	$(MAKE) test-jax test-torch
	$(SHOW_SUMMARY)

# The tests compile much and compute little; that is what the setting for JAX is about. A process has a core, and PyTorch
# takes them all for each: with one thread its tests take two thirds of the time.
test-jax test-torch: .venv/ready ## what a backend can change, on one of them
	OMP_NUM_THREADS=1 JAX_DISABLE_MOST_OPTIMIZATIONS=1 KERAS_BACKEND=$(@:test-%=%) $(PYTEST) $(BACKEND_TESTS)

summary: .venv/ready
	@rm -f $(SUMMARY)

keras-versions: summary .venv/ready ## what another Keras can change, on the oldest that pyproject.toml admits, and on the newest there is
	rm -rf .venv/keras
	$(UV) --no-deps --target .venv/keras/oldest keras==$(OLDEST_KERAS)
	PYTHONPATH=$(CURDIR)/.venv/keras/oldest $(PYTEST) $(KERAS_TESTS)
	$(UV) --no-deps --target .venv/keras/newest keras
	@if cmp -s .venv/keras/newest/keras/src/version.py .venv/lib/python3*/site-packages/keras/src/version.py; then \
		echo 'The newest Keras is the one in .venv, which `make test` tries.'; \
	else \
		PYTHONPATH=$(CURDIR)/.venv/keras/newest $(PYTEST) $(KERAS_TESTS); \
	fi
	$(SHOW_SUMMARY)

notebooks: .venv/ready ## execute the examples whose code, or the code they run on, has changed
	$(BIN)/python tools/notebooks.py

bench: .venv/ready ## measure the layer, capture and summarize beside their peers, how often verdicts are right, and which reading is; over an hour
	$(PIP) install --no-deps --target .venv/peers kerasfactory==0.1.1 loguru pandas plotly \
		pytorch-forecasting lightning lightning-utilities torchmetrics scikit-base tqdm shap slicer numba llvmlite
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/summary.py
	$(BIN)/python benchmarks/claims.py
	$(BIN)/python benchmarks/readings.py

lint: .venv/ready ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Both locks agree: the smaller one is made of the versions in the larger one.
LOCK = $(BIN)/uv --quiet pip compile --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header --no-annotate
lock: .venv/docs ## renew requirements.txt and requirements-docs.txt from pyproject.toml
	$(LOCK) --upgrade --group dev --extra tensorflow --extra jax --extra store --extra plot pyproject.toml -o requirements.txt
	$(LOCK) --upgrade --group docs --constraints requirements.txt -o requirements-docs.txt

clean:
	rm -rf .venv site docs/recipes

# .venv grows in two stages. The first is all that the site needs: no Keras and no backend.
.venv/docs: requirements-docs.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "kerasfactory needs Python 3.11, 3.12 or 3.13 for its development environment (TensorFlow has no other). Found %d.%d. Choose another with: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	awk '/^[^ ]/ { wanted = /^uv==/ } wanted' requirements-docs.txt > .venv/uv.txt
	$(PIP) install --require-hashes -r .venv/uv.txt
	$(UV) --require-hashes -r requirements-docs.txt
	@touch .venv/docs

# PyTorch stays out of requirements.txt, which would pin its CUDA for Linux too. That costs several GB, its CPU build 0.2.
# pip installs it, because pip alone follows the user's own settings to such a build.
# Captum, with which the tests on PyTorch compare, stays out too: it needs PyTorch, tqdm, and what is in requirements.txt.
.venv/ready: .venv/docs requirements.txt pyproject.toml
	$(PIP) install torch==2.13.0
	$(UV) --require-hashes -r requirements.txt
	$(UV) --no-deps captum==0.9.0 tqdm==4.70.1
	$(UV) --no-deps --no-build-isolation -e .
	@touch .venv/ready
