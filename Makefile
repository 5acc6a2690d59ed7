# Needs Python 3.11 or newer and nothing else.
#
#   make demo             environment, requirements, the main training run
#   make test             environment, requirements, lint and tests
#   make test-long        the same environment, the tests that take longest and the four notebooks
#
# PYTHON=python3.12 chooses the interpreter, VENV=DIR the folder of the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
ACTIVATE := export PATH="$(BIN):$$PATH"

.PHONY: demo test test-long

demo: $(VENV)/.requirements
	$(ACTIVATE) && python train.py --method adt --overwrite
	@echo "Open runs/adt-glyphs-seed0/before_after.png: samples from the same noise, before and after ADT."

test: $(VENV)/.requirements-dev
	$(ACTIVATE) && ruff check .
	$(ACTIVATE) && python -m pytest

test-long: $(VENV)/.requirements-dev
	$(ACTIVATE) && python -m pytest -m "thorough or notebooks" -n 2 --dist load

$(VENV)/bin/python:
	$(PYTHON) -m venv "$(VENV)"

$(VENV)/.requirements: requirements.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.requirements-dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
