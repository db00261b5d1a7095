# From a fresh clone: `make demo` or `make test`. Needs make, a C++ compiler and this Python, 3.10 or later.
PYTHON ?= python3
# Made if it is not there. An environment that has torch keeps the torch it has.
VENV ?= .venv
# More arguments for the program that a target runs, e.g. make test ARGS='-k backward'
ARGS ?=

# Processes that run tests.
JOBS ?= 2

PY := $(VENV)/bin/python
# A process that ends in a test, which hangs or crashes, ends the run.
PYTEST_OPTIONS = -q -n $(JOBS) --dist worksteal --max-worker-restart=0
PYTEST = $(PY) -m pytest $(PYTEST_OPTIONS)
# All tests of the product, the slow ones too, for another Python or torch than that of VENV.
PRODUCT = -m 'not tools and not full and not pages'
PACKAGES := $(VENV)/.lstm_ext-packages
LINTERS := $(VENV)/.lstm_ext-linters
# The optional groups of pyproject.toml; a target installs those that it needs.
GROUP = $(VENV)/.lstm_ext-group-
TESTING = $(GROUP)test $(GROUP)demo $(GROUP)bench
# The last file that a build writes.
EXTENSION := lstm_ext/native/_build_info.json
# With the folders, whose times change when a file goes.
CSRC := $(shell find csrc)

CXX_FILES = find csrc tests/simt tests/cpu tests/native_library examples benchmarks -name '*.cpp' -o -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
# The package without its extension, which is built in place by a rule of its own, file by file.
PIP_INSTALL := LSTM_EXT_SKIP_BUILD=1 $(PY) -m pip install --no-build-isolation

# For cuda-build: a second environment, whose torch is built with CUDA. torch is named here, since PyPI's newest may be
# for a newer CUDA than the nvcc at hand. A python3.12 that is not there or does not run is replaced by PYTHON.
CUDA_PYTHON ?= python3.12
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.11.0
CUDA_PY := $(abspath $(CUDA_VENV))/bin/python
CUDA_PACKAGES := $(CUDA_VENV)/.lstm_ext-packages
CUDA_INSTALLED := $(CUDA_VENV)/.lstm_ext-installed

# For free-threaded: an environment of a Python without the GIL. Where that is not there, uv fetches it if uv is there.
FREE_PYTHON ?= python3.14t
FREE_VENV ?= .venv-free
FREE_TORCH ?= torch>=2.11,<2.16
FREE_PY := $(abspath $(FREE_VENV))/bin/python
FREE_PACKAGES := $(FREE_VENV)/.lstm_ext-packages
FREE_INSTALLED := $(FREE_VENV)/.lstm_ext-installed

# For compat: a second environment with the packages that are tried, on top of VENV, whose torch it has. A torch without
# CUDA needs a torchvision without it: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS says where pip finds one.
COMPAT_VENV ?= .venv-compat
COMPAT_PY := $(COMPAT_VENV)/bin/python
COMPAT_PACKAGES := $(COMPAT_VENV)/.lstm_ext-packages
OLD_KERAS := $(COMPAT_VENV)/old-keras

.PHONY: build sdist wheel wheel-check release-check aarch64 check test test-tools test-full free-threaded compat planted mutants sanitize soak fuzz demo-rl demo-streaming demo bench bench-quick records library cuda-build gpu-check gpu-bench lint format docs clean force
.DELETE_ON_ERROR:

build: $(EXTENSION)

# The sources: dist/lstm_ext-VERSION.tar.gz.
sdist: $(PACKAGES)
	LSTM_EXT_SKIP_BUILD=1 $(PY) setup.py -q sdist

# dist/*.whl, for each torch from 2.11 to 2.15 and each Python that is here, which needs no compiler where it is
# installed. Downloads torch's headers, 2.7 GB, of which 0.3 stay. A quarter of an hour. ARGS='--torch 2.13' for one,
# ARGS=--here for the torch and the Python of VENV, without a download.
wheel: $(GROUP)wheel
	$(PY) .ci/wheel.py $(ARGS)

