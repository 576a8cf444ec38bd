# make demo: the main job on the built-in example.   make test: the whole test suite.
# make docs: writes docs/methods from the catalogue.  Tests run a process for each core, of one thread: tiny models gain nothing by two.
# All make .venv first and install exactly what constraints.txt says; the second time they find it ready.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs clean

demo: .venv/ready
	$(BIN)/selectune demo

test: .venv/ready-test
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy src benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --durations 30 --durations-min 10

docs: .venv/ready
	$(BIN)/selectune methods write docs/methods

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit('Selectune needs Python 3.11 or newer; name one with: make demo PYTHON=python3.12' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/ready-test: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv runs build dist *.egg-info src/*.egg-info
