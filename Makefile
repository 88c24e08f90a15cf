# Each line is a command that a person could type.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all test-networks test-gpu test-oldest lint audit docs release-check

quickstart: .venv/installed
	$(BIN)/robust-accel train quickstart --resume
	$(BIN)/robust-accel train quickstart_standard --resume
	$(BIN)/robust-accel report runs/quickstart runs/quickstart_standard

PYTEST := python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: .venv/installed-dev lint
	$(BIN)/$(PYTEST) -m "not long"

test-all: .venv/installed-dev lint
	$(BIN)/$(PYTEST)

# on machines that are namespaces of this one: Linux, root, iproute2
test-networks: .venv/installed-dev
	ROBUST_ACCEL_TEST_NETWORKS=1 $(BIN)/python -m pytest tests/training/test_networks.py

# on one GPU; the other tests do not see it
test-gpu: .venv/installed-dev
	ROBUST_ACCEL_TEST_GPU=1 $(BIN)/$(PYTEST) tests/gpu

# every lower bound of pyproject.toml at once
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python \
		--resolution lowest-direct --editable ".[deepspeed,tensorboard,trainer,tests]"
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --no-deps torchattacks
	.venv-oldest/bin/$(PYTEST) -m "not long"

# known vulnerabilities of what is installed
audit: .venv/installed-dev
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --skip-editable --path .venv/lib/python*/site-packages

# the site, whole in site/: every link checked, nothing fetched
docs: .venv/installed-dev
	$(BIN)/mkdocs build --strict

# what would be released, as a user gets it: built, installed by itself, and its quickstart run
release-check:
	rm -rf .venv-release dist
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/pip install --quiet build twine
	.venv-release/bin/python -m build --outdir dist
	.venv-release/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear .venv-release
	.venv-release/bin/pip install --quiet dist/*.whl
	cd dist && ../.venv-release/bin/robust-accel train quickstart
	.venv-release/bin/robust-accel report dist/runs/quickstart

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

# torchattacks, a peer to be measured against, wants a requests of 2020, which nothing else does
.venv/installed-dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --editable ".[dev]"
	$(BIN)/pip install --quiet --no-compile --no-deps "torchattacks>=3.5.1"
	$(COMPILE)
	touch $@ .venv/installed
