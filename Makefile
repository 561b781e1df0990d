# Two commands do all the set-up: `make demo` writes a story, `make test` runs the tests.
#
#   make demo                     PyTorch and the numpy reference from one seed, side by side
#   make demo FRAMEWORK=numpy     the numpy reference alone: no large download
#   make demo SEED=7 PROMPT="The wolf"
#   make test                     everything; make test PYTEST_ARGS="-k tokenizer" for a part
#   make check                    ruff and mypy
#   make bench                    the tables of benchmarks/
#
# Each environment is made once, in .venv (or .venv-numpy), and made again when a dependency changes.

PYTHON ?= python3
FRAMEWORK ?= pt
PROMPT ?= Once upon a time there was
SEED ?= 3
LENGTH ?= 100
PYTEST_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
PIP = python -m pip install --quiet --constraint constraints.txt
SOURCES = setup.cfg pyproject.toml constraints.txt
STAMP = $(if $(filter numpy,$(FRAMEWORK)),.venv-numpy/numpy,.venv/$(FRAMEWORK))

.PHONY: demo test check bench clean python

demo: $(STAMP)
	@$(dir $(STAMP))bin/python scripts/demo.py --framework $(FRAMEWORK) --seed $(SEED) --length $(LENGTH) "$(PROMPT)"

test: .venv/dev
	@. .venv/bin/activate && scripts/test $(PYTEST_ARGS)

check: .venv/dev
	@. .venv/bin/activate && scripts/check

bench: .venv/dev
	@. .venv/bin/activate && python benchmarks/run.py

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gpt2-duet needs Python 3.10 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; say make PYTHON=python3.12 ...")'

# The tests' own tools are added to the demo's environment, so PyTorch is fetched once.
.venv/pt: $(SOURCES) | python
	@echo "making .venv with PyTorch (once)"
	@$(PYTHON) -m venv .venv
	@. .venv/bin/activate && $(PIP) --editable '.[pt]'
	@touch $@

.venv/dev: .venv/pt
	@echo "adding the test tools (once)"
	@. .venv/bin/activate && $(PIP) --editable '.[pt,dev]'
	@touch $@

.venv-numpy/numpy: $(SOURCES) | python
	@echo "making .venv-numpy (once)"
	@$(PYTHON) -m venv .venv-numpy
	@. .venv-numpy/bin/activate && $(PIP) --editable .
	@touch $@

clean:
	rm -rf .venv .venv-numpy
