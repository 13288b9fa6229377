# make demo: set up, run the main job on the embedded default, say where the report is.
# make test: set up with the test extra, lint, run the tests; make quick: those that take no seconds, without linting;
# make soak: those that take minutes and are in none of the others. make fuzz: an hour of hostile files (tests/fuzz.py).
# make bench-smoke: have compiled programs grown?

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/demo
BIN := $(VENV)/bin
# Tests run on a few workers, each pinned to a core (tests/conftest.py), file by file in the order of the collection.
WORKERS := -n auto --dist loadfile --no-loadscope-reorder

# Bytecode is kept even where the environment says no: every process of the tests would compile all sources anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo expected test quick soak fuzz lint clean bench-smoke

demo: expected $(VENV)/.run
	$(BIN)/python -m listopd_jax.main --config=configs/fashion.py:demo --workdir=$(WORKDIR)

expected:
	@echo "Installing takes a minute or two, the demo 2 to 5 minutes on two cores. Stop it whenever you like: the same command resumes."

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -q --durations=20 $(WORKERS)

quick: $(VENV)/.test
	$(BIN)/python -m pytest -q -m "not slow and not soak" $(WORKERS)

soak: $(VENV)/.test
	$(BIN)/python -m pytest -q -m soak

fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz.py --out=docs/results/fuzz.json

bench-smoke: $(VENV)/.test
	$(BIN)/python -m benchmarks.smoke

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# The CPU build of torch, an oracle of the tests, is asked for first: a plain "torch" may bring gigabytes of CUDA.
$(VENV)/.test: setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
