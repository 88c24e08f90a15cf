# Each line is a command that a person could type.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint

quickstart: .venv/installed
	$(BIN)/robust-accel train quickstart --resume
	$(BIN)/robust-accel train quickstart_standard --resume
	$(BIN)/robust-accel report runs/quickstart runs/quickstart_standard

test: .venv/installed-dev lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pip compiles file by file: all cores do it here, less what is hardly imported (some never compile)
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests|transformers/models)/' .venv/lib || true

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --editable .
	$(COMPILE)
	touch $@

.venv/installed-dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --editable ".[dev]"
	$(COMPILE)
	touch $@ .venv/installed
