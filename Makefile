# make demo: install, then distil real images and print what the set is worth.
# make test: install, lint, fast tests. Both need only Python >= 3.10 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow soak gpu bench study lint format clean

$(STAMP): requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m krr_st.demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 3600

# Kills, damaged saves, full disks, malformed inputs: make soak SECONDS=3600 SEED=1
SECONDS ?= 600
SEED ?= 0
soak: $(STAMP)
	$(BIN)/python tests/faults/soak.py --seconds $(SECONDS) --seed $(SEED)

# With the virtual environment, or where there is none with a PYTHON that has torch and pytest already.
gpu:
	@if test ! -x $(BIN)/python && $(PYTHON) -c 'import torch, pytest' 2>/dev/null; \
	then python=$(PYTHON); else $(MAKE) $(STAMP) && python=$(BIN)/python; fi && \
	set -x && $$python -m pytest -o addopts= -q -m gpu tests/test_gpu.py

# Ratios against the plain forms; nothing else should run on the machine.
bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

# What distilled images are worth; DATA holds a prepared set (cifar10 at 16 pixels by default).
DATA ?= datasets
study: $(STAMP)
	$(BIN)/python -m krr_st.study --data_dir $(DATA) $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo_run .pytest_cache .ruff_cache
