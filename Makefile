# Everything from a clean clone: `make demo` and `make test` create the virtual environment themselves.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUT ?= runs/demo

# One thread for each process: two busy processes with two threads each are far slower on two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-fast lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt "torch" "numpy" "setuptools" "wheel"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: install
	$(BIN)/raygard demo --out $(DEMO_OUT)

# Tests that start clusters wait for processes to start for a third of their time, so two of them run at once;
# tests/together.py says which files share what takes minutes to make. All others run on every core.
test: install
	$(BIN)/python -m pytest -n auto -m "not distributed and not faults and not demo"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "distributed or faults or demo"

test-fast: install
	$(BIN)/python -m pytest -n auto -m "not distributed and not faults and not demo and not gpu and not fuzz"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
