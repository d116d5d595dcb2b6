# Every everyday command. Each makes .venv if it is not there; PYTHON= and VENV= use your own.
#   make demo    train the tiny hybrid model in BF16 and in NVFP4, side by side (under 6 minutes on 2 cores)
#   make test    the whole test suite     make lint    ruff     make bench   benchmarks
#   make gpu     on a machine with a GPU: build, check, tune, test and measure all with PYTHON's own packages, in 9 minutes
#   make build   the native module in place     make sanitize   C++ tests under address and undefined-behaviour sanitizers
#   make cuda    the module and the CUDA kernels, with nvcc
#   make arm64   those C++ tests compiled for 64-bit Arm and emulated (Debian: g++-aarch64-linux-gnu, qemu-user-static)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/python
BUILT := build/.built
READY := $(VENV)/.installed $(BUILT)
MAKEFLAGS += --jobs=2 # the module compiles while pip installs the rest
unexport PYTHONDONTWRITEBYTECODE # pip compiles none; each module once, as it is first imported

.PHONY: demo test bench gpu lint build cuda sanitize arm64 clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(RUN) -m nvfp4_kernels demo $(ARGS)

test: $(READY)
	$(RUN) -m pytest -n logical --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(READY)
	$(RUN) -m nvfp4_kernels bench $(ARGS)

gpu:
	$(PYTHON) benchmarks/gpu/run.py $(ARGS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

build: $(READY)

cuda: $(VENV)/.installed
	NVFP4_CUDA=1 $(RUN) setup.py -q build_ext --inplace

sanitize: $(VENV)/.installed
	$(RUN) -m cmake -S . -B build/sanitize -G Ninja -DNVFP4_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug
	$(RUN) -m cmake --build build/sanitize --target native_tests
	build/sanitize/native_tests

# QEMU knows no ptrace, which the search for leaks needs.
arm64: $(VENV)/.installed
	$(RUN) -m cmake -S . -B build/arm64 -G Ninja -DNVFP4_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug -DCMAKE_SYSTEM_NAME=Linux \
		-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(RUN) -m cmake --build build/arm64 --target native_tests
	ASAN_OPTIONS=detect_leaks=0 qemu-aarch64-static -L /usr/aarch64-linux-gnu build/arm64/native_tests

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lint: | $(VENV)/bin/python
	$(RUN) -m pip install -q ruff
	touch $@

$(VENV)/.tools: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install -q --no-compile setuptools wheel pybind11 ninja cmake
	touch $@

# torch first and by version: an unpinned torch may bring gigabytes of CUDA libraries to a machine without a GPU
$(VENV)/.installed: $(VENV)/.tools
	$(RUN) -m pip install -q --no-compile "$(TORCH)" numpy
	NVFP4_BUILD=python $(RUN) -m pip install -q --no-compile --no-build-isolation -e ".[test]"
	touch $@

$(BUILT): $(VENV)/.tools CMakeLists.txt setup.py $(shell find csrc -type f)
	$(RUN) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

clean:
	rm -rf build $(VENV) nvfp4_kernels/_native*.so nvfp4_kernels/_cuda
