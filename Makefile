# make demo and make test each work alone on a fresh machine: they make .venv, install, and run.
PYTHON ?= python3
BIN := .venv/bin

# Workers of one thread each: threads that wait at barriers would take the cores from one another.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all test-compile test-executed torture test-fast test-portable test-portable-quick lint format bench bench-full native-test test-triton-3.6 package docs evidence clean

demo: .venv/demo-installed
	$(BIN)/fastprune demo

# Everything but what takes most of a minute (kernels compiled ahead of time, pages that run the harness whole), and half of
# the combinations of the mark pairs.
test: .venv/installed
	$(TESTS) -m "not nightly and not compile"

test-all: .venv/installed
	$(TESTS)

# What takes a minute and a half: all but the marks slow, compile (every kernel, ahead of time) and real (models from disk).
test-fast: .venv/installed
	$(TESTS) -m "not slow and not compile and not real and not nightly"

# Every kernel in bfloat16 for sm_90, ahead of time. CI runs it, with either series of Triton.
test-compile: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "compile and not nightly" tests/kernels/test_compile.py

# The kernels' tests on what Triton 3.6 compiles for sm_90a, executed here without a card: tests/executed/README.md.
EXECUTED := triton_ops attention linear_loss fused_model
test-executed: build/triton-3.6/triton-3.6.0.dist-info
	PYTHONPATH=build/triton-3.6 TRITON_CACHE_DIR=$(CURDIR)/build/executed CUDA_VISIBLE_DEVICES= $(TESTS) --executed \
	  tests/executed $(EXECUTED:%=tests/kernels/test_%.py)

# What the suite does of tests/torture in a minute, at length: more kills, faults at every call, more altered files.
torture: .venv/installed
	OMP_NUM_THREADS=1 FASTPRUNE_TORTURE=15 $(BIN)/python -m pytest tests/torture

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_words.py
	$(BIN)/python -m mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-columns=median,iqr,rounds

# The same with longer axes and torch.compile, written as JSON, and a figure of how cost grows (build/growth.png).
bench-full: .venv/installed
	mkdir -p build
	BENCH=full BENCH_JSON=build/bench.json $(BIN)/python -m pytest bench --benchmark-enable \
	  --benchmark-columns=median,iqr,rounds

# The C++ tests under the address and undefined-behaviour sanitizers.
native-test:
	cmake -S . -B build/native -DFASTPRUNE_NATIVE_TESTS=ON -DFASTPRUNE_SANITIZE=ON -DFASTPRUNE_WERROR=ON \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/native --parallel
	ctest --test-dir build/native --output-on-failure

build/triton-3.6/triton-3.6.0.dist-info: .venv/installed
	test -d $@ || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target build/triton-3.6 triton==3.6.0
	touch $@

# test-compile with the other series of Triton.
test-triton-3.6: build/triton-3.6/triton-3.6.0.dist-info
	PYTHONPATH=build/triton-3.6 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "compile and not nightly" \
	  tests/kernels/test_compile.py

# What could follow the processor, the number of threads or the libraries, as other machines would run it: with AVX2, with
# no vector instructions (without bfloat16, which takes many minutes there), on two threads, and without oneDNN.
PORTABLE := tests/engine/test_exact.py tests/engine/test_fused.py tests/engine/test_invariant.py \
  tests/kernels/test_linear_loss.py tests/kernels/test_cpu_ops.py
ONLY ?= not nothing # an expression of pytest -k

test-portable: .venv/installed
	ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell $(TESTS) $(PORTABLE) -k "$(ONLY)"
	ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Prescott ONEDNN_MAX_CPU_ISA=SSE41 \
	  $(TESTS) $(PORTABLE) -k "($(ONLY)) and not bfloat16"
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest $(PORTABLE) -k "($(ONLY)) and not bfloat16"
	$(TESTS) $(PORTABLE) --no-mkldnn -k "($(ONLY)) and not bfloat16"

# Of these what matters most, in a minute of a core. No vector instructions, and families that differ.
test-portable-quick: .venv/installed
	ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Prescott ONEDNN_MAX_CPU_ISA=SSE41 $(TESTS) $(PORTABLE) \
	  -m "not slow" -k "(llama or gemma2-eager or mixtral or process or layout or nll or attention) and not bfloat16"

# Where every measured table and figure comes from: command, result file, time, machine.
evidence: .venv/installed
	@$(BIN)/python -m tools.tables --evidence

# docs/ and the API reference as a site, in build/site; links and names that lead nowhere are errors.
docs: .venv/installed
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The sdist, and the wheel that is built from it, installed where nothing else is: it must import, and run the demo.
package: .venv/installed
	rm -rf build/dist build/clean
	$(BIN)/python -m build --outdir build/dist .
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
	  "$$(echo build/dist/*.whl)[plots,search]"
	cd build/clean && bin/python -c "import fastprune._native" && bin/fastprune demo --quick --quiet --out demo

# The demo alone needs a part of that: no tools for tests, no harness. It imports a tenth of the modules, so pip compiles none.
.venv/demo-installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -e .venv/installed || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  -c constraints.txt -e '.[plots,search]'
	touch $@

.venv/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ .venv/demo-installed

clean:
	rm -rf .venv build
