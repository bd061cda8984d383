# make demo   train on real digits, a few minutes          make lab    open the notebooks in JupyterLab
# make test   everything that has to hold, as CI runs it   make help   all targets
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DESCRIPTION := settings.ini setup.py constraints.txt

.PHONY: help demo lab test test-slow prepare clean
help:
	@echo "make demo       install and train M2D-N on scikit-learn's digits: weights, curves and predictions in runs/demo"
	@echo "make lab        install and open JupyterLab on the notebooks"
	@echo "make test       install and check: notebooks clean, library and README in sync, every notebook and test runs"
	@echo "make test-slow  the cells and tests marked slow"
	@echo "make prepare    after editing notebooks: export the library, clean the notebooks, write the README"
	@echo "make clean      remove what the other targets made"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mamba2d needs Python 3.11 or newer, " + sys.executable + " is " + sys.version.split()[0] + ": make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.library: $(DESCRIPTION) | $(VENV)/bin/python
	@echo "installing mamba2d into $(VENV) (PyTorch is large: this can take some minutes)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.development: $(DESCRIPTION) | $(VENV)/bin/python
	@echo "installing mamba2d and its development tools into $(VENV) (PyTorch is large: this can take some minutes)"
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.library

demo: $(VENV)/.library
	$(BIN)/mamba2d-train --out runs/demo --overwrite

lab: $(VENV)/.development
	$(BIN)/jupyter lab --notebook-dir=nbs

test: $(VENV)/.development
	$(BIN)/python tests/gates.py all

test-slow: $(VENV)/.development
	$(BIN)/python tests/gates.py slow

prepare: $(VENV)/.development
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python tests/gates.py write-readme

clean:
	rm -rf $(VENV) _proc build dist *.egg-info runs
