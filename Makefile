# Two commands: `make start` (see it work) and `make test` (check everything). Each makes the environment if needed.
# Variables: PYTHON (3.11 or newer), VENV, TORCH_INDEX (where torch itself comes from), COTKIT_DATA (folder with gsm8k/).

PYTHON ?= python3
VENV ?= .venv
# Empty: the default package index, where torch for Linux is the CUDA build of some gigabytes. CPU users point it at
# PyTorch's index of CPU wheels (README).
TORCH_INDEX ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.cotkit-stamp
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

ifeq ($(strip $(COTKIT_DATA)),)
ifneq ($(wildcard ../shared/data),)
COTKIT_DATA := $(abspath ../shared/data)
endif
endif
export COTKIT_DATA

# Two workers with one thread each; nothing is downloaded or reported by a test.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export TRL_EXPERIMENTAL_SILENCE := 1
PYTEST := $(PY) -m pytest -q -n 2

.PHONY: start test test-all lint unit shapes notebook-tests claims lab notebooks index pin setup
.DEFAULT_GOAL := start

start: setup
	@$(PY) scripts/notebook.py start

test: lint unit shapes notebook-tests claims

# Also what takes longer: the install of the wheel into an empty environment, the browser, full sweeps.
test-all: lint
	$(PYTEST) --slow
	@$(MAKE) --no-print-directory shapes notebook-tests claims

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

unit: setup
	$(PYTEST) -m "not slow"

# The same tests with every shape and type of a signature checked on each call (the hook answers before our messages).
# The tasks have no tensors, and their searches are slow under the hook.
shapes: setup
	$(PYTEST) -m "not slow and not errors" --jaxtyping-packages=cotkit,shape_hook.check \
	  --ignore=tests/test_tasks_arithmetic.py

notebook-tests: setup
ifeq ($(NOTEBOOKS),)
	@echo "no notebooks yet"
else
	$(PYTEST) --dist loadscope --nbval-lax --nbval-cell-timeout 300 --nbval-current-env notebooks
endif

# Judge the claims again on the saved sweeps, and run one arm and seed of each sweep anew, drawn by the date.
claims: setup
	$(PY) scripts/claims_md.py --check
	$(PY) scripts/sweep_spine.py --recheck
	$(PY) scripts/sweep_supervised.py --recheck
	$(PY) scripts/sweep_alignment.py --recheck

lab: setup
	$(PY) -m jupyter lab notebooks

# Run the notebooks in place and keep their outputs: make notebooks NB=notebooks/01_thoughts_as_data.ipynb
notebooks: setup
	$(PY) scripts/notebook.py run $(NB)

# Bring papers.csv, the README's table and environment.yml in step with docstrings, notebooks and constraints.txt.
index: setup
	$(PY) scripts/index.py

# Take the installed versions as the tested ones.
pin: setup
	$(PY) scripts/environment.py --pin

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "cotkit needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Try: make $(firstword $(MAKECMDGOALS) start) PYTHON=python3.11"; exit 1; }
	@echo "Setting up $(VENV) (once; downloads torch and about 160 packages)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PIP) --no-deps $(if $(strip $(TORCH_INDEX)),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(PIP) --constraint constraints.txt hatchling
	@$(PIP) --constraint constraints.txt --no-build-isolation --editable ".[notebooks,train,dev]"
	@touch $@
