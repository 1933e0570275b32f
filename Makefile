PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
# Tests compile hundreds of small programs once each: fast compilation matters, fast code does not.
TEST_FLAGS := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1
# The stack of every operation in the program's text takes a tenth of the time, and no test reads it.
TEST_ENV = JAX_PLATFORMS=cpu JAX_TRACEBACK_IN_LOCATIONS_LIMIT=0 XLA_FLAGS="$(TEST_FLAGS) $(shell $(BIN)/python -c '$(OLD_JAX)')"
# Halves the time to compile, but XLA ends the process where it knows a flag no more.
OLD_JAX := import jax; print("--xla_cpu_use_fusion_emitters=false" * (jax.__version_info__ < (0, 11)))

# Of every part of the code what compiles least.
FAST := $(addprefix tests/,attention/kernels/test_contracts.py attention/test_masks.py attention/test_mechanism.py \
	experiments/analysis experiments/reporting/test_results.py experiments/reporting/test_tables.py \
	experiments/storage/test_leases.py experiments/training/test_pairing.py system/test_imports.py system/test_renamed.py)

# Modules are compiled when first imported: most of what is installed never is.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup ablation test test-fast test-slow test-kills test-clusters test-browser test-tpu accelerator lint docs constraints

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/:/'

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[test]'
	touch $@

setup: $(VENV)/.installed  ## Create the virtual environment with the tested versions.

ablation: setup  ## Run the quickstart ablation: which score, how many heads, which position?
	$(BIN)/python -m experiments.ablate --config=configs/quickstart.py --workdir=$(WORKDIR)

lint: setup  ## Check formatting, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Side by side, since the type checker has one thread.
test: setup  ## Run the tests, and lint (minutes).
	@$(MAKE) --no-print-directory -j2 lint pytest

# Three on two cores, since tests of commands wait for processes.
.PHONY: pytest
pytest: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n 3 --dist worksteal -m 'not slow'

test-fast: setup  ## Run the tests for work in between (about a minute): the contracts, statistics, reports, imports.
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' $(FAST)

test-slow: setup  ## Run the thorough tests (half an hour), but the kills.
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -m slow --ignore=tests/system/test_kills.py

test-kills: setup  ## Kill a launcher a hundred times at any instant; its results are those of a quiet one.
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -s -m slow tests/system/test_kills.py

test-clusters: setup  ## Run the launcher on a Ray cluster, as submitit's local jobs, and on a local S3.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[test-clusters]'
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/system/test_clusters.py tests/system/test_s3.py

test-browser: setup  ## Use the report in the machine's Chromium.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[test,browser]'
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow tests/system/test_browser.py

.PHONY: test-cuda
test-cuda: setup  ## Compile the Hopper kernels for an H100, without one (JAX 0.11, so Python 3.12).
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps $(foreach part,plugin pjrt,jax-cuda13-$(part)==$(shell $(BIN)/python -c 'import jax; print(jax.__version__)'))
	$(BIN)/uv pip install --quiet --python $(BIN)/python nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow tests/system/test_cuda.py

test-tpu: setup  ## Compile the kernels for a TPU, without one (downloads libtpu, 0.7 GB).
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[test,tpu]'
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(BIN)/python -m pytest -m slow tests/system/test_tpu.py
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(BIN)/python -m experiments.bench.tpu

# Also where this repository's environment is not: the plugin of the device is in another one then.
accelerator:  ## Check and measure all kernels of this GPU or TPU, in 8 minutes; jax and numpy are enough.
	$(shell test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) -m experiments.accelerator

docs: setup  ## Build the documentation into site/; a broken link or reference fails.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[test,docs]'
	JAX_PLATFORMS=cpu $(BIN)/python -m mkdocs build --strict

constraints: setup  ## Update constraints.txt to the newest versions.
	$(BIN)/uv pip compile setup.cfg --extra test-clusters --extra browser --extra docs --universal --python-version 3.11 --no-header --no-annotate --upgrade --output-file constraints.txt
