# `make demo` shows what PiSSA does, `make test` checks it; both set up .venv on their first run.
#   make setup PYTHON=python3.12      another interpreter
#   make demo DEMO_ARGS=--quick       arguments for `pissa demo`
#   make test TEST_ARGS='-k export'   arguments for pytest
#   make test WORKERS=0               in one process, for a debugger; THREADS=2 for more threads in each
#   make gpu GPU_PYTHON=python3       with another Python and what it has, without setup; GPU_OUT=DIR for the results

VENV ?= .venv
PYTHON ?= python3
THREADS ?= 1
WORKERS ?= logical
export PISSA_CACHE ?= $(abspath .cache)
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
GPU_PYTHON ?=
GPU_OUT ?= benchmarks/results
GPU_ARGS ?=

BIN := $(VENV)/bin
# Dependency groups (PEP 735) need pip 25.1, which a new environment of Python 3.10 or 3.11 does not bring.
PIP := $(BIN)/python -m pip install --disable-pip-version-check
STAMP := $(VENV)/.setup-stamp

# Data sets for the tests, where they lie beside the clone; tests that need them skip elsewhere.
ifeq ($(origin PISSA_DATA),undefined)
ifneq ($(wildcard ../shared/data/.),)
export PISSA_DATA := $(abspath ../shared/data)
endif
endif

# More threads than free cores make a small model many times slower.
QUIET_THREADS := OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) OPENBLAS_NUM_THREADS=$(THREADS)
PYTEST := $(QUIET_THREADS) HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest
# A process on every core, each with one thread; every process loads torch and transformers, about 1 GiB.
PARALLEL := $(PYTEST) --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: help setup demo test test-studies test-all test-clients lint format docs bench gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make setup     .venv with everything that demo and tests need (done once)"
	@echo "make demo      fine-tune a real model with PiSSA and with LoRA, side by side"
	@echo "make test      the tests; make test-all adds the slow ones"
	@echo "make test-studies  the tests of the studies, which measure the claims of the paper again"
	@echo "make test-clients  exports in vLLM, llama.cpp, PEFT and LLaMA-Factory, each installed for it (hours)"
	@echo "make lint      ruff and pyright; make format mends what ruff can"
	@echo "make docs      check links, commands and names in the pages, and build the site into site/"
	@echo "make bench     every benchmark; make bench-NAME runs benchmarks/NAME.py"
	@echo "make gpu       one pass of at most eight minutes over a GPU: checks, times, docs/gpu.md"
	@echo "make clean     remove caches and build outputs, not .venv, runs or models"

setup: $(STAMP)

# An environment that works is kept. One that does not (interrupted, or its Python gone) is made again.
$(STAMP): pyproject.toml constraints.txt $(BIN)/python
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "pissa needs Python 3.10 or newer; name one: make setup PYTHON=python3.12" >&2; exit 1; }; \
	  echo "making $(VENV)"; \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    rm -rf $(VENV); \
	    echo "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	$(PIP) 'pip>=25.1'
	$(PIP) --editable '.[dev]' --group studies --constraint constraints.txt
	@touch $@

$(BIN)/python: ;

demo: setup
	$(BIN)/pissa demo $(DEMO_ARGS)

test: setup
	$(PARALLEL) $(TEST_ARGS)

test-studies: setup
	$(PARALLEL) studies $(TEST_ARGS)

test-all: setup
	$(PARALLEL) tests studies -m '' --hypothesis-profile search $(TEST_ARGS)

test-clients: setup
	$(PYTEST) tests/clients -m clients --timeout 7200 $(TEST_ARGS)

lint: setup
	@failed=; for check in 'ruff check .' 'ruff format --check .' pyright; do \
	  echo "$$check"; PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/$$check || failed=1; \
	done; test -z "$$failed"

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(PYTEST) tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(patsubst benchmarks/%.py,bench-%,$(filter-out benchmarks/make_%,$(wildcard benchmarks/*.py)))

bench-%: benchmarks/%.py setup
	$(QUIET_THREADS) $(BIN)/python $< $(BENCH_ARGS)

gpu: $(if $(GPU_PYTHON),,setup)
	PYTHONPATH=src$(if $(PYTHONPATH),:$(PYTHONPATH)) HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	  $(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu --out '$(GPU_OUT)' $(GPU_ARGS)

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	find src studies tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
