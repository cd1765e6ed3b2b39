# `make demo` and `make test` are one command each on a fresh machine: they set up a virtual environment and run.
#
#   TORCH=2.12   use this torch release (its own environment, .venv2.12); default: the newest supported one
#   WORKERS=2    processes that share the tests
#   PYTHON=...   the Python to create environments with

PYTHON ?= python3
TORCH ?=
WORKERS ?= 2
VENV ?= .venv$(TORCH)
BIN := $(VENV)/bin
# Linting and the documentation need neither torch nor the package, so each has a small environment of its own.
LINT := .venv-lint/bin
DOCS := .venv-docs/bin

.PHONY: demo demo-real test test-slow test-all lint typecheck docs linkcheck clean

demo: $(VENV)/ready
	$(BIN)/python -m gtcompile.tools.demo

# A real pretrained model and real abstracts, which two packages carry; twenty minutes on two busy cores.
demo-real: $(VENV)/ready-real
	$(BIN)/python -m gtcompile.tools.demo.real

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -m "not slow and not long" -n $(WORKERS) --dist worksteal

# Several ranks, trainers to their end, matrices of cases: what make test leaves out and CI runs.
test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -m "slow and not long" -n $(WORKERS) --dist worksteal

test-all: $(VENV)/ready
	$(BIN)/python -m pytest -q

lint: .venv-lint/ready
	$(LINT)/ruff check . && $(LINT)/ruff format --check .

# passes/ and tools/ become packages only when installed, so mypy checks an installed copy.
typecheck: $(VENV)/ready-types
	rm -rf build/typecheck && $(BIN)/pip install -q --no-deps --target build/typecheck .
	cd build/typecheck && MYPYPATH=. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p gtcompile

# A warning, which includes a broken link between pages, fails the build.
docs: .venv-docs/ready
	$(DOCS)/sphinx-build -q -E -W --keep-going -b html docs build/docs
	@echo "The documentation is in build/docs/index.html"

# Links to other sites. Not part of CI, which must not fail because another site is down.
linkcheck: .venv-docs/ready
	$(DOCS)/sphinx-build -q -b linkcheck docs build/linkcheck

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(TORCH),"torch==$(TORCH).*") -e ".[test]"
	touch $@

$(VENV)/ready-real: $(VENV)/ready
	$(BIN)/pip install -q -e ".[demo-real]"
	touch $@

# Dependency groups ([dependency-groups] in pyproject.toml) need pip 25.1.
$(VENV)/ready-types: $(VENV)/ready
	$(BIN)/pip install -q "pip>=25.1"
	$(BIN)/pip install -q --group types
	touch $@

.venv-%/ready: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -q "pip>=25.1"
	.venv-$*/bin/pip install -q --group $*
	touch $@

clean:
	rm -rf .venv* build dist *.egg-info
