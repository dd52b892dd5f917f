# Every target works from a fresh clone; `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.PHONY: help setup demo test soak interop lint types clean \
	gpu-wheels gpu-site gpu-check gpu-bench

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTEROP := $(CURDIR)/.venv-interop
TORCH := $(shell sed -n '/^torch==/p' requirements.txt)
# Tests wait for processes as often as they compute.
WORKERS ?= $(shell echo $$(( 2 * $$(nproc) )))
PYTHON ?= $(shell command -v python3.11 || command -v python3)

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' \
		| while IFS="$$(printf '\t')" read -r name text; do \
			printf '  make %-10s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## Make .venv with the pinned requirements (Python 3.11)

# torch goes first: building deepspeed looks for it.
$(STAMP): requirements.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "Python 3.11 is needed, found '$(PYTHON)': install python3.11 and" \
			"python3.11-venv, or name it: make setup PYTHON=/path/to/python3.11"; \
		exit 1; }
	@echo "== setup 1/3: $(VENV)"
	"$(PYTHON)" -m venv $(VENV)
	@echo "== setup 2/3: $(TORCH) (the largest download)"
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	@echo "== setup 3/3: requirements.txt"
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@
	@echo "== setup done; use it with: . $(VENV)/bin/activate"

demo: setup ## Bundled corpus -> shards -> training -> probes -> runs/demo/report.html
	$(BIN)/python -m examples.demo

test: lint types ## Lint, types and tests
	$(BIN)/python -m pytest -m "not soak and not alone" -n $(WORKERS) --dist loadfile
	$(BIN)/python -m pytest -m alone

soak: setup ## The full counts of kills; log in benchmarks/results/soak.log
	@mkdir -p benchmarks/results
	$(BIN)/python -m pytest -m soak --timeout=4200 -rA --color=no | tee benchmarks/results/soak.log; \
		exit $${PIPESTATUS[0]}

interop: setup ## Read the same shards with every peer; log in benchmarks/results/interop.log
	"$(PYTHON)" -m venv $(INTEROP)
	echo "$(CURDIR)/$(VENV)/lib/python3.11/site-packages" \
		> $(INTEROP)/lib/python3.11/site-packages/main.pth
	$(INTEROP)/bin/python -m pip install --no-deps -r tests/requirements-interop.txt
	$(INTEROP)/bin/python -m pip install --no-deps --upgrade \
		--target $(INTEROP)/open_clip -r tests/requirements-open-clip.txt
	@mkdir -p benchmarks/results
	INTEROP=$(INTEROP) $(BIN)/python -m pytest tests/pipeline/test_interop.py -rA \
		--color=no | tee benchmarks/results/interop.log; exit $${PIPESTATUS[0]}

# On a machine with a GPU: no .venv, no network, its own Python (benchmarks/gpu/README.md).
GPU_PYTHON := $(if $(filter command environment,$(origin PYTHON)),$(PYTHON),$(or \
	$(wildcard $(BIN)/python),$(PYTHON)))
GPU_WHEELS := build/gpu-wheels
GPU_SITE := build/gpu-site
GPU_SHARDS := build/gpu-shards
GPU_TESTS := tests/benchmarks/test_gpu.py tests/trainer/kernels \
	tests/trainer/test_feed.py tests/trainer/test_update.py tests/trainer/test_masking.py \
	tests/trainer/test_plan_run.py tests/trainer/test_segments.py \
	tests/trainer/test_one_rank.py
GPU_CHECKS := checks syncs
GPU_BENCHES := kernels steps profile ablation baselines precision real_run
# Such as GPU_ARGS='--data build/gpu-data --output /tmp/results'
GPU_ARGS ?=
# Python of that machine.
WHEELS_FOR ?= 3.12

gpu-wheels: setup ## What a machine with a GPU and no network lacks, in build/gpu-*
	rm -rf $(GPU_WHEELS)
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --no-cache-dir \
		--wheel-dir $(GPU_WHEELS) $(shell sed -n '/^deepspeed==/p' requirements.txt)
	$(BIN)/python -m pip download --no-deps --python-version $(WHEELS_FOR) \
		--only-binary=:all: --platform manylinux_2_28_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--dest $(GPU_WHEELS) -r benchmarks/requirements-gpu.txt
	rm -rf $(GPU_SHARDS)*
	$(BIN)/python -c 'from pathlib import Path; from tests import conftest; \
		conftest.small_shards(Path("$(GPU_SHARDS)"))'
	@du -sh $(GPU_WHEELS) $(GPU_SHARDS)

# Only what is not installed, beside everything that is.
gpu-site:
	@PYTHONPATH=$(GPU_SITE) "$(GPU_PYTHON)" -c 'import sys, importlib.util as found; \
		sys.exit(not all(map(found.find_spec, ("deepspeed", "jsonargparse", "crc32c"))))' \
	|| "$(GPU_PYTHON)" -m pip install --quiet --no-index --no-deps --target $(GPU_SITE) \
		$(GPU_WHEELS)/*.whl \
	|| { echo "deepspeed is missing: run make gpu-wheels where there is a network, and" \
		"bring $(GPU_WHEELS)"; exit 1; }

gpu-check: gpu-site ## With a GPU: kernels against references, gpu tests, host waits
	@failed=0; export PYTHONPATH=$(GPU_SITE); \
	for part in $(GPU_CHECKS); do \
		"$(GPU_PYTHON)" -m benchmarks.gpu $$part $(GPU_ARGS) || failed=1; done; \
	"$(GPU_PYTHON)" -m pytest -m gpu $(GPU_TESTS) || failed=1; exit $$failed

gpu-bench: gpu-site ## With a GPU: kernels, steps, profile, ablation, baselines, precision
	@failed=0; export PYTHONPATH=$(GPU_SITE); \
	for part in $(GPU_BENCHES); do \
		"$(GPU_PYTHON)" -m benchmarks.gpu $$part $(GPU_ARGS) || failed=1; done; \
	exit $$failed

lint: setup ## Ruff: rules and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup ## Mypy
	$(BIN)/mypy

clean: ## Remove runs/demo and caches (.venv stays)
	rm -rf runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
