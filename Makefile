# make demo, make test, make wheel: each sets up what it needs. make test-full: the long tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-full wheel lint clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt setup.py $(wildcard src/tailorbird/kernels/cpp/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	rm -rf out/demo out/demo.partial out/demo.rejected
	$(BIN)/tailorbird fit demo --memory 30% --output out/demo
	$(BIN)/tailorbird generate out/demo "def read_lines(path):" --max-tokens 64

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two files at a time, each on one thread, unless a test asks for more.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not full' -n 2 --dist loadfile

test-full: lint
	$(BIN)/python -m pytest

# For this system and this version of Python, with the compiled library; without a compiler it fails.
wheel: setup
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(BIN)/python -m zipfile --list dist/*.whl | grep kernels/_native

clean:
	rm -rf out build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
