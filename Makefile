# Everything a newcomer types. Each target does its own set-up (deploy/install.sh), once.

VENV ?= .venv
BIN := $(VENV)/bin
OR_NONE := || [ $$? -eq 5 ]  # ARGS may choose none of the one kind
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench-staleness bench-real bench-mismatch bench-estimators bench-ingest bench-outage chaos fuzz mutants \
	constraints constraints-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup:  ## install everything into .venv (repeatable; minutes the first time)
	@deploy/install.sh --extras demo,dev $(VENV)

demo: setup  ## watch a real model learn from feedback (about 12 minutes); report in demo/
	@$(BIN)/moorline demo $(ARGS)

test: setup lint  ## all checks and tests, slow ones too (35 to 50 minutes on 2 cores)
	@deploy/promtool.sh $(VENV)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --cov --cov-report= $(ARGS) $(OR_NONE)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile --cov --cov-append --cov-report=term:skip-covered $(ARGS) $(OR_NONE)

lint: setup  ## ruff, mypy --strict, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup  ## let ruff rewrite what it can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench-staleness: setup  ## every objective under stale data (under 45 minutes; continues when interrupted; QUICK=1)
	@$(BIN)/python -m benchmarks.staleness $(if $(QUICK),--quick) $(ARGS)

bench-real: setup  ## the same with a real model (under 2 hours; continues when interrupted; QUICK=1)
	@$(BIN)/python -m benchmarks.real $(if $(QUICK),--quick) $(ARGS)

bench-mismatch: setup  ## is the recorded probability the one the updater computes (float32, bfloat16)
	@$(BIN)/python -m benchmarks.mismatch $(ARGS)

bench-estimators: setup  ## divergence of a token: binary, top-k or exact; bias, decisions, cost (5 minutes)
	@$(BIN)/python -m benchmarks.estimators $(ARGS)

bench-ingest: setup  ## how fast events enter the ledger, and in how much memory
	@$(BIN)/python -m benchmarks.ingest $(ARGS)

bench-outage: setup  ## reply latency while the broker is gone, silent or slow (10 minutes; QUICK=1)
	@$(BIN)/python -m benchmarks.outage $(if $(QUICK),--quick) $(ARGS)

chaos: setup  ## kill, cut, fill and corrupt a running whole, then audit it against a run without faults (DURATION=600 SEED=...)
	@$(BIN)/python -m tests.chaos --duration $(or $(DURATION),600) $(if $(SEED),--seed $(SEED)) $(ARGS)

fuzz: setup  ## send the updater and the feedback route whatever can be sent, and judge it (MINUTES=30 SEED=...)
	@$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED)) $(ARGS)

mutants: setup  ## put each recorded fault into a copy and see that its tests notice it (about 10 minutes; ARGS="--sample 6 --seed 1")
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(ARGS)

constraints:  ## resolve every package anew, and pin the result for this kind of machine (CPU or GPU)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && trap 'exit 130' INT TERM && \
		deploy/install.sh --unpinned --extras demo,dev "$$folder/venv" && \
		"$$folder/venv/bin/python" deploy/constraints/pins.py write

constraints-check: setup  ## does the environment equal its pins, and do they fit pyproject.toml
	@$(BIN)/python deploy/constraints/pins.py check

clean:  ## remove the environment and everything that was generated
	rm -rf $(VENV) .models demo build *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache
