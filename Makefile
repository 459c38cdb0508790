# `make lab` opens the course, `make test` tests it. Everything is installed into .venv and nowhere else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OPEN_MYTHOS := $(VENV)/open-mythos/.installed
ARGS ?=
# In a container everybody is root, and JupyterLab starts for root only when told to.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
# One torch thread a process: two busy threads on two busy cores run many times slower than one.
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# A learner's own saved modules stay out of the tests.
REFERENCE := MYTHOSLAB_WORKBOOKS="$(CURDIR)/$(VENV)/no-workbooks"
PYTEST := $(ONE_THREAD) $(REFERENCE) $(BIN)/python -m pytest -n $(WORKERS) --durations 10

.PHONY: help lab test notebooks train bench

help:
	@echo "make lab        open the course in JupyterLab      ARGS=\"--no-browser --port 8899\""
	@echo "make test       unit tests, every notebook, the export"
	@echo "make notebooks  run the notebooks in order, store their outputs"
	@echo "make train      train the tiny language model      ARGS=\"--seed 1\""
	@echo "make bench      measure training speed"

# Depends on pyproject.toml alone, so a second call installs nothing; written last, so a broken install is completed.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "mythoslab needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1): install a newer one, or name it with make PYTHON=python3.12" >&2; exit 2; }
	@echo "installing into $(VENV), a few minutes the first time"
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

lab: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(AS_ROOT) $(ARGS)

test: $(INSTALLED)
	$(PYTEST) --dist worksteal tests
	$(PYTEST) --dist loadfile --no-loadscope-reorder --nbval --nbval-current-env --nbval-cell-timeout 600 -p tests.notebook_times notebooks
	$(BIN)/mythoslab export --check

notebooks: $(INSTALLED)
	$(ONE_THREAD) $(REFERENCE) $(BIN)/python -m mythoslab.classroom.run

train: $(INSTALLED)
	$(BIN)/mythoslab train --preset tiny $(ARGS)

# To compare with, apart from everything else, and without what it would bring along.
$(OPEN_MYTHOS):
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) "open-mythos>=0.5,<0.6"
	@touch $@

bench: $(INSTALLED) $(OPEN_MYTHOS)
	$(ONE_THREAD) $(BIN)/python -m benchmarks
