# Two commands are enough: `make demo` and `make test`. Both make their own environment in .venv.
#
#   make demo     train a small model family, merge it by five methods, evaluate, draw (demo_out/)
#   make test     lint, types and the whole test suite
#   make lint     only ruff and mypy
#   make native   (re)build the native module in place
#   make sanitize build it with AddressSanitizer and UBSan and run the sanitizer tests
#   make bench    compare with other libraries and with the machine's floor; kernels in GB/s
#   make clean    remove what the commands above made
#
# Variables: PYTHON (3.11 or newer), VENV, CXX, PYTEST_ARGS, BENCH_ARGS, DEMO_ARGS, PEERS=0 (leave
# out the other merging libraries, and with them the tests that compare with them), CL_FAST_CUDA=ON
# (build the CUDA kernels too, for `make native`).
PYTHON ?= python3
VENV ?= .venv
PEERS ?= 1
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
CL_FAST_CUDA ?= OFF

MAKEFLAGS += --no-print-directory

BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
NATIVE_BUILD := build/native
HAVE_CXX := $(shell command -v $(CXX) >/dev/null 2>&1 && echo 1 || echo 0)
HAVE_NVCC := $(shell command -v nvcc >/dev/null 2>&1 && echo 1 || echo 0)
REQUIREMENTS := pyproject.toml constraints.txt setup.py cl_fast/_version.py
INSTALL := CL_FAST_NATIVE=0 $(PY) -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt --no-build-isolation

.PHONY: demo test lint native sanitize bench clean

$(VENV)/.made: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		setuptools pybind11 cmake
	touch $@

# The Python part is installed editable; the native part is built in place by `native`.
$(VENV)/.installed-%: $(VENV)/.made $(REQUIREMENTS)
	$(INSTALL) --editable '.[$*]'
	touch $@

native: $(VENV)/.made
ifeq ($(HAVE_CXX),1)
	@$(BIN)/cmake -S . -B $(NATIVE_BUILD) -DPython_EXECUTABLE=$(PY) -DCMAKE_CXX_COMPILER=$(CXX) \
		-DCL_FAST_OUTPUT_DIR=$(CURDIR)/cl_fast -DCL_FAST_CUDA=$(CL_FAST_CUDA) -Wno-dev --log-level=WARNING
	@$(BIN)/cmake --build $(NATIVE_BUILD) --parallel
else
	@echo "no C++ compiler ($(CXX)): cl_fast runs on its eager reference"
endif

demo: $(VENV)/.installed-demo native
	$(PY) examples/demo/demo.py --out demo_out $(DEMO_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# A process per core: threads of torch beside them would only wait for each other.
test: $(VENV)/.installed-dev $(if $(filter 1,$(PEERS)),$(VENV)/.installed-peers) native lint
	OMP_NUM_THREADS=1 CL_FAST_REQUIRE_NATIVE=$(HAVE_CXX) CL_FAST_REQUIRE_NVCC=$(HAVE_NVCC) \
		$(PY) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder \
		$(PYTEST_ARGS)

sanitize: $(VENV)/.installed-dev
	CL_FAST_REQUIRE_NATIVE=$(HAVE_CXX) $(PY) -m pytest tests/native/test_sanitizers.py $(PYTEST_ARGS)

bench: $(VENV)/.installed-dev $(VENV)/.installed-peers native
	$(PY) benchmarks/merge_vs_peers.py $(BENCH_ARGS)
	$(PY) -m pytest benchmarks --benchmark-enable --benchmark-only

clean:
	rm -rf $(VENV) build demo_out cl_fast/_native*.so cl_fast/_native*.dylib cl_fast/_cuda*.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
