# Everything on a fresh machine: `make demo`, `make test`. Both create .venv and install what they
# need, once. `make test VENV= PYTHON=python3` uses an interpreter that already has torch and pytest
# and needs no network.
VENV ?= .venv
PYTHON ?= python3
# Which tests `make test` runs, as pytest's -m: `make test MARKS=` runs all of them.
MARKS ?= not slow
export OMP_NUM_THREADS ?= 2

ifeq ($(VENV),)
RUN := $(PYTHON)
READY := offline
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test lint docs package try-torch try-triton offline clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(RUN) -m benchmarks.video_dit.demo --out demo_out

# A process for each core with one thread each, where pytest-xdist is there.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "$(MARKS)" \
	  $$($(RUN) -c "import xdist" 2>/dev/null && printf -- "-n auto --dist worksteal") $(PYTEST_ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy -p svg_ear_compile

# The documentation as a site; a warning fails.
docs: $(READY)
	$(RUN) -m sphinx -b html -d build/doctrees --fail-on-warning --keep-going --quiet docs site

# The sdist, the wheel built from it, and the check that a package index would make.
package: $(READY)
	rm -rf dist
	$(RUN) -m build --no-isolation
	$(RUN) -m twine check --strict dist/*

# What depends on PyTorch's interfaces, beside another release of it: `make try-torch TORCH=2.15.0`.
try-torch:
	test -n "$(TORCH)"
	$(PYTHON) -m venv .venv-torch-$(TORCH)
	.venv-torch-$(TORCH)/bin/python -m pip install --quiet torch==$(TORCH)
	.venv-torch-$(TORCH)/bin/python -m pip install --quiet --editable ".[test]"
	OMP_NUM_THREADS=1 .venv-torch-$(TORCH)/bin/python -m pytest -n auto --dist worksteal \
	  tests/test_packaging.py tests/passes tests/svg_ear_compile \
	  tests/kernels/test_operator.py tests/kernels/test_aot_compile.py $(PYTEST_ARGS)

# Every launch configuration for every GPU by another release: `make try-triton TRITON=3.8.0`.
try-triton: $(READY)
	test -n "$(TRITON)"
	$(RUN) -m pip install --quiet --no-deps --target .triton-$(TRITON) triton==$(TRITON)
	OMP_NUM_THREADS=1 PYTHONPATH=.triton-$(TRITON) $(RUN) -m pytest -n auto --dist worksteal \
	  tests/kernels/test_aot_compile.py $(PYTEST_ARGS)

# torch comes first and alone: its pinned version decides what every other package may pull in.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[test,demo,examples,docs,lint]" torchao
	touch $@

offline:
	$(RUN) -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .

clean:
	rm -rf $(VENV) .venv-torch-* .triton-* build dist site demo_out *.egg-info
