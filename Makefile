# Everything a clone needs. `make demo` and `make test` set themselves up: a virtual environment in .venv, once.

PYTHON ?= python3
VENV ?= .venv
# A plain `torch` would bring gigabytes of CUDA packages into an environment that only tests torch tensors on the CPU.
# `make test TORCH=` leaves torch out (its tests skip).
TORCH ?= torch==2.13.0
# The other compiler that kernels must compile under, beside the CUDA 12 one of the package. `make test NVRTC13=` leaves
# it out (its tests skip).
NVRTC13 ?= nvidia-cuda-nvrtc==13.0.88
# Two workers: the suite is sized for a machine of two cores. `make test WORKERS=8` where there are more.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
FUZZ_FILES := tests/test_fuzz_gpu.py tests/test_stateful_gpu.py
MINUTES ?= 9
GPU_WORKERS ?= 8
FUZZ_SEED ?= 0
CUH = $(shell find cuda_src -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo doctor test check check-python check-types check-cuda format compile-all gpu-test fuzz bench-report clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

# --- set-up: one stamp for the package and its CUDA side, one for the tools on top of it -----------------------------

$(VENV)/.rtk: pyproject.toml
	@echo "setting up $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[cuda12]'
	@touch $@

$(VENV)/.dev: $(VENV)/.rtk
	@echo "adding the test tools to $(VENV) (once)"
	$(PIP) --editable '.[cuda12,bench,test,dev,transformers]' $(TORCH) $(NVRTC13)
	@touch $@

# --- what people type ------------------------------------------------------------------------------------------------

demo: $(VENV)/.rtk ## compute attention here, check it, and explain it (with or without a GPU)
	@$(BIN)/rtk demo

doctor: $(VENV)/.rtk ## what this machine has, what is missing, and the command that mends it
	@$(BIN)/rtk doctor

test: $(VENV)/.dev ## every test that can run here; those that need a GPU skip without one
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist loadgroup --timeout 600

check: check-python check-types check-cuda ## ruff, mypy, clang-format

check-python: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

check-types: $(VENV)/.dev
	$(BIN)/mypy

check-cuda: $(VENV)/.dev
	$(BIN)/clang-format --dry-run -Werror $(CUH)

format: $(VENV)/.dev ## rewrite what `make check` would complain about
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CUH)

compile-all: $(VENV)/.dev ## compile every config (hours; ARGS="--head-dim 128" for some); goes on where it was stopped
	$(BIN)/python tests/compile_all.py $(ARGS)

# The current interpreter on purpose: a GPU machine brings its own torch, CuPy and driver. Installs nothing.
# Several processes at a time share the GPU: most of a test is compiling and checking. GPU_WORKERS=0 for one.
# In pieces: a run ends before MINUTES are over, with an error, and the next one goes on.
gpu-test: ## the GPU tests with the current python3, recorded in tests/gpu_record.json; again until it is whole
	python3 -m pytest -m gpu tests -n $(GPU_WORKERS) --dist worksteal --timeout 600 \
		--gpu-record tests/gpu_record.json --gpu-minutes $(MINUTES)

fuzz: ## 20,000 random calls on a GPU, recorded in tests/fuzz_record.json; again until it is whole
	python3 -m pytest -m gpu $(FUZZ_FILES) -n $(GPU_WORKERS) --dist worksteal --timeout 600 \
		--fuzz-examples 20000 --fuzz-seed $(FUZZ_SEED) \
		--gpu-record tests/fuzz_record.json --gpu-record-files --gpu-minutes $(MINUTES)

RESULTS := benchmarks/results/h200

bench-report: $(VENV)/.dev ## redraw the recorded results: tables, plots, HTML, and the README's figures
	$(BIN)/rtk bench report $(RESULTS)
	$(BIN)/python -m rtk.benchmarks.report.readme $(RESULTS) README.md

clean: ## remove the environment, builds and caches of this folder (not the cubin cache: rtk cache clear)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
