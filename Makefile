# make demo     train one small MoE with three scopes on this machine, compare them (no GPU needed)
# make test     every test that runs without a GPU
# make checks   format, lint, types
# All three set themselves up: a virtual environment in .venv with the versions of constraints.txt.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUT ?= demo-out

.PHONY: help demo test checks format venv clean
help:
	@sed -n '1,4s/^# //p' Makefile

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
	$(BIN)/python -m pytest tests

checks: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DEMO_OUT) build *.egg-info
