# `make demo` and `make test` set up everything they need in .venv and run; TORCH=2.12 tests another supported torch,
# WORKERS is how many processes share the tests.

PYTHON ?= python3
TORCH ?=
VENV ?= .venv$(TORCH)
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test test-all lint typecheck clean

demo: $(VENV)/ready
	$(BIN)/python -m gtcompile.tools.demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -m "not long" -n $(WORKERS) --dist loadfile

test-all: $(VENV)/ready
	$(BIN)/python -m pytest -q

lint: $(VENV)/ready-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# passes/ and tools/ are packages only once installed, so mypy reads an installed copy
typecheck: $(VENV)/ready-dev
	rm -rf build/typecheck && $(BIN)/pip install -q --no-deps --target build/typecheck .
	cd build/typecheck && MYPYPATH=. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p gtcompile

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(TORCH),"torch==$(TORCH).*") -e ".[test]"
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf .venv* build dist *.egg-info
