# `make` alone lists the targets. PYTHON picks the interpreter that .venv is made from.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint format docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(BIN)/installed ## make .venv with the exact versions of constraints.txt
	@:

# The stamp is newer than what it was made from, so an install is not repeated.
$(BIN)/installed: constraints.txt setup.cfg pyproject.toml
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || \
	  { echo "Python 3.11 or newer is needed$(if $(PYTHON),; $(PYTHON) is none). Name one: make venv PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv || \
	  { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@echo "installing into .venv (about 1.2 GB, a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: venv ## pretrain, fine-tune and compare on text that is already on this machine
	@$(BIN)/python -m zoo demo --workdir=runs/demo

test: venv ## the tests, without the slow ones
	@$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

test-all: venv ## all tests
	@$(BIN)/python -m pytest -q -n $(WORKERS)

lint: venv ## check style and formatting
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: venv ## mend style and formatting
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: venv ## write the tables in docs/ that are made from the code
	@$(BIN)/python -m zoo docs

clean: ## remove caches and build output, but neither .venv nor runs
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
