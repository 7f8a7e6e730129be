PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NEWEST := .venv.newest
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1 \t\2/' | expand -t 20

demo: $(VENV)/installed  ## train the embedded model on embedded pairs (half a minute on two cores once installed)
	$(BIN)/python -m dpo_kit

test: $(VENV)/installed  ## the quick tests (6 to 16 minutes on two cores)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/installed-all  ## every test, whole runs of every method among them (60 minutes)
	$(BIN)/python -m pytest -n 2

faults: $(VENV)/installed-all  ## every fault that is promised to be survived, with a table of what it cost (10 minutes)
	$(BIN)/python -m pytest -n 2 -m fault

newest:  ## the tests of config and schema, and one run, with the newest TRL of the index (own environment; 10 minutes)
	$(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --constraint $(NEWEST)/constraints.txt --editable '.[dev]'
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --constraint $(NEWEST)/constraints.txt trl transformers datasets accelerate peft
	$(NEWEST)/bin/python -m dpo_kit env
	$(NEWEST)/bin/python -m dpo_kit trl.max_steps=4 tracking=none hydra.run.dir=$(NEWEST)/run-$$$$
	$(NEWEST)/bin/python -m pytest -m "not slow" tests/config/test_config.py tests/config/test_experiments.py tests/trainer/test_exactness.py tests/test_architecture.py

check: $(VENV)/installed  ## format, lint and types; changes nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/installed  ## bring the code into form
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/installed  ## start-up time, cost of the probe and of safe checkpoints, speed beside stock TRL, on a GPU too (over two hours)
	$(BIN)/python examples/benchmark/bench.py
	$(BIN)/python examples/benchmark/checkpoints.py
	$(BIN)/python examples/benchmark/speed.py
	$(BIN)/python examples/benchmark/operations.py
	$(BIN)/python examples/benchmark/gpu.py

clean:  ## remove what builds and tests left behind
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/installed-all: $(VENV)/installed
	@echo "installing the extras dashboard, slurm, ray, serve and eval (two minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,dashboard,slurm,ray,serve,eval]'
	@touch $@

.PHONY: help demo test test-all newest faults check format bench clean
.DEFAULT_GOAL := help
