# Needs python3 >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/pip --quiet --quiet --disable-pip-version-check
UV = $(BIN)/uv --quiet pip install --python $(BIN)/python
# What another backend can change, and what another Keras can: the layers, and what reaches inside those of Keras.
BACKEND_TESTS = -m "not backend_independent" tests/layers tests/explain
KERAS_TESTS = -m "not backend_independent" tests/layers \
	$(patsubst %,tests/explain/test_%.py,attribution capture edit foreign heads monitor summary ways_to_attend)
PYTEST = TEST_SUMMARY=$(SUMMARY) $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --durations 10
# Each run of pytest adds its line, which are shown together at the end.
SUMMARY = .venv/summary
START := $(shell date +%s)
SHOW_SUMMARY = @echo; echo 'What `make $@` ran:'; cat $(SUMMARY); \
	echo "$$(($$(date +%s) - $(START))) s in all"
OLDEST_KERAS = $(shell sed -n 's/^dependencies = \["keras>=\([0-9.]*\)".*/\1/p' pyproject.toml)

export NO_MKDOCS_2_WARNING = 1

.PHONY: serve site test scripts summary test-jax test-torch keras-versions notebooks bench lint lock clean

serve: .venv/docs ## build the site and serve it on http://localhost:8000
	$(BIN)/mkdocs serve

site: .venv/docs ## build the site into site/
	$(BIN)/mkdocs build --strict

test: summary lint ## everything, on TensorFlow; then what a backend can change on the other two
	$(PYTEST)
	$(MAKE) test-jax test-torch
	$(SHOW_SUMMARY)

# The tests compile much and compute little; that is what the settings for JAX are about: what one test compiled, another
# one finds. A process has a core, and PyTorch takes them all for each: with one thread its tests take two thirds of the time.
FOR_JAX = JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.venv/jax \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
test-jax test-torch: .venv/ready ## what a backend can change, on one of them
	OMP_NUM_THREADS=1 $(FOR_JAX) KERAS_BACKEND=$(@:test-%=%) $(PYTEST) $(BACKEND_TESTS)

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

scripts: .venv/ready ## run every example as a script, as people download it
	$(BIN)/python tools/scripts.py

notebooks: .venv/ready ## execute the examples whose code, or the code they run on, has changed
	$(BIN)/python tools/notebooks.py

bench: .venv/ready ## measure the layer, capture, summarize and audits beside their peers, which models are read, how often verdicts are right, and which reading is; some hours
	$(UV) --require-hashes --no-deps --target .venv/peers -r requirements-bench.txt
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/backbones.py
	$(BIN)/python benchmarks/summary.py
	$(BIN)/python benchmarks/verbs.py
	$(BIN)/python benchmarks/claims.py
	$(BIN)/python benchmarks/readings.py

lint: .venv/ready ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The locks agree: the smaller ones are made of the versions in the largest one.
LOCK = $(BIN)/uv --quiet pip compile --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header --no-annotate
lock: .venv/docs ## renew requirements*.txt from pyproject.toml, but for requirements-torch-cpu.txt
	$(LOCK) --upgrade --group dev --extra tensorflow --extra jax --extra store --extra plot pyproject.toml -o requirements.txt
	$(LOCK) --upgrade --group docs --constraints requirements.txt -o requirements-docs.txt
	$(LOCK) --upgrade --group torch --constraints requirements.txt -o requirements-torch.txt
	$(LOCK) --upgrade --no-deps --group bench --constraints requirements-torch.txt -o requirements-bench.txt

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

# For Linux there are two builds of PyTorch: that for CPUs has 0.2 GB, that with CUDA several. If pip finds the first, by the
# user's own settings, which uv does not read, CUDA is left out. Every file is compared with its hash.
.venv/ready: .venv/docs requirements.txt requirements-torch.txt requirements-torch-cpu.txt pyproject.toml
	if $(PIP) install --require-hashes --no-deps -r requirements-torch-cpu.txt 2> .venv/no-cpu-build.txt; then \
		awk '/^[^ ]/ { other = !/^(torch==|triton|cuda-|nvidia-)/ } other' requirements-torch.txt > .venv/torch.txt; \
	else cp requirements-torch.txt .venv/torch.txt; fi
	$(UV) --require-hashes --no-deps -r .venv/torch.txt
	$(UV) --require-hashes -r requirements.txt
	$(UV) --no-deps --no-build-isolation -e .
	@touch .venv/ready
