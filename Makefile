# make demo: the whole chain on embedded real images.  make test: everything that proves it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test check ui install lock clean

demo: install
	$(BIN)/python pipelines/mae_then_finetune.py $(ARGS)

test: install
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: install
	$(BIN)/vitlab ui

install: $(STAMP)

# Bytecode is compiled at installation: without it every Ray worker compiles its imports again.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vitlab needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; go on with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	@touch $@

# Pins every package for all supported Pythons and platforms, without any address.
lock:
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra test --no-annotate --no-header pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
