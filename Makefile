# Each target sets up what it needs: a virtual environment with a CPU build of torch (constraints.txt).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow lint wheel reproduce bench gpu-check train-testbed clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch" setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.ready  ## a real video through the embedded model, dense and three ways reduced
	$(BIN)/tokenreduce run demo --pipeline framefusion --pipeline fastv \
		--pipeline streaming_llm --output demo --force

test: $(VENV)/.ready  ## the tests
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.ready  ## the tests and the long ones: thousands of random cases
	$(BIN)/python -m pytest -n 2 -m "not gpu"

lint: $(VENV)/.ready  ## ruff, mypy, and the layering of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=adapters $(BIN)/lint-imports

wheel: $(VENV)/.ready  ## the package as one file, in dist/
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build

reproduce: $(VENV)/.ready  ## the paper's tables on the embedded model (under an hour; results in docs/reproduction)
	$(BIN)/python -m lab.reproduce

bench: $(VENV)/.ready  ## benchmarks (about two hours; results in benchmarks/results and docs/benchmarks.md)
	$(BIN)/python benchmarks/bench.py

gpu-check: $(VENV)/.ready  ## tests and benches that need a GPU, within 20 minutes; SMALL=1 rehearses them on tiny shapes
	$(BIN)/python benchmarks/gpu_check.py $(if $(SMALL),--small) --output gpu-check.json

train-testbed: $(VENV)/.ready  ## train the embedded model anew (about an hour of one core, resumable)
	$(BIN)/python -m lab.training.train

clean:
	rm -rf $(VENV) demo build dist *.egg-info
