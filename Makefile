# `make demo` and `make test` do all the set-up on a fresh machine: Python >= 3.11 and make suffice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all check clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dpnlu needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch  # first: the CPU build, where there is one
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/dpnlu compare --data synthetic:16000 --model lstm --epsilons inf 8 2 --epochs 6 \
		--batch-size 512 --physical-batch-size 512 --dropout 0 --references 2 \
		--audit-examples 2000 --canaries pin:3:R=10 --out runs/demo

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadgroup -m "not slow and not gpu and not network"

test-all: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadgroup -m "not gpu and not network"

clean:
	rm -rf $(VENV) runs build *.egg-info
