# The commands of this repository. Each one (but gpu-check) sets up .venv by itself; a fresh machine needs
# python3 >= 3.11 with venv.
#   make demo       a diffusion transformer on 4 CPU ranks, compared with one process
#   make test       the tests, in 10 minutes on 2 cores (make test PYTEST_ARGS="tests/passes -k view")
#   make test-all   those too that `make test` leaves out: whole matrices, every GPU architecture
#   make torture    faults thrown at running jobs: kills, cut networks, full disks, ranks out of step (root for some)
#   make check      formatting, lint, types, layout rules
#   make docs       the pages as a site that can be searched, in build/site
#   make gpu-check  on a machine with a GPU: are the kernels right, how fast are they (make gpu-check WHEELS=folder)
#   make clean      remove everything that was built, the venv included

PYTHON ?= python3
# For example PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu": the CPU build of torch.
PIP_FLAGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
# For example "--only speed puts" or "--dry-run".
GPU_ARGS ?=
# For example "--only process network" or "--kills 0".
TORTURE_ARGS ?=
WHEELS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := sfcompile passes codegen runtime
SOURCES := $(PACKAGES) tests $(wildcard examples benchmarks)
LINKS := build/typecheck/sfcompile

.PHONY: demo test test-all torture check format lint typecheck layout docs gpu-check clean

demo: $(STAMP)
	$(BIN)/sfcompile demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python tests/support/run_tests.py $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python tests/support/run_tests.py --all $(PYTEST_ARGS)

torture: $(STAMP)
	$(BIN)/python tests/support/run_torture.py $(TORTURE_ARGS)

check: lint typecheck layout

format: $(STAMP)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

lint: $(STAMP)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

# Type checkers know neither `__path__` nor setuptools' mapping: they get the tree that a wheel would have, as links.
typecheck: $(STAMP)
	rm -rf $(LINKS)
	mkdir -p $(LINKS)
	ln -s $(CURDIR)/sfcompile/* $(LINKS)/
	for folder in passes codegen runtime; do ln -s $(CURDIR)/$$folder $(LINKS)/$$folder; done
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p sfcompile

layout: $(STAMP)
	$(BIN)/python -m pytest -q -m "not thorough" tests/packaging

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# With the Python at hand, which has torch and Triton: such machines may reach no package index.
gpu-check:
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS)) $(GPU_ARGS)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name another one: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
