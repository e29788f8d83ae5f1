# One virtual environment for everything; `make demo` and `make test` set it up themselves.
VENV ?= .venv
# The first Python that is at least 3.11; 3.11 itself is what constraints.txt was tested with.
PYTHON ?= $(shell for p in python3.11 python3 python python3.12 python3.13 python3.14 python3.15; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin

.PHONY: demo test test-slow setup lint clean

setup: $(VENV)/.done

# constraints.txt pins torch to a version whose CPU build is enough for the demo and the tests. On a GPU machine install
# torch your usual way first, then `pip install lora-ensemble`.
$(VENV)/.done: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python of at least version 3.11 found; install one, or say make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: setup
	PATH="$(abspath $(BIN)):$$PATH" bash demo/run.sh

# A process of tests for each core, but for the memory at most four; the long ones are handed on at the end.
test: setup lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# What takes minutes for one rare thing.
test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo/output
