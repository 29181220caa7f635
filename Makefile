# make test, make demo: each works from a bare clone, and is quick the second time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test check demo clean

test: check
	$(BIN)/python -m pytest

# Formatting, lint, types, and who may import whom.
check: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache >$(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }

demo: $(VENV)/.demo
	$(BIN)/acb demo --out demo-out

# One virtual environment for both; the tests' needs include the demo's.
$(VENV)/.dev: $(VENV)/pyvenv.cfg pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(VENV)/.dev $(VENV)/.demo

$(VENV)/.demo: $(VENV)/pyvenv.cfg pyproject.toml
	$(BIN)/pip install --quiet --editable '.[demo]'
	touch $(VENV)/.demo

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build *.egg-info demo-out
