# make demo   set up and run the main job          make test   set up, lint, all tests
# make install / lint / docs / bench / gpu / gpu-tune / clean; PYTHON=python3.12 chooses the interpreter
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

comma := ,
say = @printf '\n== %s\n' "$(1)"

.PHONY: demo test install lint docs bench gpu gpu-tune clean test-soak test-triton-oldest test-triton-newest \
	test-transformers-oldest test-lmms-eval

demo: install
	$(BIN)/pruneops demo

# the tests of compiled code want every kind: without clusters (as 86 and 89), Hopper, little shared memory (100 has more)
test: export PRUNEOPS_CUDA_ARCHS ?= 80,90,120

install: .venv/.built

.venv/.packages: requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "pruneops needs Python 3.10 or later; choose one with make PYTHON=python3.12"; exit 2; }
	$(call say,set-up: .venv with the packages of requirements/dev.txt)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements/dev.txt
	touch $@

.venv/.built: .venv/.packages $(SOURCES)
	$(call say,build: C++ and CUDA kernels (one to three minutes on 2 cores))
	PATH="$(CURDIR)/$(BIN):$$PATH" PRUNEOPS_REQUIRE_NATIVE=1 \
		$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(BIN)/pruneops info
	touch $@

lint: install
	$(call say,lint: style and types)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/pyrefly coverage check --public-only $(addprefix pruneops/,ops methods reference backends.py checks.py autocast.py cli.py)

test: lint
	$(call say,tests: reference$(comma) C++$(comma) Triton in its interpreter$(comma) CUDA emulated (13 minutes on 2 cores))
	PRUNEOPS_REQUIRE=cpu,triton $(BIN)/python -m pytest -q -n auto --dist worksteal
	$(MAKE) --no-print-directory test-soak test-triton-oldest test-triton-newest test-transformers-oldest test-lmms-eval \
		$(shell $(PYTHON) -c 'import sys; print("docs" * (sys.version_info >= (3, 11)))')

test-soak: install
	$(call say,random calls of every operator and backend against float64 (1 minute))
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --seconds 60 --device cpu --backends triton & \
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --seconds 60 --device cpu && wait $$!

# results of the operators, launches by Triton's launcher, and that kernels compile for a GPU
TRITON_TESTS = tests/ops tests/test_triton_compile.py \
	-k "triton and (known or edges or special or launchers or fit and 90)"
test-triton-oldest test-triton-newest: test-%: .overlays/%/.packages
	$(call say,operators on $* (1 to 2 minutes))
	PYTHONPATH=.overlays/$* PRUNEOPS_REQUIRE=cpu,triton $(BIN)/python -m pytest -q -n auto $(TRITON_TESTS)
	PYTHONPATH=.overlays/$* TRITON_INTERPRET=1 $(BIN)/python -m tests.soak --seconds 20 --device cpu --backends triton

test-transformers-oldest: test-%: .overlays/%/.packages
	$(call say,adapters on $* (2 minutes))
	PYTHONPATH=.overlays/$* PRUNEOPS_REQUIRE=cpu $(BIN)/python -m pytest -q -n auto tests/adapters

test-lmms-eval: test-%: .overlays/%/.packages
	$(call say,the recipe for lmms-eval$(comma) with the harness itself)
	PYTHONPATH=.overlays/$* PRUNEOPS_REQUIRE=cpu $(BIN)/python -m pytest -q tests/test_lmms_eval.py

.overlays/%/.packages: requirements/%.txt .venv/.built
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(@D) -r $<
	touch $@

docs: .overlays/docs/.packages
	$(call say,documentation: build/docs/index.html (a warning fails it; Sphinx 9 needs Python 3.11))
	PYTHONPATH=.overlays/docs $(BIN)/python -m sphinx -q -W --keep-going docs build/docs

bench: install
	for operator in $(basename $(notdir $(wildcard benchmarks/ops/[!_]*.py))); do \
		$(BIN)/python -m benchmarks ops $$operator || exit; done

# on a machine with a CUDA build of torch; both use the environment at hand and install nothing.
# make gpu ARGS="--soak 60"; without a GPU: make gpu ARGS="--device cpu"
AT_HAND = $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo $(PYTHON) || echo $(BIN)/python)
gpu:
	$(AT_HAND) -m benchmarks.gpu $(ARGS)

gpu-tune:
	$(AT_HAND) -m benchmarks.tune $(ARGS)

clean:
	rm -rf .venv .overlays build dist *.egg-info pruneops/*.so pruneops/_build.json .pytest_cache .ruff_cache .hypothesis
