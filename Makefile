# make quickstart | test | lint | format | bench | venv | clean. Needs Python 3.11 or newer and make; everything else goes into .venv.
#   PYTHON=python3.12   which Python makes the environment
#   PIP_ARGS=...        further arguments of pip, for example the index of CPU-only or CUDA builds of torch and torchvision
#   DATA=folder         make quickstart on your own videos
#   SYSTEM=hvdm|latte|pvdm|vidm  make quickstart with another system than cmd
#   TESTS=path, PYTEST_ARGS=...   a part of the tests
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REQUIREMENTS := requirements.txt requirements-dev.txt constraints.txt
TESTS ?= tests
PYTEST_ARGS ?= -n 3 --dist worksteal  # of two cores: a third of the time tests wait for processes
SCRIPTS := $(wildcard launch/*.sh launch/*/*.sh slurm/*.sh slurm/*.sbatch slurm/*/*.sh) .ci/run

.PHONY: venv quickstart test lint format bench clean help
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^SHELL/s/^# \{0,1\}//p' Makefile

venv: $(STAMP)

$(STAMP): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' comes without venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(foreach file,$(filter requirements%,$(REQUIREMENTS)),-r $(file)) -c constraints.txt $(PIP_ARGS)
	@touch $@

quickstart: $(STAMP)
	PYTHON=$(BIN)/python launch/quickstart.sh

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then shellcheck -x $(SCRIPTS) && echo "shellcheck: $(words $(SCRIPTS)) scripts"; \
	else echo "shellcheck is not installed: the shell scripts were not checked"; fi

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@for name in train_step latte_step pvdm_step hvdm_step vidm_step vidm_frame wavelet long_video checkpoint watching stream preprocess formats evaluation; do echo "== benchmarks/$$name.py"; launch=; \
	  [ $$name != watching ] || launch="-m torch.distributed.run --standalone --nproc-per-node 2"; $(BIN)/python $$launch -m benchmarks.$$name || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
