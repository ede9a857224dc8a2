# `make demo` and `make test` do all set-up themselves; a second run is quick.
# Python 3.11 where there is one: it is the one that both hosts have builds for.
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo python3)
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
PIP = -m pip -qq --disable-pip-version-check
QUICKLY = $(BIN)/python tools/quickly.py

.PHONY: coverage test-slow nightly test-torch-newest test-torch-oldest demo demo-torch demo-distributed examples test test-all bench bench-quick lint types docs matrix site dist-check test-newest test-oldest clean

$(READY): pyproject.toml
	@echo 'Setting up $(VENV), once.' >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP) install --editable '.[dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/python examples/hyperparameters.py

demo-torch: $(READY)
	@$(BIN)/python examples/torch_hyperparameters.py

# Two processes with four devices each, and two processes under torchrun; each compares with one.
demo-distributed: $(READY)
	@$(BIN)/python examples/distributed/jax_job.py
	@OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node=2 \
		examples/distributed/torch_job.py

# Each checks its own result and says so with its exit status.
examples: $(READY)
	@$(BIN)/python tools/gallery.py

test: $(READY)
	@$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow'

# With what takes long: large programs, meshes, processes, more random programs.
test-all: $(READY)
	@FREEVARS_EXAMPLES=100 $(BIN)/python -m pytest -n auto --dist worksteal

# Random functions with random rules: 10,000 examples, each of which compares six pairs, and others each time.
nightly: $(READY)
	@FREEVARS_EXAMPLES=10000 $(BIN)/python -m pytest -n auto --dist worksteal tests/jax/convert/test_rule_programs.py

# Both halves of test-all, as the gate runs them: the quick ones with a look at which branches of the source
# they run, at least the share that pyproject.toml states, and the others without, which it would slow down.
coverage: $(READY)
	@$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow' --cov --cov-report=

test-slow: $(READY)
	@FREEVARS_EXAMPLES=100 $(BIN)/python -m pytest -n auto --dist worksteal -m slow

# Takes its time; the page that it writes is part of the site.
bench: $(READY)
	@$(BIN)/python -m benchmarks --write docs/benchmarks.md

bench-quick: $(READY)
	@$(BIN)/python -m benchmarks --quick

lint: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .

# The library, and what a user's type checker makes of it: mistakes have to be found there.
types: $(READY)
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/mypy --no-error-summary --config-file tests/typing/mypy.ini tests/typing/*.py
	@$(BIN)/basedpyright --level error -p tests/typing --pythonpath $(BIN)/python

# Every code block that a reader may paste: in docstrings, in the README, in docs/.
docs: $(READY)
	@$(QUICKLY) -m pytest -n0 --doctest-modules src/freevars
	@$(QUICKLY) tools/check_docs.py

# The compatibility matrix, measured and compared with the page that shows it.
matrix: $(READY)
	@$(QUICKLY) -W ignore -m benchmarks.behaviour --check docs/behaviour.md

# The pages, the reference and the gallery, in build/site; then a look at them in a browser, where there is
# one. Strict: a broken link fails. Examples that have run since they were changed do not run again.
site: $(READY) .venv-site/.ready
	@$(QUICKLY) tools/gallery.py --changed
	@NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs --quiet build --strict
	@$(BIN)/python -m pytest -n0 -rs tests/test_site_in_browser.py

.venv-site/.ready: pyproject.toml
	@$(PYTHON) -m venv .venv-site
	@.venv-site/bin/python $(PIP) install '.[docs,release]'
	@touch $@

# What would be uploaded: built, checked, installed where nothing of the project is, and the README run there.
dist-check: .venv-site/.ready .venv-dist/.ready
	@.venv-site/bin/python tools/check_dist.py .venv-dist/bin/python $(if $(RELEASE),--release)

.venv-dist/.ready: pyproject.toml
	@$(PYTHON) -m venv .venv-dist
	@.venv-dist/bin/python $(PIP) install '.[all]'
	@touch $@

# The quick tests of the JAX host with the newest JAX on the newest Python (on this one, if the machine has
# none newer), and with the oldest supported JAX on this one. Each has its own environment, and tests
# the built wheel rather than the source folder.
JAX_TESTS = tests/jax/test_compat.py tests/jax/test_selftest.py tests/jax/convert tests/jax/host \
	tests/jax/rules/test_rules.py tests/jax/rules/test_verdict.py tests/test_imports.py \
	tests/names tests/report
test-newest: .venv-newest/.ready
test-oldest: .venv-oldest/.ready
test-newest test-oldest: test-%:
	@.venv-$*/bin/python $(PIP) install --no-deps --force-reinstall .
	@.venv-$*/bin/python -c 'import jax, sys; print("$*:", sys.version.split()[0], "jax", jax.__version__)'
	@.venv-$*/bin/python -m pytest -n auto --dist worksteal -m 'not slow' $(JAX_TESTS)

# The quick tests of the PyTorch host with the newest PyTorch that installs, and with the oldest
# supported one: what a release can break, and one of each kind of the rest.
TORCH_TESTS = tests/torch/test_compat.py tests/torch/test_closure.py tests/torch/test_pytorch_itself.py \
	tests/torch/convert/test_places.py tests/torch/convert/test_unseen_reads.py \
	tests/torch/convert/test_kinds.py tests/torch/convert/test_convert_errors.py \
	tests/torch/test_distributed.py
test-torch-newest: .venv-torch-newest/.ready
test-torch-oldest: .venv-torch-oldest/.ready
test-torch-newest test-torch-oldest: test-torch-%:
	@.venv-torch-$*/bin/python $(PIP) install --no-deps --force-reinstall .
	@.venv-torch-$*/bin/python -c 'import sys, torch; print("$*:", sys.version.split()[0], "torch", torch.__version__)'
	@.venv-torch-$*/bin/python -m pytest -n auto --dist worksteal $(TORCH_TESTS)

.venv-torch-newest/.ready: pyproject.toml
	@$(PYTHON) -m venv .venv-torch-newest
	@.venv-torch-newest/bin/python $(PIP) install --upgrade --upgrade-strategy eager '.[test-torch]'
	@touch $@

.venv-torch-oldest/.ready: pyproject.toml
	@$(PYTHON) -m venv .venv-torch-oldest
	@.venv-torch-oldest/bin/python $(PIP) install '.[test-torch]' "$$($(PYTHON) tools/oldest.py torch)"
	@touch $@

.venv-newest/.ready: pyproject.toml
	@"$$($(PYTHON) tools/newest_python.py || echo $(PYTHON))" -m venv .venv-newest
	@.venv-newest/bin/python $(PIP) install --upgrade --upgrade-strategy eager '.[test-jax]'
	@touch $@

.venv-oldest/.ready: pyproject.toml
	@$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python $(PIP) install '.[test-jax]' "$$($(PYTHON) tools/oldest.py jax)"
	@touch $@

clean:
	rm -rf .venv .venv-site .venv-dist build dist .venv-newest .venv-oldest .venv-torch-newest .venv-torch-oldest out
