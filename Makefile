# Every target works alone on a machine with Python 3.11 or newer, pip and git: the virtual environment is made
# on first use and again when pyproject.toml or constraints.txt changes.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Small matrices on few cores: one thread per process is faster and steadier than several (torch's default).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
OUT := demo-out$(if $(SHORT),-short)$(if $(DP),-dp$(DP))$(if $(TASK),-$(notdir $(TASK:/=)))
FUZZ_SECONDS ?= 60

.DEFAULT_GOAL := help
.PHONY: help setup check site test test-slow fuzz demo bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(READY) ## make the virtual environment and install everything into it

check: $(READY) ## ruff, mypy, import contract, the pages' links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/site/build.py build/site

site: $(READY) ## the documentation as a site, in build/site
	$(BIN)/python docs/site/build.py build/site

test: $(READY) ## fast tests, a process for each of up to four cores
	$(PYTEST) -m "not slow" -n auto --maxprocesses 4 --dist worksteal

test-slow: $(READY) ## tests with the real model, kills and subprocesses; two files at a time
	$(PYTEST) -m slow -n auto --maxprocesses 2 --dist loadfile

fuzz: $(READY) ## coverage-guided fuzzing of what reads strangers' bytes, FUZZ_SECONDS=60 for all targets together
	$(PIP) install -c constraints.txt -e '.[fuzz]'
	@mkdir -p build/fuzz/header build/fuzz/sealed
	@for target in header sealed; do \
	  OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_$$target.py -max_total_time=$$(( $(FUZZ_SECONDS) / 2 )) \
	    -timeout=5 -rss_limit_mb=512 -max_len=8192 -dict=tests/fuzz/tokens.dict -artifact_prefix=build/fuzz/$$target- \
	    -print_final_stats=1 -verbosity=0 build/fuzz/$$target tests/fuzz/corpus/$$target || exit 1; \
	done

demo: $(READY) ## both sides on a real model and real text; SHORT=1 for the same path at a few steps, DP=8 with differential privacy, TASK=examples/tasks/intents for a task
	$(BIN)/offsite demo -o $(OUT) $(if $(SHORT),--short) $(if $(DP),--dp $(DP)) $(if $(TASK),--task $(TASK))

bench: $(READY) ## the benchmarks (hours on a CPU); results go to their scratch/ folders
	@test -d .bench-data || { echo "make: .bench-data is missing; benchmarks/data/README.md says how to make it" >&2; exit 1; }
	$(BIN)/python benchmarks/client_step/run.py -o benchmarks/client_step/scratch/latest.json
	$(BIN)/python benchmarks/quality/run.py --config benchmarks/quality/medquad.yaml --data .bench-data \
	  --work benchmarks/quality/scratch/work --out benchmarks/quality/scratch/medquad.json

clean: ## remove caches, build outputs and the demo's folders; the virtual environment stays
	rm -rf build dist demo-out demo-out-* *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for python in $(PYTHON) python3.11 python3; do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	  done; \
	  test -n "$$python" || { echo "make: Python 3.11 or newer with venv is needed (PYTHON=/path/to/python3.11)" >&2; exit 1; }; \
	  echo "making $(VENV) with $$($$python --version)"; "$$python" -m venv --clear $(VENV); }
	$(PIP) install '$(TORCH)'
	$(PIP) install -c constraints.txt -e '.[dev]'
# The oracle of the audits' statistics: one file of it, which needs numpy, SciPy and dp-accounting. Its other modules
# want jax and optax, which no test imports; the tests load that file by its path.
	$(PIP) install --no-deps -c constraints.txt jax-privacy
	@touch $@
