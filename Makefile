# make setup | demo | test | test-slow | test-all | test-tpu | lint | clean
# Another interpreter: make setup PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
RUNS := .venv/setup.stamp
TESTS := .venv/tests.stamp
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: setup demo test test-slow test-all test-tpu lint clean

setup: $(RUNS)

$(BIN)/pip:
	@"$(PYTHON)" -c "$(IS_NEW_ENOUGH)" 2>/dev/null || { \
	  echo "focus_jax needs Python 3.11 or newer; $(PYTHON) gives: $$("$(PYTHON)" -V 2>&1)"; \
	  echo "Name another interpreter: make setup PYTHON=python3.12"; exit 1; } >&2
	"$(PYTHON)" -m venv .venv

# Stamps are written last: an interrupted setup starts again, a finished one costs nothing.
$(RUNS): requirements.txt pyproject.toml | $(BIN)/pip
	@$(BIN)/python -c "$(IS_NEW_ENOUGH)" || { \
	  echo ".venv holds $$($(BIN)/python -V), focus_jax needs 3.11 or newer."; \
	  echo "Remove .venv and run make setup again."; exit 1; } >&2
	@echo "Installing into .venv; the first time this takes some minutes."
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

# What tests and checks need besides, torch the largest of it: the demo does without.
$(TESTS): requirements-test.txt $(RUNS)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-test.txt
	@touch $@

demo: setup
	$(BIN)/python -m focus_jax demo --workdir runs/demo

test: $(TESTS)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(TESTS)
	$(BIN)/python -m pytest -n 2 -m slow

test-all: $(TESTS)
	$(BIN)/python -m pytest -n 2

# The compiler for TPUs, as jax pins it, in a folder of its own: .venv stays free of it.
TPU := .venv/tpu
LIBTPU := import importlib.metadata as m; \
  print(next(r.partition(";")[0].strip() for r in m.requires("jax") if r.startswith("libtpu")))

$(TPU)/libtpu: | setup
	$(BIN)/python -m pip install --quiet --no-deps --target $(TPU) \
	  "$$($(BIN)/python -c '$(LIBTPU)')"

# Programs compiled for TPUs that are not here; the other tests leave these out.
test-tpu: $(TESTS) $(TPU)/libtpu
	PYTHONPATH=$(TPU) $(BIN)/python -m pytest tests/pods

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Leaves .venv and runs/, which are dear to make again.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./.venv/*" -prune -exec rm -rf {} +
