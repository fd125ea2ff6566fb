# `make demo` and `make test` work on a fresh machine with Python 3.11 (or 3.12, 3.13) and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
WORKERS ?= 2
# The packages that implement the paper: every line of them should be tested, by their own tests.
CORE := methods perturbation segmentor evaluation
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: help demo test coverage quick lint format docs wheel transcripts gpu clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	@touch $@

.venv/developing: .venv/installed  # the same environment plus what tests, lint and docs need
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

demo: .venv/installed  ## train MLPMatch on generated images: a table and pictures, in a few minutes
	$(BIN)/python -m mlpmatch_pl.train

test: .venv/developing lint  ## everything that CI runs: lint, types, tests, coverage
	$(PYTEST) $(CORE:%=tests/%) $(CORE:%=--cov=mlpmatch_pl.%) --cov-fail-under=95
	$(PYTEST) $(CORE:%=--ignore=tests/%) --durations=30

coverage: .venv/developing  ## the coverage of the whole package; measuring it makes the tests a quarter slower
	$(PYTEST) --cov=mlpmatch_pl --cov-report=term:skip-covered

quick: .venv/developing  ## the tests that take seconds: all but those marked slow
	$(PYTEST) -m "not slow"

lint: .venv/developing  ## lint, format, types, import contracts, spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: .venv/developing  ## fix what can be fixed automatically
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/developing  ## the documentation as a site without network: build/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: .venv/developing  ## source distribution and wheel in dist/
	$(BIN)/python -m build

transcripts: .venv/developing  ## run the commands in docs/commands.md and write what they print
	$(BIN)/python docs/transcripts.py

gpu:  ## on a CUDA machine: GPU tests, step benchmark, a short training
	benchmarks/gpu.sh

clean:  ## remove the environment and caches, not the runs
	rm -rf .venv build dist *.egg-info src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage
