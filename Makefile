PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
TRITON ?= triton==3.7.1

BIN := .venv/bin
STAMP := .venv/.set-up

export PIP_QUIET := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test bench end-to-end lint sanitize docs clean

setup: $(STAMP)

# torch, torchvision and triton come first and pinned, so that set-up is reproducible.
$(STAMP): pyproject.toml Makefile setup.py $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install $(TORCHVISION) --no-deps
	$(BIN)/pip install $(TRITON)
	$(BIN)/pip install setuptools wheel ninja pybind11
	$(BIN)/pip install --no-build-isolation -e .[test,demo,docs,gromo,bench]
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/compare.py

test: $(STAMP)
	$(BIN)/python -m pytest -q --durations=10

# Every kernel beside users' PyTorch, the best of PyTorch and gromo, in bench/results/<machine>; BENCH="-k eigh" for a
# part, which leaves the other rows as they are. The limit is on starting rows. Whole growth steps are rows of their own.
BENCH ?=
bench: ROWS := bench --seconds 720
end-to-end: ROWS := bench/end_to_end.py
bench end-to-end: $(STAMP)
	$(BIN)/python -m pytest $(ROWS) -q --benchmark-quiet $(BENCH); status=$$?; \
		$(BIN)/python bench/report.py; exit $$status

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The C++ under the address and undefined-behaviour sanitizers, over the cases of the ops.
SANITIZED := build/sanitized
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
SANITIZED_TESTS := tests/test_ops_moments.py tests/test_ops_jacobi.py tests/test_native.py
sanitize: $(STAMP)
	rm -rf $(SANITIZED)
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" GROWKERN_BUILD=cpu \
		$(BIN)/pip install --no-build-isolation --no-deps --target $(SANITIZED) .
	cp -r tests $(SANITIZED)/tests
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so):$$(c++ -print-file-name=libstdc++.so)" \
		$(abspath $(BIN))/python -m pytest -q -s -c /dev/null --rootdir . $(SANITIZED_TESTS) \
		-k "not memory and not monkeypatch and not stable_interface"

docs: $(STAMP)
	$(BIN)/python -m pdoc -d numpy -o build/docs growkern growkern.training

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
