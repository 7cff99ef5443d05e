# make demo   a question about a picture, answered with all visual tokens and with half of them
# make test   lint, then the tests
# make lint   ruff and mypy
# make clean  remove what the others made
#
# Needs python3 3.10 or newer; everything else goes into .venv, which all of them share.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test lint clean

demo: $(VENV)/.demo-ready
	$(BIN)/python -m mlx_vlm_prune.generate

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The markers say what is installed; they are made again when the requirements change.
$(VENV)/.demo-ready: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e .
	touch $@

$(VENV)/.test-ready: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e '.[test]'
	touch $@ $(VENV)/.demo-ready

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
