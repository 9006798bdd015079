# `make help` lists what there is. PYTHON=… names another interpreter, RECIPE=… and SET="key=value …" another experiment.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(or $(firstword $(shell command -v python3.11 python3 python)),python3.11)
LOCK := requirements/$(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu).txt
INSTALLED := $(VENV)/installed.$(notdir $(LOCK))
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps
CHECKED := $(PIP) --no-build-isolation --require-hashes
COMPILE = uv pip compile pyproject.toml --quiet --no-header --no-annotate --python-version 3.11 --python-platform linux \
  --index-strategy unsafe-best-match --extra train --extra generate --extra score --extra report --extra dev $(UV_OPTIONS)
# Tools that a stage starts (accelerate, dvc) are found in the environment without activating it.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install repro test test-faults test-slurm lint bench lock licences audit

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED) ## Create .venv with every package at its locked version

$(INSTALLED): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; v = tuple(sys.version_info[:2]); sys.exit(None if v == (3, 11) else \
	  "error: the locked wheels need Python 3.11, $(PYTHON) is %d.%d; install it and write PYTHON=/path/to/python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(LOCK): 4.5 GB, a few minutes"
	@# Three packages are built from source: with the locked setuptools, not with what the index has by then.
	@sed -n '/^setuptools==/,/[^\\]$$/p' $(LOCK) >$(VENV)/setuptools.txt
	@$(CHECKED) --requirement $(VENV)/setuptools.txt
	@$(CHECKED) --requirement $(LOCK)
ifeq ($(LOCK),requirements/cpu.txt)
	@# Where the configured indexes lack torch's CPU build, uv knows the index of the PyTorch project.
	@$(CHECKED) --requirement requirements/cpu.override.txt 2>/dev/null || $(BIN)/uv pip install --quiet --no-deps \
	  --torch-backend cpu --require-hashes --requirement requirements/cpu.override.txt
endif
	@$(PIP) --no-build-isolation --editable .
	@touch $@

repro: install ## Run the pipeline; RECIPE=name SET="key=value …" composes another experiment first, MINIATURE=1 a small one
ifneq ($(RECIPE)$(SET)$(MINIATURE),)
	@python -m workflow.compose $(if $(RECIPE),recipe=$(RECIPE)) $(SET) $(if $(MINIATURE),--miniature)
endif
	@python -m workflow.locks
	dvc repro
	@printf '\n' && cat data/report/report.txt

test: install ## Run every test, two at a time (54 minutes on 2 cores where we measured)
	pytest -n 2 --dist loadfile --no-loadscope-reorder

test-faults: install ## Run the injected faults: kills, full disks, broken numbers, hostile input, …
	pytest -n 2 --dist loadfile --no-loadscope-reorder tests/faults

test-slurm: install ## Run the tests on a SLURM of their own; as root, after apt-get install slurm-wlm munge
	pytest tests/slurm

lint: install ## ruff, snakefmt and snakemake --lint
	ruff check
	ruff format --check
	snakefmt --check Snakefile
	snakemake --lint

bench: install ## Measure the stages beside what one would use instead; DATA_DIR=… has MATH-500 for the scoring
	python bench/overhead.py
	python bench/generation.py
	python bench/scoring.py
	python bench/stats.py
	python bench/scale.py

lock: install ## Resolve requirements/{cpu,gpu}.txt again from pyproject.toml; UV_OPTIONS=… for indexes of your own
	$(COMPILE) --extra gpu --output-file requirements/gpu.txt
	$(COMPILE) --extra cpu --override requirements/cpu.override.txt --output-file requirements/cpu.txt \
	  --no-emit-package torch --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec
	@# The checksums are those that the index lists, of the files that everybody gets.
	for lock in cpu gpu; do \
	  uv pip compile requirements/$$lock.txt --quiet --no-deps --universal --python-version 3.11 --no-header \
	    --no-annotate --format pylock.toml --output-file $(VENV)/pylock.$$lock.toml && \
	  python requirements/lock.py $(VENV)/pylock.$$lock.toml requirements/$$lock.txt || exit 1; \
	done

licences: install ## List the licences of all locked packages in requirements/licences.csv
	python requirements/licences.py

audit: install ## Ask the package index for known vulnerabilities of all locked packages
	@# --strict: without it, a package about which nothing could be learnt counts as a sound one.
	@failed=; for lock in cpu gpu; do \
	  uv tool run --quiet --from pip-audit==2.10.1 pip-audit --strict --disable-pip --require-hashes --desc off \
	    --progress-spinner off --requirement requirements/$$lock.txt || failed+=" requirements/$$lock.txt"; \
	done; \
	[ -z "$$failed" ] || { echo "error: vulnerable, or not to be audited from here (pip-audit says above which):$$failed"; exit 1; }
