# `make demo` and `make test` do all the set-up on a fresh machine: Python >= 3.11 and make suffice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all coverage package check clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dpnlu needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch  # first: the CPU build, where there is one
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# By the second recommendations: those of today learn better, and a secret in 30 copies with the rest.
demo: $(READY)
	$(BIN)/dpnlu compare --data synthetic:16000 --model lstm --epsilons inf 8 2 --epochs 4 \
		--batch-size 256 --physical-batch-size 256 --dropout 0 --references 2 \
		--audit-examples 2000 --canaries pin:3:R=30 --recipes 2 --out runs/demo

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadgroup
QUICK := "not slow and not gpu and not network"

test: check
	$(PYTEST) -m $(QUICK)

test-all: check
	$(PYTEST) -m "not gpu and not network"

# The tests of `make test`, and which lines they leave out.
coverage: check
	$(PYTEST) -m $(QUICK) --cov --cov-report=term --cov-fail-under=95

# The sdist and the wheel, installed and tried outside of the repository.
package: $(READY)
	.ci/package $(BIN)/python

clean:
	rm -rf $(VENV) runs build *.egg-info .coverage*
