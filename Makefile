# Two commands to know: `make lab` and `make test`. Each sets up .venv first, when that is needed.
PYTHON ?= python3
LAB_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/ready
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

# torch's idle threads sleep instead of spinning: where another program is busy too, that is many times faster
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup lab test notebooks student bench lint

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with everything in it, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
	       "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lab,test]"
	@# curvlinops asks for torchvision through backpack and uses it for nothing; beside a CPU torch it fails to import
	$(BIN)/python -m pip uninstall --quiet --yes torchvision
	@touch $@

lab: $(STAMP)  ## open JupyterLab at the first notebook (LAB_FLAGS="--no-browser --port 9000")
	$(BIN)/jupyter lab $(AS_ROOT) --notebook-dir=notebooks --LabApp.default_url=/lab/tree/00_start_here.ipynb $(LAB_FLAGS)

test: $(STAMP)  ## run all tests, those in a browser and those of the notebooks included
	$(BIN)/python -m pytest $(TEST_FLAGS)

notebooks: $(STAMP)  ## run every notebook and keep its outputs, tidied
	$(BIN)/python notebooks/run.py

student: $(STAMP)  ## write notebooks/student/: the course without its solutions
	$(BIN)/python notebooks/run.py --student

bench: $(STAMP)  ## run every benchmark; each prints one table
	@for script in $(sort $(filter-out %_runs.py %_problems.py,$(wildcard benchmarks/*.py))); do \
	  echo; echo "== $$script"; $(BIN)/python $$script || exit 1; done
	@$(if $(wildcard benchmarks/*.py),,echo "no benchmarks yet")

lint: $(STAMP)  ## check style and imports with ruff
	$(BIN)/ruff check .
