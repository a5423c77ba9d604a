# Every target works in one environment, `.venv`, which the first of them makes. Needed: git, make, a C compiler and
# Python 3.10 to 3.12 (numpy 1, which verl 0.6.1 wants, has no wheels for later ones).

VENV ?= .venv
BIN = $(VENV)/bin
REQUIREMENTS = requirements/fsdp-sft.txt
INSTALLED = $(VENV)/.installed

# The first that runs and is of a version that will do: a name on the path may be a mere shim.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; \
	done)

# For pytest: the number of workers, or what to run, as in `make test PYTEST_ARGS="-k console"`.
PYTEST_ARGS ?= -n 2

.PHONY: help demo test lint clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## trains a small model on CPU for three minutes and shows what it says, round after round
	$(BIN)/python examples/demo.py

test: $(INSTALLED)  ## runs the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)  ## checks style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## removes the environment, the demonstration's files and all caches
	rm -rf $(VENV) demo outputs build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A changed pin is installed over what is there.
$(INSTALLED): $(REQUIREMENTS) pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.12 found: name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement $(REQUIREMENTS) --editable .
	@touch $@
