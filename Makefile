PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install pretrain study-report test lint clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-13s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch --constraint constraints.txt
	$(BIN)/pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

install: $(VENV)/installed  ## Install the package with everything for training and tests into .venv

pretrain: install  ## Run the demo: pre-finetune the packaged encoder for NER and TC, a few minutes on 2 cores
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no train/pretrain.py

study-report: install  ## Fill in all tables and pictures of the study from its raw records
	$(BIN)/python eval/study/run.py report

test: install lint  ## Lint, check types, run all tests on all cores
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: install  ## Lint and check types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Remove the virtual environment and caches, not the runs
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
