# What a newcomer types. `make quickstart` and `make test` make .venv themselves when it is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Children never find the top-level folders as packages of their own (`import buffer`): see docs/architecture.md.
export PYTHONSAFEPATH := 1

.PHONY: quickstart test lint wheel clean

quickstart: $(VENV)/.installed
	$(BIN)/asyncrl launch recipes/quickstart.toml

# Two at a time, each with one thread to compute with: tests wait more than they compute, but for learners and engines.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder -m "not alone"
	$(BIN)/pytest -m alone

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/.installed
	$(BIN)/python -m build --outdir dist

# The lock is complete and installed with --no-deps: what vLLM names and must not have on a CPU (torchvision,
# torchaudio, torchcodec) stays out. A machine whose package index has no CPU build of torch sets
# PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index first.
$(VENV)/.installed: requirements/cpu.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "asyncrl needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python tools/check_install.py
	touch $@

clean:
	rm -rf $(VENV) .cache runs dist build
