# make demo [SCHEME="k2-v2-g64-w128-sink5-fp8"]   a real model generating from packed keys and values
# make test                                       lint, types, C++ tests, Python tests
# Both make their own environment in .venv; a second run starts at once.
#
# PYTHON=python3.12   the interpreter to make .venv from (3.10 or newer)
# TORCH=torch==2.13.0 what to hand to pip for PyTorch, with options such as --index-url where you want another build
# SKVQ_CUDA=0|1|auto  which backends to build (see setup.py); auto compiles the CUDA kernels where nvcc is: for the GPUs
#                     of this machine, or where it has none for all, which takes minutes (TORCH_CUDA_ARCH_LIST=9.0
#                     builds for one, SKVQ_CUDA=0 for the CPU alone)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint format ctest clean distclean

PYTHON ?= python3
TORCH ?= torch==2.13.0
SCHEME ?=
VENV := .venv
BIN := $(VENV)/bin
LOG := build/install.log
PIP := $(BIN)/python -m pip --disable-pip-version-check
export SKVQ_CACHE ?= $(CURDIR)/.cache

# Kernels for the GPUs of this machine alone are built several times sooner than for all.
ifndef TORCH_CUDA_ARCH_LIST
GPU_ARCHS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+\.[0-9]+$$' | sort -u | paste -sd';')
ifneq ($(GPU_ARCHS),)
export TORCH_CUDA_ARCH_LIST := $(GPU_ARCHS)
endif
endif

BUILD_FILES := CMakeLists.txt setup.py pyproject.toml $(shell find include csrc cmake -type f 2>/dev/null)
CXX_FILES = $(shell find include csrc tests bench -path "*third_party*" -prune -o \( -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh" \) -print)
# cmake and ninja come from PyPI only where the machine has none
TOOLS := $(if $(shell command -v cmake),,cmake) $(if $(shell command -v ninja),,ninja)
say = @printf '\033[1m==>\033[0m %s\n'

# passive: threads that spin for each other make a busy machine several times slower
demo: $(VENV)/.built
	@OMP_WAIT_POLICY=passive $(BIN)/python demo/demo.py $(if $(SCHEME),--scheme "$(SCHEME)")

test: $(VENV)/.dev
	$(say) "ruff"
	@$(BIN)/ruff check --quiet .
	$(say) "mypy"
	@$(BIN)/mypy --no-error-summary
	@$(MAKE) --no-print-directory ctest
	$(say) "Python tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The libraries, their tests and the benchmark, without torch; pytest runs the tests one by one.
ctest: $(VENV)/.dev
	$(say) "C++ libraries and tests, without torch (log: build/cpp.log)"
	@mkdir -p build
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	{ cmake -S . -B build/cpp -G Ninja -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_DISABLE_FIND_PACKAGE_Python=ON \
	    -DSKVQ_TORCH=OFF -DSKVQ_CUDA=OFF -DSKVQ_TESTS=ON -DSKVQ_BENCH=ON \
	  && cmake --build build/cpp \
	  && ctest --test-dir build/cpp --output-on-failure; } > build/cpp.log 2>&1 \
	  || { tail -n 60 build/cpp.log; exit 1; }
	@grep 'tests passed' build/cpp.log

$(VENV)/.made:
	$(say) "environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is older than 3.10; use make PYTHON=/path/to/python3.10-or-newer"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -q --upgrade "setuptools>=77" $(TOOLS)
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	$(say) "PyTorch ($(TORCH)): the longest step, one to a few minutes"
	@$(PIP) install -q $(TORCH)
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(BUILD_FILES)
	$(say) "skvq_ext and what it needs (log: $(LOG); CUDA kernels: build/cuda.log)"
	@mkdir -p build
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -v --no-build-isolation -e ".[gguf]" > $(LOG) 2>&1 \
	  || { tail -n 60 $(LOG); exit 1; }
	@sed -n 's/^ *skvq: /    /p' $(LOG)
	@touch $@

$(VENV)/.dev: $(VENV)/.built
	$(say) "tools for the tests"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -q --no-build-isolation -e ".[dev]"
	@touch $@

clean:
	rm -rf build dist *.egg-info skvq_ext/_C.so $(VENV)/.built $(VENV)/.dev
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find skvq_ext tests demo -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .cache
