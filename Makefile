PYTHON ?= python3
FLOOR_PYTHON ?= python3.10
VENV ?= .venv
FLOORS ?= .venv-floors
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install pretrain study-report check test lint floors docs clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-13s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch --constraint constraints.txt
	$(BIN)/pip install --quiet --editable '.[dev]' --constraint constraints.txt
	command -v npm > /dev/null && npm ci --silent --ignore-scripts --no-audit --no-fund --prefix demo/browser || echo "npm is missing or failed: the tests of the JavaScript runner are skipped"
	touch $@

install: $(VENV)/installed  ## Install the package with everything for training and tests into .venv

pretrain: install  ## Run the demo: pre-finetune the packaged encoder for NER and TC, a few minutes on 2 cores
	$(BIN)/python train/pretrain.py

study-report: install  ## Fill in all tables and pictures of the study from its raw records
	$(BIN)/python eval/study/run.py report

check: install lint  ## Lint, check types, run the fast tests on all cores
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist worksteal

test: install lint  ## Lint, check types, run all tests on all cores
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: install  ## Lint and check types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

floors:  ## Install exactly the lowest versions that pyproject.toml allows (FLOOR_PYTHON), run the fast tests
	$(FLOOR_PYTHON) -m venv --clear $(FLOORS)
	$(FLOORS)/bin/pip install --quiet --upgrade pip
	$(FLOORS)/bin/pip install --quiet --no-deps --editable .
	$(FLOORS)/bin/python tests/floors.py > $(FLOORS)/floors.txt
	$(FLOORS)/bin/pip install --quiet --editable '.[test]' --constraint $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pytest -m "not slow" --numprocesses auto --dist worksteal

docs: install  ## Build the documentation site into site/, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## Remove virtual environments, the site and caches, not the runs
	rm -rf $(VENV) $(FLOORS) site build *.egg-info .pytest_cache .ruff_cache .mypy_cache
