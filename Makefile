# All that a newcomer, a colleague or CI runs. Each target sets up what it needs, once; `make help` lists them.

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# A stamp is newer than what it was made from, so a change there sets up again, and nothing else does.
SOURCES := pyproject.toml constraints.txt
USER    := $(VENV)/.installed
DEV     := $(VENV)/.installed-dev
DOCS    := $(VENV)/.installed-docs

# The oldest torch that we support, which GPUs run here, in an environment of its own.
OLD_TORCH := 2.11.0
OLD_VENV  := .venv-torch-$(OLD_TORCH)
OLD       := $(OLD_VENV)/.installed

# Tests that need no other machine than this, two side by side: worlds of eight in one, what waits and what is alone beside them.
HERE := not gpu and not launchers
SIDE := -n 2 --dist loadgroup --no-loadscope-reorder
OLD_TESTS := $(addprefix tests/,collectives parallel_state distributed tensor_parallel pipeline_parallel \
  context_parallel experts models attention kernels checkpoint train)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-nightly test-all test-oldest-torch test-pure test-gloo test-gpu test-launchers mutants drills verified lint format docs docs-check hooks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\n  ARGS="..." is passed on:  make train ARGS="--steps 300"   make test ARGS="-k pool"\n'

train: $(USER) ## set up, then train the demo: tp=2 x pp=2 x dp=2 on this machine's CPU
	@$(BIN)/stretto train --preset demo $(ARGS)

test: $(DEV) ## set up, then run the tests of a commit: all that need no GPU and no cluster, but for the nightly ones
	@$(BIN)/pytest $(SIDE) -m "$(HERE) and not nightly" $(ARGS)

test-nightly: $(DEV) ## what `make test` leaves out: full products, and 200 examples of each property
	@$(BIN)/pytest $(SIDE) -m "$(HERE) and (nightly or hypothesis)" --hypothesis-profile nightly $(ARGS)

test-all: $(DEV) ## both at once
	@$(BIN)/pytest $(SIDE) -m "$(HERE)" --hypothesis-profile nightly $(ARGS)

test-oldest-torch: $(OLD) ## the tests that depend on torch, under the oldest that we support (downloads 3 GB, once)
	@$(OLD_VENV)/bin/pytest $(SIDE) -m "$(HERE) and gloo and not nightly" $(OLD_TESTS) $(ARGS)

test-pure: $(DEV) ## the tests that import no torch: seconds
	@$(BIN)/pytest -m pure $(ARGS)

test-gloo: $(DEV) ## the tests with real processes over Gloo: minutes
	@$(BIN)/pytest $(SIDE) -m "gloo and not nightly" $(ARGS)

test-gpu: $(DEV) ## the tests that need CUDA devices
	@$(BIN)/pytest -m gpu $(ARGS)

test-launchers: $(DEV) ## the tests under a real SLURM and MPI, which are installed and started for it (as root)
	@bash .ci/launchers $(BIN)/pytest -m launchers $(ARGS)

mutants: $(DEV) ## put faults into the package, one at a time: which check notices each
	@$(BIN)/python tests/verify/verify_mutants.py $(ARGS)

drills: $(DEV) ## stop and kill ranks of real runs at random moments, and trainers and writers in their saves (25 minutes)
	@$(BIN)/python tests/drills/drill_saves.py
	@$(BIN)/python tests/drills/drills.py $(ARGS)

verified: $(DEV) ## measure every combination in docs/verified.md anew
	@$(BIN)/python -m benchmarks.verified docs/verified.md

lint: $(DEV) ## formatting, lint, strict types, and who may import whom
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(DEV) ## let ruff rewrite what it can
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

docs: $(DOCS) ## build the documentation site in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

docs-check: $(DEV) ## links, versions, dependencies and the structure agree with the documents
	@$(BIN)/pytest tests/repo $(ARGS)

hooks: $(DEV) ## run the lint before each commit
	@$(BIN)/pre-commit install

clean: ## remove what was built, set up or trained here
	@rm -rf $(VENV) .venv-torch-* build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Stretto needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ..." % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(USER): $(SOURCES) | $(BIN)/python
	@echo "Setting up $(VENV) with $$($(BIN)/python -V); about a minute the first time ..."
	@$(PIP) -e .
	@touch $@

$(DEV): $(SOURCES) | $(BIN)/python
	@echo "Setting up $(VENV) for development with $$($(BIN)/python -V); about a minute the first time ..."
	@$(PIP) -e '.[dev]'
	@touch $(USER) $@

$(OLD): $(SOURCES) | $(BIN)/python
	@echo "Setting up $(OLD_VENV) with torch $(OLD_TORCH); some minutes the first time ..."
	@$(BIN)/python -m venv $(OLD_VENV)
	@sed 's/^torch==.*/torch==$(OLD_TORCH)/' constraints.txt > $(OLD_VENV)/constraints.txt
	@$(OLD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLD_VENV)/constraints.txt -e '.[dev]'
	@touch $@

$(DOCS): $(SOURCES) | $(BIN)/python
	@echo "Setting up $(VENV) for the documentation ..."
	@$(PIP) -e '.[docs]'
	@touch $(USER) $@
