# make train   install, train PPO on the built-in task (ARGS: experiment=fast), show what it learned
# make test    install, then lint, types, documentation and tests
# make check   lint, types, and the first case of every test that is not slow: a minute or so, for the inner loop
# make docs    install, then build the documentation site in build/site, where a warning is an error
# make test-lowest  the tests alone, in .venv-lowest with the oldest versions that pyproject.toml admits
# make test-bare    tests of the package alone, in .venv-bare without any extra
# make test-seeds   the tests that draw from a seed, at three others
# make test-questions  what takes minutes: verdicts of docs/questions on other tasks, and an engine in a process
# make lint, format  check the style and the types; mend the style
# make test-only    the tests alone, in .venv
# make clean   remove what builds and tools have left; .venv and runs stay
# make gpu     on a machine with CUDA: checks and measures everything there, in runs/gpu
#
# Variables: PYTHON (the interpreter .venv is made from), VENV (the environment to use),
# ARGS (overrides for training, e.g. ARGS="seed=1 agent.lr=3e-4"), WORKERS (test processes),
# SHIFTS (what `make test-seeds` adds to the seeds).
# To keep the torch of an environment of yours: make train VENV=/path/to/it CONSTRAINTS=/dev/null

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= auto
SHIFTS ?= 100 200 300
ARGS ?=
THREADS ?= 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.lmgym-installed
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal
SOURCES := lmgym agents builders tests benchmarks examples

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11): sys.exit("lmgym needs Python 3.11 or newer, got " + sys.version.split()[0] + ": set PYTHON=")
try: import ensurepip, venv
except ImportError: sys.exit("Python cannot make virtual environments here: on Debian, apt-get install python3-venv")
endef
export CHECK_PYTHON

# Tests start dozens of processes; where the environment forbids bytecode, each would compile all that it imports.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help train docs check test test-only test-lowest test-bare test-seeds test-questions gpu lint format clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# torch goes first and alone, so that the exact version of the constraints is settled before anything asks for a range.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -x $(BIN)/python || $(PYTHON) -c "$$CHECK_PYTHON"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): the first time takes a few minutes."
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

train: $(STAMP)
	@$(BIN)/python -m agents.train $(or $(ARGS),experiment=fast)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The variable silences a notice about the future of MkDocs. Not `--quiet`: it would hide warnings from `--strict`.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: lint
	OMP_NUM_THREADS=$(THREADS) $(PYTEST) -m fast

test: lint docs test-only

test-lowest:
	$(MAKE) test-only VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

# What `pip install lmgym` gives, without an extra. The file that is left out asks SB3's checker.
test-bare:
	test -x .venv-bare/bin/python || $(PYTHON) -m venv .venv-bare
	.venv-bare/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	.venv-bare/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable . pytest pytest-timeout hypothesis
	OMP_NUM_THREADS=$(THREADS) .venv-bare/bin/python -m pytest -m "not slow and not network" --ignore tests/envs/test_env.py \
		tests/envs tests/data tests/feedback tests/tasks/test_tasks.py tests/test_rollout.py tests/test_evaluation.py

# One thread a test process: the processes already fill the cores. THREADS=2 tries two.
test-only: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(PYTEST)

test-seeds: $(STAMP)
	for shift in $(SHIFTS); do \
		SEED_SHIFT=$$shift OMP_NUM_THREADS=$(THREADS) $(PYTEST) -m "seeds and not network" || exit; done

test-questions: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(PYTEST) --timeout 900 -m minutes tests/agents/questions tests/agents/remote tests/agents/test_distributed.py

gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
