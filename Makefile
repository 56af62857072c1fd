PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0

BIN := .venv/bin
STAMP := .venv/.set-up

export PIP_QUIET := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test lint docs clean

setup: $(STAMP)

# torch and torchvision come first and pinned, so that set-up is reproducible.
$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install $(TORCHVISION) --no-deps
	$(BIN)/pip install setuptools wheel
	$(BIN)/pip install --no-build-isolation -e .[test,demo,docs]
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/compare.py

test: $(STAMP)
	$(BIN)/python -m pytest -q --durations=10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m pdoc -d numpy -o build/docs growkern growkern.training

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
