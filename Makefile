# make demo and make test each work alone on a fresh machine: they make .venv, install, and run.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format bench native-test clean

demo: .venv/installed
	$(BIN)/fastprune demo

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-columns=median,iqr,rounds

# The C++ tests under the address and undefined-behaviour sanitizers.
native-test:
	cmake -S . -B build/native -DFASTPRUNE_NATIVE_TESTS=ON -DFASTPRUNE_SANITIZE=ON -DFASTPRUNE_WERROR=ON \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/native --parallel
	ctest --test-dir build/native --output-on-failure

.venv/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build
