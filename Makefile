# make demo   train on real digits, a few minutes          make lab    open the notebooks in JupyterLab
# make test   everything that has to hold, as CI runs it   make help   all targets
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DESCRIPTION := settings.ini setup.py constraints.txt

.PHONY: help demo lab test test-browser test-slow prepare clean
help:
	@echo "make demo       install and train M2D-N on scikit-learn's digits: weights, curves and predictions in runs/demo"
	@echo "make lab        install and open JupyterLab on the notebooks"
	@echo "make test       install and check: notebooks clean, library and README in sync, every notebook and test runs"
	@echo "make test-browser  the clickable figure in JupyterLab and a real Chromium, which it installs where it can"
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
	@$(BIN)/jupyter trust nbs/*.ipynb > /dev/null  # else JupyterLab takes the scripts out of saved outputs, such as the player of 21_tutorial.wavefront
	$(BIN)/jupyter lab --notebook-dir=nbs

test: $(VENV)/.development
	$(BIN)/python tests/gates.py all

$(VENV)/.browser: $(VENV)/.development
	$(INSTALL) -e ".[dev,browser]"
	@touch $@

test-browser: $(VENV)/.browser
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$name > /dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "installing Chromium through apt-get"; apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium > /dev/null; \
	else echo "there is no Chromium, and it cannot be installed here (that takes apt-get, as root): install Chromium or Chrome to run this test"; fi || true
	$(BIN)/python -m pytest -q -rs -m browser tests

test-slow: $(VENV)/.development
	$(BIN)/python tests/gates.py slow

prepare: $(VENV)/.development
	$(BIN)/nbdev_export && $(BIN)/python tests/gates.py keep-pictures && $(BIN)/nbdev_clean && $(BIN)/python tests/gates.py write-readme

clean:
	rm -rf $(VENV) _proc build dist *.egg-info runs
