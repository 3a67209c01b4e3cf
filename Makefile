# make demo   set up and run the main job          make test   set up, lint, all tests
# make install / lint / bench / gpu / clean; PYTHON=python3.12 chooses the interpreter
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test install lint bench gpu clean test-triton-oldest test-triton-newest test-transformers-oldest \
	test-lmms-eval

demo: install
	$(BIN)/pruneops demo

install: .venv/.built

.venv/.packages: requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "pruneops needs Python 3.10 or later; choose one with make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements/dev.txt
	touch $@

.venv/.built: .venv/.packages $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" PRUNEOPS_REQUIRE_NATIVE=1 \
		$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(BIN)/pruneops info
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	PRUNEOPS_REQUIRE=cpu,triton $(BIN)/python -m pytest -q -n auto
	$(MAKE) test-triton-oldest test-triton-newest test-transformers-oldest test-lmms-eval

# answers of the operators on the oldest supported and on the newest Triton, and that kernels compile for two cards;
# adapters on the oldest supported transformers
TRITON_TESTS = tests/ops tests/test_triton_compile.py \
	-k "triton and (known or exact or hard or many or edges or special or launchers or fit and (90 or 120))"
test-triton-oldest test-triton-newest: test-%: .overlays/%/.packages
	PYTHONPATH=.overlays/$* PRUNEOPS_REQUIRE=cpu,triton $(BIN)/python -m pytest -q -n auto $(TRITON_TESTS)

test-transformers-oldest: test-%: .overlays/%/.packages
	PYTHONPATH=.overlays/$* PRUNEOPS_REQUIRE=cpu $(BIN)/python -m pytest -q -n auto tests/adapters

# the recipe for lmms-eval, with the harness itself
test-lmms-eval: test-%: .overlays/%/.packages
	PYTHONPATH=.overlays/$* PRUNEOPS_REQUIRE=cpu $(BIN)/python -m pytest -q tests/test_lmms_eval.py

.overlays/%/.packages: requirements/%.txt .venv/.built
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(@D) -r $<
	touch $@

bench: install
	for operator in $(basename $(notdir $(wildcard benchmarks/ops/[!_]*.py))); do \
		$(BIN)/python -m benchmarks ops $$operator || exit; done

# on a machine with a CUDA build of torch; uses the environment at hand, installs nothing
gpu:
	$(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo $(PYTHON) || echo $(BIN)/python) -m benchmarks.gpu

clean:
	rm -rf .venv .overlays build dist *.egg-info pruneops/*.so pruneops/_build.json .pytest_cache .ruff_cache .hypothesis
