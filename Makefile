# Two commands on a fresh machine with Python >= 3.11: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: quickstart test lint install clean

# One stamp per (requirements, project metadata): editing either reinstalls, nothing else does.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"at2po needs Python >= 3.11, {sys.executable} is {v.major}.{v.minor}; try: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing at2po into $(VENV) (once; about 1 GB with PyTorch) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[agent,serve,dev]'
	@touch $@

install: $(VENV)/.installed

quickstart: install  ## train a tiny searcher from nothing, about 5 minutes on 2 cores
	@$(BIN)/at2po train quickstart $(ARGS)

test: install  ## the whole test suite: CPU, offline, minutes
	@$(BIN)/python -m pytest $(ARGS)

lint: install  ## format, lint, types, import contracts, spelling
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/codespell

clean:
	rm -rf $(VENV) build *.egg-info
