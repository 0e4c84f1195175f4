# `make serve` and `make test` work on a machine that has only Python >= 3.11, make and a C compiler; `make help` lists all.
#
# Set-up happens once: each stage leaves a stamp in .venv/.stamps named by a checksum of what it was made from, so a
# changed lock repeats its stage and an unchanged one costs nothing.

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
TESTS ?=
BUF := @bufbuild/buf@1.75.0

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
STAMPS := .venv/.stamps
key = $(firstword $(shell cat $(1) 2>/dev/null | cksum))
RUNTIME := $(STAMPS)/runtime-$(call key,requirements.lock)
DEV := $(STAMPS)/dev-$(call key,requirements.lock requirements-dev.lock)
COMMAND := $(STAMPS)/command-$(call key,pyproject.toml)
NATIVE := $(STAMPS)/native-$(call key,$(sort $(wildcard $(addprefix model/native/,*.py *.c *.h))))

STUBS := $(addprefix service/pb/quire/v1/inference_,pb2.py pb2.pyi pb2_grpc.py)
stubs = $(BIN)/python -m grpc_tools.protoc -Iservice/pb=proto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) \
	proto/quire/v1/inference.proto
say = @echo "quire: $(1)"

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

serve: $(RUNTIME) $(COMMAND) $(NATIVE) ## install what is missing, then serve (ARGS="--model DIR --port 50051 ...")
	@exec $(BIN)/quire serve $(ARGS)

test: $(DEV) $(COMMAND) $(NATIVE) ## run the tests (TESTS="tests/engine -k pool")
	@$(BIN)/python -m pytest -q $(TESTS)

test-slow: $(DEV) $(COMMAND) $(NATIVE) ## run the tests that take minutes
	@$(BIN)/python -m pytest -q -m 'slow and not gpu' $(TESTS)

lint: lint-style lint-types lint-stubs lint-proto ## check style, types, generated stubs, the contract (-k: go on at a failure)

lint-style: $(DEV)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@echo "ruff: clean"

lint-types: $(DEV)
	@$(BIN)/mypy

lint-stubs: $(DEV)
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; $(call stubs,$$fresh); \
	 for file in $(STUBS); do diff -q "$$fresh/$$file" $$file || { echo "stubs: stale; run make proto" >&2; exit 1; }; done
	@echo "stubs: in sync with proto/"

lint-proto:
	@if command -v npx >/dev/null; then npx --yes $(BUF) lint && echo "buf: clean"; \
	 else echo "skipped: buf lint (npx is not installed)"; fi

kernels-check: $(DEV) ## compile the kernels for a card, which need not be there; last line is JSON (ARGS="MODULE ...")
	@$(BIN)/python -m model.gpu.check $(ARGS)

# The Python of the machine that has the card: nothing is installed there, and parts whose modules it lacks are skipped.
gpu-check: ## measure everything on a card, in one call under nine minutes; last line is JSON (ARGS="--only steps" or "--dry")
	@for has in 'import torch; raise SystemExit(not torch.cuda.is_available())' '$(HAS_TORCH)'; do \
	 for python in $(BIN)/python $(PYTHON) python3 python; do \
	 if $$python -c "$$has" 2>/dev/null; then exec $$python -m loadtest.gpu.check $(ARGS); fi; done; done; \
	 echo "quire: no Python here has torch 2.11 or newer; name one with PYTHON=..." >&2; exit 2

bench: $(DEV) $(COMMAND) $(NATIVE) ## measure the bare engine and the way through gRPC; last line is JSON
	@$(BIN)/python -m loadtest.bench $(ARGS)

loadtest: $(DEV) $(COMMAND) $(NATIVE) ## load a fresh server with locust; writes loadtest/out/report.html
	@$(BIN)/python -m loadtest.run $(ARGS)

proto: $(DEV) ## regenerate the stubs in service/pb from proto/
	@$(call stubs,.)

# setuptools is what `quire` itself is installed with. torch is installed before the locks, in the build that suits the
# machine, and stays out of them. (In pyproject.toml the override would make every `uv pip install torch` here do nothing.)
COMPILE = echo 'setuptools>=77' | $(BIN)/uv pip compile pyproject.toml - --universal --python-version 3.11 \
	--override <(echo "torch ; python_version < '3'") --generate-hashes --no-annotate \
	--custom-compile-command "make lock" --quiet
lock: ## resolve both lock files again (needs uv in the environment; UPGRADE=--upgrade renews all versions)
	@$(COMPILE) $(UPGRADE) -o requirements.lock
	@$(COMPILE) $(UPGRADE) --extra dev -c requirements.lock -o requirements-dev.lock

native: $(NATIVE) ## build the compiled kernels

clean: ## remove everything that was built, the environment included
	@rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis loadtest/out model/native/lib
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +


.PHONY: help serve test test-slow lint lint-style lint-types lint-stubs lint-proto kernels-check gpu-check bench loadtest proto lock native clean

# ---- set-up, one stage per stamp ----

# A torch that the machine already has (a GPU machine's CUDA build, say) is used as it is.
$(STAMPS)/torch:
	$(call say,creating .venv)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	 || { echo "quire: $(PYTHON) is older than 3.11; name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $$($(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null && echo --system-site-packages) .venv
	@if $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null; then echo "quire: using the torch that is there"; \
	 else echo "quire: installing $(TORCH) (a minute or more; README names a smaller build)"; \
	 $(BIN)/python -m pip install --disable-pip-version-check $$([ -t 1 ] || echo -qq) $(TORCH); fi
	@mkdir -p $(STAMPS) && touch $@
HAS_TORCH := import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11) or not torch.ones(2).equal(torch.ones(2)))

$(RUNTIME): $(STAMPS)/torch
	$(call say,installing requirements.lock)
	@$(PIP) --require-hashes -r requirements.lock
	@touch $@

$(DEV): $(STAMPS)/torch
	$(call say,installing requirements-dev.lock)
	@$(PIP) --require-hashes -r requirements-dev.lock
	@touch $@

$(COMMAND): $(STAMPS)/torch
	$(call say,installing the quire command)
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(NATIVE): $(STAMPS)/torch
	$(call say,building the native library)
	@$(BIN)/python -m model.native.build
	@touch $@
