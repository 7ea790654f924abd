# `make demo` and `make test` need python3.11 (or newer) and make, and nothing else: each makes .venv on first use.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-all lint types docs clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml $(wildcard plugins/*/pyproject.toml) tools/install.sh
	PYTHON="$(PYTHON)" sh tools/install.sh "$(VENV)"

demo: install
	$(BIN)/mmhub demo

test: install
	$(BIN)/python -m pytest -n 2

test-all: install
	$(BIN)/python -m pytest -m "not gpu and not network"

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy mmhub $(wildcard plugins/*/mmhub_* examples/plugins/*/mmhub_*)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
