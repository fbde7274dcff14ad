# `make` lists the targets. Everything happens in .venv, which the first one that needs it makes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file of tests stays in one process; tests/conftest.py says how many processes there are, and which file comes first.
# What tests start is compiled once and not by each process, whatever the caller's environment says.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q --durations=10 \
	--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Python sources are not in the list: the install is editable, only what is compiled or resolved needs it again.
INSTALL_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/cuda/*)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types sanitize asan tsan bench setup setup-dev clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup  ## train, be hurt, recover, and compare with a run that was never hurt
	$(BIN)/python examples/demo.py

test: setup-dev  ## all tests
	$(PYTEST)

check: lint types  ## what CI runs: lint, types, tests
	@$(MAKE) --no-print-directory test

lint: setup-dev  ## ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev  ## mypy --strict
	$(BIN)/mypy

sanitize: asan tsan  ## the native engine's C++ tests under sanitizers

asan:  ## the same, for memory errors and undefined behaviour
	@$(MAKE) --no-print-directory -C tests/native/cpp SANITIZE=address,undefined
	@$(MAKE) --no-print-directory -C tests/native/standin/check SANITIZE=address,undefined

tsan:  ## the same, for data races
	@$(MAKE) --no-print-directory -C tests/native/cpp SANITIZE=thread
	@$(MAKE) --no-print-directory -C tests/native/standin/check SANITIZE=thread

bench: $(VENV)/.installed-bench  ## every benchmark in bench/
	@set -e; for file in bench/*.py $(patsubst %/__main__.py,%,$(wildcard bench/*/__main__.py)); do \
		echo "$$file"; $(BIN)/python "$$file" || [ $$? -eq 69 ]; \
	done

setup: $(VENV)/.installed  ## install ftrain into .venv
setup-dev: $(VENV)/.installed-dev  ## the same, with what the checks need

# Its last file is pip: a venv that lacks it, for want of Debian's python3-venv, is made again.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INSTALL_INPUTS) | $(BIN)/pip
	@echo "installing ftrain and what it needs into $(VENV) (torch is large: this can take minutes)"
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS) | $(BIN)/pip
	@echo "installing ftrain, what it needs and what its checks need into $(VENV) (this can take minutes)"
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(INSTALL_INPUTS) | $(BIN)/pip
	@echo "installing ftrain, what it needs and what its checks and benchmarks need into $(VENV) (this can take minutes)"
	@$(PIP_INSTALL) --editable '.[dev,bench]'
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed

clean:  ## remove .venv, build products and caches; runs stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find ftrain tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
