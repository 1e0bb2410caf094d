# make demo     train one small MoE with `micro` and `global` on this machine and compare its experts (no GPU needed)
# make test     every test that runs without a GPU, with the pinned Megatron-Core
# make test-versions   the core of the gradient tests with every other supported Megatron-Core release
# make test-preview    the same with Megatron-LM's main: MEGATRON_LM_DIR is a git repository of it
# make test-frameworks   trains with Megatron Bridge, ms-swift and verl, which it installs beside the virtual environment (2 GB)
# make checks   format, lint, types
# All of them set themselves up: a virtual environment in .venv with the versions of constraints.txt.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUT ?= demo-out
# Processes that tests run in; some of them start up to 4 ranks of their own.
TEST_JOBS ?= 2
VERSIONS ?= 0.14.0 0.15.3 0.16.1 0.17.1 0.18.2
# The commit of Megatron-LM's main that the preview of 0.20 was tested with (2026-08-22). PREVIEW=pull-request/6648 in a
# repository that has this branch (merged in September) runs the router's diagnostics, too.
PREVIEW ?= d98e8a64ddf34856e74b24714e3bedb2f5a39553
# Where shell scripts are (found by their first line, so none can be forgotten).
SCRIPT_DIRS := .ci benchmarks examples patches scripts tests

.PHONY: help demo test test-versions test-preview test-frameworks checks format venv clean
help:
	@sed -n '1,6s/^# //p' Makefile

venv: $(STAMP)
$(STAMP): setup.py constraints.txt scripts/find-python
	@test -x $(BIN)/python || { python=$$(scripts/find-python) \
	  && echo "Setting up $(VENV) with $$python (downloads PyTorch on the first run: several minutes on a slow line)" \
	  && $$python -m venv $(VENV); }
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[megatron,report,demo,test,checks]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo/run.py --out $(DEMO_OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadgroup --durations 40 tests --ignore tests/slurm
	$(BIN)/python -m pytest tests/slurm # alone: their jobs have time limits and ports of the whole machine

test-versions: $(STAMP)
	scripts/install-megatron-versions $(BIN)/python $(VERSIONS)
	set -e; for release in $(VERSIONS); do echo "== Megatron-Core $$release"; \
	  PYTHONPATH=$(CURDIR)/.versions/$$release MEGATRON_RELEASE=$$release \
	  $(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadgroup -m core tests/distributed; done

test-preview: $(STAMP)
	@test -n "$(MEGATRON_LM_DIR)" || { echo "MEGATRON_LM_DIR is not set; allowed: a git repository of Megatron-LM" >&2; exit 2; }
	rm -rf .versions/preview && mkdir -p .versions/preview
	git -C "$(MEGATRON_LM_DIR)" archive $(PREVIEW) megatron | tar -x -C .versions/preview
	touch .versions/preview/megatron/__init__.py
	PYTHONPATH=$(CURDIR)/.versions/preview MEGATRON_RELEASE=0.20.0 $(BIN)/python -m pytest -q -m core tests/distributed

test-frameworks: $(STAMP)
	scripts/install-frameworks $(BIN)/python
	$(BIN)/python -m pytest tests/frameworks

checks: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck $$(find $(SCRIPT_DIRS) -type f -exec awk 'FNR == 1 && /^#!.*sh$$/ {print FILENAME}' {} +)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DEMO_OUT) build dist *.egg-info
