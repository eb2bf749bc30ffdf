# `make` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo test check docs slow floor floor-core clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
FLOOR := .venv-floor
# What the lowest versions have broken before: bf16, loading, LoRA and its files, the methods, the Python API.
CORE := tests/training/test_bf16.py tests/backbones/test_conformance.py tests/backbones/test_lora.py tests/roles/test_adapters.py \
	tests/student/test_final.py tests/methods tests/test_api.py

# The build of torch. Not set: what pip finds by itself; on Linux without an NVIDIA driver the CPU build, which saves gigabytes of CUDA.
# `make setup TORCH_INDEX=URL` takes it from that index, `make setup TORCH_INDEX=` always takes what pip finds.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

# Two test processes with two threads each are many times slower than with one (OpenMP's spinning barriers).
test slow floor floor-core: export OMP_NUM_THREADS := 1

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## make .venv with the versions of constraints.txt

demo: setup ## distil the bundled teacher on this machine and open the report
	$(BIN)/fewstep distill demo

test: check ## every check that CI runs
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 $(PYTEST_ARGS)

check: setup ## lint, format, types and the docs site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) docs

docs: setup ## build the docs site strictly, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir site

slow: setup ## the tests that take minutes
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

floor: $(FLOOR)/.installed ## every test that is not slow, with the lowest versions that pyproject.toml allows
	$(FLOOR)/bin/python -m pytest -q -n logical --maxprocesses 4 $(PYTEST_ARGS)

floor-core: $(FLOOR)/.installed ## the core of them: a few minutes, which CI takes too
	$(FLOOR)/bin/python -m pytest -q -n logical --maxprocesses 4 $(CORE) $(PYTEST_ARGS)

clean: ## remove caches and built packages; runs/ and .venv stay
	rm -rf dist site .mypy_cache .pytest_cache .ruff_cache
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: PYTHON=$(PYTHON) is not Python 3.10 or newer; run: make setup PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@index='$(TORCH_INDEX)'; \
	if [ '$(origin TORCH_INDEX)' = undefined ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
		! $(PIP) index versions torch 2>/dev/null | grep -qF '$(TORCH)+cpu'; then index=$(CPU_INDEX); fi; \
	set -x; $(PIP) install --no-deps -c constraints.txt $${index:+--extra-index-url "$$index"} torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

# uv knows how to resolve to the lowest; torch as the package index has it, or from TORCH_INDEX.
$(FLOOR)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(FLOOR)
	$(FLOOR)/bin/python -m pip --disable-pip-version-check install 'uv>=0.11,<1'
	$(FLOOR)/bin/uv pip install --python $(FLOOR)/bin/python --resolution lowest-direct $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') -e '.[dev]'
	@touch $@
