# One virtual environment for everything; `make demo` and `make test` set it up themselves.
VENV ?= .venv
PYTHON ?= python3.11
BIN := $(VENV)/bin

.PHONY: demo test setup lint clean

setup: $(VENV)/.done

# constraints.txt pins torch to a version whose CPU build is enough for the demo and the tests. On a GPU machine install
# torch your usual way first, then `pip install lora-ensemble`.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: setup
	PATH="$(abspath $(BIN)):$$PATH" bash demo.sh

# A process of tests for each core, but for the memory at most four; the long ones are handed on at the end.
test: setup lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo
