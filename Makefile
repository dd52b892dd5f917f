# Every target works from a fresh clone; `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.PHONY: help setup demo test soak interop lint types clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTEROP := $(CURDIR)/.venv-interop
TORCH := $(shell sed -n '/^torch==/p' requirements.txt)
# Tests wait for processes as often as they compute.
WORKERS ?= $(shell echo $$(( $$(nproc) + 1 )))
PYTHON ?= $(shell command -v python3.11 || command -v python3)

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' \
		| while IFS="$$(printf '\t')" read -r name text; do \
			printf '  make %-9s %s\n' "$$name" "$$text"; done

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

lint: setup ## Ruff: rules and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup ## Mypy
	$(BIN)/mypy

clean: ## Remove runs/demo and caches (.venv stays)
	rm -rf runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
