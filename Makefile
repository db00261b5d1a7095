# From a fresh clone: `make demo` or `make test`. Needs make, a C++ compiler and this Python, 3.10 or later.
PYTHON ?= python3
# Made if it is not there. An environment that has torch keeps the torch it has.
VENV ?= .venv
# More arguments for the program that a target runs, e.g. make test ARGS='-k backward'
ARGS ?=

PY := $(VENV)/bin/python
PACKAGES := $(VENV)/.lstm_ext-packages
LINTERS := $(VENV)/.lstm_ext-linters
# The last file that a build writes.
EXTENSION := lstm_ext/_build_info.json
# With the folders, whose times change when a file goes.
CSRC := $(shell find csrc)
CXX_FILES = find csrc -name '*.cpp' -o -name '*.h'
# The package without its extension, which is built in place by a rule of its own, file by file.
PIP_INSTALL := LSTM_EXT_SKIP_BUILD=1 $(PY) -m pip install --no-build-isolation

.PHONY: build test test-full fuzz demo bench-quick gpu-check lint format clean force
.DELETE_ON_ERROR:

build: $(EXTENSION)

test: build
	$(PY) -m pytest -q $(ARGS)

test-full: build
	$(PY) -m pytest -q -m '' $(ARGS)

# What ran is listed at the end; a crash leaves the case in build/fuzz_case.txt. LSTM_EXT_FUZZ_SEED=2 draws others.
fuzz: build
	LSTM_EXT_FUZZ_CASES=$${LSTM_EXT_FUZZ_CASES:-20000} LSTM_EXT_FUZZ_LAST=build/fuzz_case.txt \
	  $(PY) -m pytest -q -m full tests/test_fuzz.py $(ARGS)

demo: build
	$(PY) examples/char_lm.py $(ARGS)

bench-quick: build
	$(PY) benchmarks/bench_quick.py $(ARGS)

# On a machine with a GPU: builds, tests and measures, in ten minutes, with the torch of PYTHON. No network, no VENV.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

lint: $(LINTERS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CXX_FILES) | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(LINTERS)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CXX_FILES) | xargs $(VENV)/bin/clang-format -i

# Leaves the environment.
clean:
	rm -rf build dist *.egg-info lstm_ext/_C.*.so lstm_ext/_ops.so $(EXTENSION)

$(EXTENSION): $(CSRC) setup.py lstm_ext/_build_config.py $(PACKAGES) build/environment
	@echo "building the extension, about two minutes the first time; the compiler's output is in build/log.txt"
	@$(PY) setup.py -q build_ext --inplace > build/log.txt 2>&1 || { cat build/log.txt; exit 1; }

# Rewritten, which means a rebuild, only when VENV is another one than last time: its torch may be another one too.
build/environment: force
	@mkdir -p build
	@echo '$(abspath $(VENV))' | cmp -s - $@ || echo '$(abspath $(VENV))' > $@

$(PACKAGES): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: lstm_ext needs Python 3.10 or later, and $(PYTHON) is not: make PYTHON=/path/to/python3"; exit 1; }
	@set -- $${CXX:-c++}; command -v "$$1" >/dev/null || { test -z "$$CXX" && command -v g++ >/dev/null; } || { \
	  echo "error: no C++ compiler ($$1) was found: apt install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora)"; \
	  exit 1; }
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install 'setuptools>=77'
	$(PIP_INSTALL) -e '.[build,test,demo,bench]'
	@touch $@

$(LINTERS): $(PACKAGES)
	$(PIP_INSTALL) -e '.[lint]'
	@touch $@
