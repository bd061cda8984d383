# make demo   train on real digits, a few minutes          make lab    open the notebooks in JupyterLab
# make test   everything that has to hold, as CI runs it   make help   all targets
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DESCRIPTION := settings.ini setup.py constraints.txt
NOTEBOOKS = $(shell find nbs -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*')

.PHONY: help demo lab test test-browser test-integrations test-slow fuzz docs lint style imports prepare clean
help:
	@echo "make demo          install and train M2D-N on scikit-learn's digits:"
	@echo "                   weights, curves and predictions in runs/demo"
	@echo "make lab           install and open JupyterLab on the notebooks"
	@echo "make test          install and check: notebooks clean, links, imports and public names,"
	@echo "                   library and README in sync, every notebook and every test runs"
	@echo "make test-browser  the clickable figure in JupyterLab and a real Chromium (installed where possible)"
	@echo "make test-integrations  with timm, transformers, peft and other libraries, which it installs"
	@echo "make test-slow     the cells and tests marked slow"
	@echo "make fuzz          odd arguments, damaged files, faults and kills: the long run, about half an hour"
	@echo "make docs          build the documentation site from the notebooks, in _docs"
	@echo "make lint          the gates that take seconds: links, words, style, ruff, imports, public names"
	@echo "make style         how readable the code is, in numbers"
	@echo "make imports       list which package and module of the library imports which"
	@echo "make prepare       after editing notebooks: export the library, clean the notebooks, write the README"
	@echo "make clean         remove what the other targets made"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
		f"mamba2d needs Python 3.11 or newer, {sys.executable} is {v}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.library: $(DESCRIPTION) | $(VENV)/bin/python
	@echo "installing mamba2d into $(VENV) (PyTorch is large: this can take some minutes)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.development: $(DESCRIPTION) | $(VENV)/bin/python
	@echo "installing mamba2d and its development tools into $(VENV)"
	@echo "(PyTorch is large: this can take some minutes)"
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.library

demo: $(VENV)/.library
	$(BIN)/mamba2d-train --out runs/demo --overwrite

# JupyterLab takes the scripts out of the saved outputs of notebooks that are not trusted: the player of
# tutorials/02_wavefront would not play.
lab: $(VENV)/.development
	@$(BIN)/jupyter trust $(NOTEBOOKS) > /dev/null
	$(BIN)/jupyter lab --notebook-dir=nbs

test: $(VENV)/.development
	$(BIN)/python tests/gates.py all

$(VENV)/.browser: $(VENV)/.development
	$(INSTALL) -e ".[dev,browser,docs]"
	@touch $@

test-browser: $(VENV)/.browser
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name > /dev/null && exit 0; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "installing Chromium through apt-get"; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium > /dev/null; \
	else \
		echo "there is no Chromium, and it cannot be installed here (that takes apt-get, as root):"; \
		echo "install Chromium or Chrome to run this test"; \
	fi || true
	$(BIN)/python -m pytest -q -rs -m browser tests

$(VENV)/.integrations: $(DESCRIPTION) | $(VENV)/bin/python
	@echo "installing the libraries that mamba2d is tried with into $(VENV)"
	$(INSTALL) -e ".[dev,integrations]"
	@touch $@ $(VENV)/.development $(VENV)/.library

test-integrations: $(VENV)/.integrations
	$(BIN)/python tests/gates.py integrations

test-slow: $(VENV)/.development
	$(BIN)/python tests/gates.py slow

fuzz: $(VENV)/.development
	$(BIN)/python tests/fuzz/fuzz.py

$(VENV)/.docs: $(VENV)/.development
	$(INSTALL) -e ".[dev,docs]"
	@touch $@

docs: $(VENV)/.docs
	@rm -rf _docs
	$(BIN)/python docs/build.py _docs
	@echo "the site is in _docs: open _docs/index.html"

lint: $(VENV)/.development
	@$(BIN)/python tests/gates.py quick

style: $(VENV)/.development
	@$(BIN)/python tests/style.py

imports: $(VENV)/.development
	@$(BIN)/python tests/gates.py imports

prepare: $(VENV)/.development
	$(BIN)/nbdev_export
	$(BIN)/python tests/gates.py keep-images
	$(BIN)/nbdev_clean
	$(BIN)/python tests/gates.py write-readme

clean:
	rm -rf $(VENV) _proc _docs build dist *.egg-info runs