# That the wheel installs and works where there is no compiler, for each torch. Downloads 4 GB for each, but nothing
# with ARGS=--here, which runs the self-test only.
wheel-check: $(GROUP)wheel
	$(PY) .ci/wheel.py --check $(ARGS)

# What a release runs, for the torch and the Python of VENV: the versions agree, the sources and the wheel are made and
# install, and the package index would take them. Five minutes.
release-check: $(GROUP)wheel $(GROUP)release
	$(PY) .ci/release.py
	rm -rf dist
	$(MAKE) sdist
	$(MAKE) wheel ARGS=--here
	$(PY) -m twine check --strict dist/*
	$(MAKE) wheel-check ARGS=--here

# The wheel for 64-bit ARM, and its self-test under an emulator. Downloads 3 GB. A quarter of an hour.
aarch64: $(GROUP)wheel
	$(PY) .ci/aarch64.py

# The product: four minutes on two cores. JOBS processes side by side; ARGS='-n 0' for none but this one.
test: build $(TESTING)
	$(PYTEST) $(ARGS)

# What to run while working: each form, cell and call, a part of them on every other route, and constructors. A minute
# and a half.
check: build $(TESTING)
	$(PYTEST) tests/matrix tests/layer/test_routes.py tests/nn/test_construction.py $(ARGS)

# What checks the tools: the emulator, builds, examples, benchmarks; and what takes long: the CUDA kernels on the
# emulator, exports, several processes, the slow tests of the product. .ci/run runs it as well. mypy is a linter.
test-tools: build $(TESTING) $(LINTERS)
	$(PYTEST) -m '(tools or slow) and not full' $(ARGS)

# These two, and the long matrices.
test-full: build $(TESTING)
	$(PYTEST) -m '' $(ARGS)

# One wrong line after the other, at least one in each kernel file: do the tests of its part see it? Two hours.
planted: build $(TESTING)
	$(PY) tests/tools/planted.py $(ARGS)

# 200 places of the product changed at random: does a test of `make test` see it? An hour. ARGS='--seeds 2' draws others.
mutants: build $(TESTING)
	$(PY) tests/tools/mutants.py $(ARGS)

# The tests that reach C++ with the address and the undefined-behaviour sanitizer, and the CPU kernels' teams with the
# thread sanitizer; builds a copy of the tree. An hour. Needs g++. ARGS=driver or ARGS=address for one of the two.
sanitize: build $(TESTING)
	$(PY) tests/tools/sanitize.py $(ARGS)

# Six kinds of calls, 50,000 of each: bits, memory, threads. Weekly; ARGS='--calls 1000' for fewer.
soak: build $(TESTING)
	$(PY) tests/tools/soak.py $(ARGS)

# What ran is listed at the end; a crash leaves the case in build/fuzz_case.txt. LSTM_EXT_FUZZ_SEED=2 draws others.
fuzz: build $(TESTING)
	LSTM_EXT_FUZZ_CASES=$${LSTM_EXT_FUZZ_CASES:-20000} LSTM_EXT_FUZZ_LAST=build/fuzz_case.txt \
	  $(PY) -m pytest -q -m full tests/fuzz/test_fuzz.py $(ARGS)

# A recurrent policy, by a loop over the steps and by one call with `resets`. A minute.
demo-rl: build $(GROUP)demo
	$(PY) examples/recurrent_ppo.py $(ARGS)

# Single steps with carried state: how many took how long, as a histogram.
demo-streaming: build $(GROUP)demo
	$(PY) examples/streaming.py $(ARGS)

# The proof of correctness: a character model, trained with torch.nn.LSTM and with lstm_ext.LSTM. A minute.
demo: build $(GROUP)demo
	$(PY) examples/char_lm.py $(ARGS)

# All groups, with every peer that is installed, in about half an hour; ARGS=--quick takes five minutes. Writes build/bench.json.
bench: build $(GROUP)bench
	$(PY) benchmarks/bench.py $(ARGS)

# torch.nn.LSTM and lstm_ext.LSTM only, on nine shapes, in four minutes.
bench-quick: build $(GROUP)bench
	$(PY) benchmarks/bench.py --pair $(ARGS)

# Measures anew the records of this machine that are older than the code, and renews the pages. ARGS=--list shows all
# records; ARGS=--force measures whatever the commits are.
records: build $(GROUP)bench
	$(PY) benchmarks/renew.py $(ARGS)

# The C library, into PREFIX: include/lstm_ext.h, lib/liblstm_ext.so and .a, and a file for pkg-config. Two minutes.
PREFIX ?= build/library
library: $(PACKAGES)
	$(PY) -m lstm_ext.native_library $(PREFIX)

# On a machine with a GPU: builds and tests, in five minutes, with the torch of PYTHON. No network, no VENV.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py values $(ARGS)

# The second half, which measures how fast the kernels are. Five more.
gpu-bench:
	$(PYTHON) benchmarks/gpu_check.py speed $(ARGS)

# That the CUDA part compiles and is complete, and that such a build works on a machine without a GPU. The extension is
# installed, not built in place, where that of VENV is. For one architecture, as is the wheel that comes last: tests/simt
# compiles the kernels for all of them. Needs nvcc, and 5 GB for the environment.
# Left out: the CPU kernels and their library, which the same compiler makes of the same sources, what is not in the
# package, and what takes long.
CUDA_LEFT_OUT := simt fuzz tools cpu native_library
FEW_ARCHITECTURES := TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-8.0}
cuda-build: $(CUDA_INSTALLED)
	@mkdir -p build/cuda
	cd build/cuda && LSTM_EXT_BACKEND=aot $(CUDA_PY) -m lstm_ext.info
	cd build/cuda && $(CUDA_PY) -c 'from lstm_ext.native import loader as l; \
	  cuda = l.extension().build_info()["cuda"]; assert cuda and cuda == l.status().cuda, l.status()'
	cd build/cuda && $(CUDA_PY) -m pytest $(PYTEST_OPTIONS) $(PRODUCT) -c ../../pyproject.toml ../../tests \
	  $(CUDA_LEFT_OUT:%=--ignore=../../tests/%) $(ARGS)
	$(FEW_ARCHITECTURES) $(CUDA_PY) .ci/wheel.py --here --cuda
	$(CUDA_PY) .ci/wheel.py --here --check

# The tests of threads, and those of the layers that need few packages, under a Python without the GIL. The extension is
# installed there. torch may bring CUDA's libraries, 5 GB.
FREE_TESTS := nn/test_races.py cpu/test_threads.py nn/test_forward.py nn/test_cell.py nn/test_streaming.py \
  nn/test_frozen.py nn/test_convert.py nn/test_torch_lstm.py matrix/test_faults.py layer/test_ops.py
free-threaded: $(FREE_INSTALLED)
	@mkdir -p build/free
	cd build/free && $(FREE_PY) -m pytest $(PYTEST_OPTIONS) $(PRODUCT) -c ../../pyproject.toml $(FREE_TESTS:%=../../tests/%) $(ARGS)

# Packages that have LSTMs, before and after lstm_ext.convert. Installs 2 GB.
compat: build $(TESTING) $(COMPAT_PACKAGES)
	$(COMPAT_PY) -m pytest -q -n 0 -m full --disable-warnings tests/compat $(ARGS)
	PYTHONPATH=$(OLD_KERAS) $(COMPAT_PY) -m pytest -q -n 0 -m full --disable-warnings tests/compat/test_keras.py

lint: $(LINTERS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache --no-logo
	@if $(PY) -c 'import torch' 2> /dev/null; then echo "$(PY) -m mypy" && $(PY) -m mypy; \
	  else echo "mypy: SKIPPED, torch is not in $(VENV), and mypy reads its types"; fi
	$(CXX_FILES) | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(PY) tests/tools/check_comments.py
	$(PY) tests/tools/check_headers.py

format: $(LINTERS)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CXX_FILES) | xargs $(VENV)/bin/clang-format -i

# The pages of docs/ and the docstrings as a site, build/docs/index.html. A warning is an error. Then what the pages say:
# their blocks run, their links lead somewhere.
docs: build $(TESTING) $(GROUP)docs
	$(PY) docs/build_site.py $(ARGS)
	$(PYTEST) -m pages

# Leaves the environment.
clean:
	rm -rf build dist *.egg-info lstm_ext/native/_C.*.so lstm_ext/native/_ops.so $(EXTENSION)

$(EXTENSION): $(CSRC) setup.py lstm_ext/native/config.py $(PACKAGES) build/environment
	@echo "building the extension: about two minutes on two cores the first time; the output is in build/log.txt"
	@$(PY) setup.py -q build_ext --inplace > build/log.txt 2>&1 || { \
	  cat build/log.txt; echo "the errors among it:"; grep -n "error" build/log.txt | cut -c1-300 | tail -20; exit 1; }

# Rewritten, which means a rebuild, only when something in it has changed. With another VENV, torch may be another one.
BUILT_FOR = $(abspath $(VENV)) $(LSTM_EXT_CUDA) $(TORCH_CUDA_ARCH_LIST)
build/environment: force
	@mkdir -p build
	@echo '$(BUILT_FOR)' | cmp -s - $@ || echo '$(BUILT_FOR)' > $@

$(PACKAGES): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: lstm_ext needs Python 3.10 or later, and $(PYTHON) is not: make PYTHON=/path/to/python3"; exit 1; }
	@set -- $${CXX:-c++}; command -v "$$1" >/dev/null || { test -z "$$CXX" && command -v g++ >/dev/null; } || { \
	  echo "error: no C++ compiler ($$1) was found: apt install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora)"; \
	  exit 1; }
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install 'setuptools>=77'
	$(PIP_INSTALL) -e '.[build]'
	@touch $@

$(GROUP)%: $(PACKAGES)
	$(PIP_INSTALL) -e '.[$*]'
	@touch $@

# Without the package and its torch.
LINT_PACKAGES = $(shell sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')
$(LINTERS): pyproject.toml
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(LINT_PACKAGES)
	@touch $@

# Folders of earlier builds may hold modules that are gone; the objects, which take the time, lie elsewhere.
$(CUDA_INSTALLED): $(CSRC) $(shell find lstm_ext -name "*.py" -o -name "*.pyi") setup.py $(CUDA_PACKAGES)
	@mkdir -p build/cuda
	@rm -rf build/lib build/lib.*
	@echo "building and installing the extension with CUDA; the output is in build/cuda/log.txt"
	@$(FEW_ARCHITECTURES) LSTM_EXT_CUDA=1 $(CUDA_PY) -m pip install -v \
	  --no-build-isolation --no-deps --force-reinstall . \
	  > build/cuda/log.txt 2>&1 || { cat build/cuda/log.txt; exit 1; }
	@touch $@

$(CUDA_PACKAGES): pyproject.toml
	@command -v nvcc >/dev/null || test -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" || { \
	  echo "error: no nvcc was found: install the CUDA toolkit, or set CUDA_HOME to its folder"; exit 1; }
	@$(CUDA_PY) -m pip --version >/dev/null 2>&1 || \
	  { $(CUDA_PYTHON) -c '' 2>/dev/null && $(CUDA_PYTHON) -m venv $(CUDA_VENV); } || $(PYTHON) -m venv $(CUDA_VENV)
	@echo "installing torch with CUDA and what the tests need into $(CUDA_VENV), 5 GB"
	$(CUDA_PY) -m pip install -q '$(CUDA_TORCH)' 'setuptools>=77'
	@$(CUDA_PY) -c 'import torch; assert torch.version.cuda, f"error: torch {torch.__version__} is a build without CUDA"'
	LSTM_EXT_SKIP_BUILD=1 $(CUDA_PY) -m pip install -q --no-build-isolation '.[build,test,demo,bench,wheel]'
	@touch $@

$(FREE_INSTALLED): $(CSRC) $(shell find lstm_ext -name "*.py" -o -name "*.pyi") setup.py $(FREE_PACKAGES)
	@mkdir -p build/free
	@rm -rf build/lib build/lib.*
	@echo "building and installing the extension; the output is in build/free/log.txt"
	@LSTM_EXT_CUDA=0 $(FREE_PY) -m pip install -v --no-build-isolation --no-deps \
	  --force-reinstall . > build/free/log.txt 2>&1 || { cat build/free/log.txt; exit 1; }
	@touch $@

# Old binary packages rather than new sources: few packages have both for such a Python.
$(FREE_PACKAGES): pyproject.toml
	@$(FREE_PY) -m pip --version >/dev/null 2>&1 || \
	  { command -v $(FREE_PYTHON) >/dev/null && $(FREE_PYTHON) -m venv $(FREE_VENV); } || \
	  { command -v uv >/dev/null && uv venv -q --seed --python 3.14t $(FREE_VENV); } || { \
	  echo "error: there is no Python without the GIL: $(FREE_PYTHON) was not found, and uv could not fetch one."; \
	  echo "Install one, or build CPython with --disable-gil: make free-threaded FREE_PYTHON=/path/to/python3.14t"; \
	  exit 1; }
	@$(FREE_PY) -c 'import sys; sys.exit(getattr(sys, "_is_gil_enabled", lambda: True)())' || { \
	  echo "error: $(FREE_VENV) is of a Python with the GIL: remove it, and name another FREE_PYTHON"; exit 1; }
	@echo "installing torch and what the tests need into $(FREE_VENV)"
	@$(FREE_PY) -m pip install -q --prefer-binary '$(FREE_TORCH)' || { \
	  echo "error: no torch for this Python: FREE_TORCH=torch==2.12.0 is the last one for 3.13t"; exit 1; }
	$(FREE_PY) -m pip install -q --prefer-binary 'setuptools>=77' ninja 'pytest>=8' 'pytest-xdist>=3.5' 'pytest-timeout>=2.3' expecttest 'numpy<2.4'
	@touch $@

# pip sees what VENV has, and is held to its torch. espnet and kraken name old versions of what others need.
$(COMPAT_PACKAGES): pyproject.toml $(PACKAGES)
	@$(COMPAT_PY) -m pip --version >/dev/null 2>&1 || $(PY) -m venv $(COMPAT_VENV)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(PY) -c "$$site" > "$$($(COMPAT_PY) -c "$$site")/lstm_ext_venv.pth"
	@$(PY) -c 'import torch; print(f"torch=={torch.__version__}")' > $(COMPAT_VENV)/torch.txt
	@echo "installing what tests/compat needs into $(COMPAT_VENV), 2 GB"
	$(COMPAT_PY) -m pip install -q 'setuptools>=77,<81'
	LSTM_EXT_SKIP_BUILD=1 $(COMPAT_PY) -m pip install -q --no-build-isolation -c $(COMPAT_VENV)/torch.txt -e '.[compat]'
	$(COMPAT_PY) -m pip install -q --no-deps 'espnet>=202511' 'kraken>=7'
	LSTM_EXT_SKIP_BUILD=1 $(COMPAT_PY) -m pip install -q --no-build-isolation -c $(COMPAT_VENV)/torch.txt -e '.[frameworks]'
	$(COMPAT_PY) -m pip install -q --no-deps --target $(OLD_KERAS) keras==3.3.3
	@touch $@
