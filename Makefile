# Targets: `make help`. Everything runs from .venv, which the first target that needs it creates.
#
# Without a GPU, torch and Triton are pinned to what the tests were written against. On a machine with CUDA (nvidia-smi is there)
# or with USE_SYSTEM_TORCH=1, .venv sees the system's packages and keeps its torch and Triton.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python3.14,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
VENV := .venv
RUN := $(VENV)/bin/python
USE_SYSTEM_TORCH ?= $(shell command -v nvidia-smi)

TORCH := torch==2.13.0
TRITON := triton==3.9.0
# The oldest Triton served; its interpreter needs a numpy before 2.4.
OLD_TRITON := triton==3.6.0 numpy<2.4
OLD_TRITON_DIR := $(VENV)/triton-3.6.0

GPU_TEST_PROCESSES ?= 8

ARCHS ?= sm_80 sm_86 sm_90 sm_100 sm_120 gfx942

.PHONY: help install demo test test-gpu lint format types bench compile clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | column -t -s '|'

install: $(VENV)/installed ## create .venv with the package, the demo's, tests' and developers' tools

# Not compiled: pip would take as long to compile modules that nobody imports as to install all of them. Python keeps what is
# imported, also where the environment says that it shall not: the tests start torch dozens of times.
unexport PYTHONDONTWRITEBYTECODE

$(VENV)/made: pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "Weft needs Python 3.11 or later on the path (or PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(if $(USE_SYSTEM_TORCH),--system-site-packages) $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/made
	$(if $(USE_SYSTEM_TORCH),,$(RUN) -m pip install --quiet --no-compile $(TORCH))
	$(RUN) -m pip install --quiet --no-compile --editable '.[demo,test,dev]'
	$(if $(USE_SYSTEM_TORCH),,$(RUN) -m pip install --quiet --no-compile --no-deps $(TRITON))
	touch $@

$(OLD_TRITON_DIR)/installed: $(VENV)/made
	rm -rf $(OLD_TRITON_DIR)
	$(RUN) -m pip install --quiet --no-compile --no-deps --target $(OLD_TRITON_DIR) $(foreach r,$(OLD_TRITON),'$(r)')
	touch $@

demo: install ## train a small Llama in one process and on four context-parallel ranks, compare and draw them
	$(VENV)/bin/weft demo

test: ## every check that needs no GPU; the last line is the count
	@$(MAKE) --no-print-directory --jobs 2 $(VENV)/installed $(OLD_TRITON_DIR)/installed
	$(RUN) tools/test_all.py --old-triton $(OLD_TRITON_DIR)

# Several processes: nearly all of the time is compiling.
test-gpu: ## the tests that need a GPU, with PYTHON's own torch, pytest and pytest-xdist
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests/gpu -n $(GPU_TEST_PROCESSES) -q

lint: install ## ruff check and the format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: install ## reformat, and mend what ruff can mend
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: install ## mypy
	$(RUN) -m mypy

bench: install ## measure on this machine's GPU
	$(VENV)/bin/weft bench

compile: install ## compile every kernel of every launch table for ARCHS, no GPU needed
	$(VENV)/bin/weft compile --arch $(ARCHS)

clean: ## remove what the other targets made
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
