# `make quickstart` and `make test` each set everything up in .venv by themselves, then run. Nothing else is touched.
# Needs Python >= 3.11 (with headers and venv) and a C++20 compiler; nvcc is used where it is found.
#
#   PYTHON=python3.12    the interpreter .venv is made from
#   TORCH="torch==2.13.0 OPTIONS"    another build of torch, e.g. the CPU-only one (docs/install.md)
#   ARGS="..."           more arguments for the program that a target runs, e.g. make test ARGS="-k causal"

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check --no-compile
RUN_NEEDS := lightning transformers hydra-core plotly rich datasets
TEST_NEEDS := wandb wandb-workspaces deepspeed tensorboard pytest pytest-xdist hypothesis ruff trl peft accelerate torchao lm-eval matplotlib

# pip leaves bytecode out (it would compile far more than is ever imported); the first import writes it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart test test-gpu bench lint clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   set up, then train a small model in BF16 and INT8 and compare (minutes on two cores)"
	@echo "make test         set up, then lint and run the tests"
	@echo "make test-gpu     the tests that need a CUDA GPU"
	@echo "make bench        attention against torch's own, rows in benchmarks/results"
	@echo "make lint         ruff"
	@echo "make clean        remove .venv and everything built"

quickstart: $(VENV)/.built
	@$(PY) -m sagetrain recipe=quickstart $(ARGS)

# One thread per worker: the workers share the cores among themselves. tests/conftest.py orders the files.
test: $(VENV)/.built $(VENV)/.test
	@$(PY) -m ruff check .
	@$(PY) -m benchmarks.tables --check
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not gpu and not multigpu" $(ARGS)

test-gpu: $(VENV)/.built $(VENV)/.test
	@$(PY) -m pytest -m "gpu or multigpu" $(ARGS)

bench: $(VENV)/.built
	@$(PY) -m benchmarks.attention $(ARGS)

lint: $(VENV)/.test
	@$(PY) -m ruff check . $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis sagetrain/_C.abi3.so

# ---------------------------------------------------------------------------------------------------------- setting up
# One stamp per step, so that a second `make` starts at once and a change of csrc/ only compiles again.

$(VENV)/.torch:
	@[ -n "$(PYTHON)" ] || { echo "no Python >= 3.11 found: install one, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is older than Python 3.11")'
	@include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	echo '#include <Python.h>' | $${CXX:-c++} -std=c++20 -fsyntax-only -x c++ -I"$$include" - || \
	{ echo "no C++20 compiler with Python's headers (Debian: apt install g++ python3-dev; CXX names another compiler)" >&2; exit 1; }
	@echo "[setup] $(TORCH) into $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -c constraints.txt setuptools
	@touch $@

$(VENV)/.run: $(VENV)/.torch constraints.txt
	@echo "[setup] $(RUN_NEEDS)"
	@$(PIP) -c constraints.txt $(RUN_NEEDS)
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "[setup] $(TEST_NEEDS)"
	@DS_BUILD_OPS=0 $(PIP) -c constraints.txt $(TEST_NEEDS)
	@touch $@

$(VENV)/.built: $(VENV)/.run setup.py pyproject.toml $(shell find csrc)
	@echo "[setup] compiling sagetrain"
	@$(PIP) --no-build-isolation --no-deps -e .
	@$(PY) -c 'import sagetrain; print("[setup] ready, kernel", sagetrain.kernel_name())'
	@touch $@
