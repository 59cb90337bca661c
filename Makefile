# What can be done here: `make help`. Everything runs in a virtual environment of its own (.venv), which is made
# when it is missing and brought up to date when setup.cfg or pyproject.toml changed.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
COUNT ?= 100000

VENV := .venv
BIN := $(VENV)/bin
METADATA := setup.cfg pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo test proof kills generations lint format bench fuzz real real-full races soak parity man tutorial clean

help: ## say what can be made (this)
	@echo 'patcher: change the code of a native program while it runs'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 @\2/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "%-17s%s\n", $$1, $$2 }'
	@echo
	@echo 'Variables: PYTHON (python3), PIP_ARGS (more arguments for pip install), PYTEST_ARGS (more for pytest),'
	@echo '           COUNT (100000 mutants)'

demo: $(VENV)/run.stamp ## start a small program and edit it while it runs (needs gcc; 6 seconds)
	@$(BIN)/python fixtures/demo/run.py

test: $(VENV)/dev.stamp ## run the tests, one process of them per processor (PYTEST_ARGS="-k words" for some of them)
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

proof: $(VENV)/dev.stamp ## hold the linker against four others, on 300 programs that are also replaced as they run, and data against a model (20 minutes)
	@PATCHER_PROGRAMS=300 PATCHER_RUNS=1000 $(BIN)/python -m pytest -q tests/proof tests/link/test_against_linkers.py \
		tests/data/test_model.py $(PYTEST_ARGS)

kills: $(VENV)/dev.stamp ## kill a patcher, stop it, or fail what it asks, at each of its system calls (gcc; an hour with two processors)
	@PATCHER_KILLS=every $(BIN)/python -m pytest -q -n auto --maxprocesses 2 --dist worksteal tests/crash $(PYTEST_ARGS)

generations: $(VENV)/dev.stamp ## apply 100,000 generations to a program under load, old code poisoned as soon as it is free (gcc; 40 minutes)
	@GENERATIONS=100000 $(BIN)/python -m pytest -q tests/patch/test_reclaim.py -k without_end $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict patcher

tutorial: $(VENV)/run.stamp ## bring the transcript in docs/tutorial.md up to date (needs gcc)
	@$(BIN)/python fixtures/tutorial/run.py --write

man: $(VENV)/run.stamp ## write the manual's pages (man/) from the commands
	@$(BIN)/python -m patcher.cli.manual man

format: $(VENV)/dev.stamp ## put the sources into the one format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix --select I .

bench: $(VENV)/run.stamp ## measure from a save to the first new answer, and against the compile alone, the linker, the check of layouts and how long a program stands still (needs gcc, clang and make; 25 minutes)
	@$(BIN)/python benchmarks/latency.py
	@$(BIN)/python benchmarks/loop.py
	@$(BIN)/python benchmarks/link.py
	@$(BIN)/python benchmarks/layouts.py
	@$(BIN)/python benchmarks/pause.py

fuzz: $(VENV)/dev.stamp ## apply COUNT damaged objects to running programs (needs gcc and clang; 20 minutes)
	@cd tests && ../$(BIN)/python -m fuzz.driver $(COUNT) --save ../build/fuzz

races: $(VENV)/dev.stamp ## let two patchers change one process a thousand times each, at once (3 minutes)
	@PATCHER_RACES=1000 $(BIN)/python -m pytest -q tests/patch/test_race.py $(PYTEST_ARGS)

soak: $(VENV)/dev.stamp ## change a busy program of 64 threads at random, kill whoever does it, and miss nothing (10 minutes)
	@PATCHER_SOAK=600 $(BIN)/python -m pytest -q -s tests/soak $(PYTEST_ARGS)

parity: $(VENV)/dev.stamp ## play 200 series of random edits, and hold the patched processes against cold builds (20 minutes)
	@PATCHER_PARITY=200 $(BIN)/python -m pytest -q -s tests/parity $(PYTEST_ARGS)

real: $(VENV)/dev.stamp ## patch redis, lua and memcached, and watch these, tinyproxy and mosquitto being edited (fetches and builds them with apt, gcc, clang, make and cmake)
	@$(BIN)/python -m pytest -q tests/real -m real $(PYTEST_ARGS)

real-full: $(VENV)/dev.stamp ## the same with all of redis' own tests, on sources compiled again (half an hour)
	@PATCHER_REAL_FULL=1 $(BIN)/python -m pytest -q tests/real -m real $(PYTEST_ARGS)

clean: ## remove the virtual environment and everything that was made
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are younger than the metadata that was installed from; pip itself is quiet unless it fails.
$(VENV)/run.stamp: $(METADATA) | $(BIN)/python
	@echo 'installing patcher into $(VENV)'
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -e .
	@touch $@

$(VENV)/dev.stamp: $(METADATA) | $(BIN)/python
	@echo 'installing patcher and its test tools into $(VENV)'
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -e '.[test,lint]'
	@touch $@ $(VENV)/run.stamp

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'patcher needs Python 3.11 or later: set PYTHON' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo 'no virtual environment: install python3-venv' >&2; exit 1; }
