# Two commands do all the set-up: `make demo` writes a story, `make test` runs the tests.
#
#   make demo                     PyTorch, TensorFlow and the numpy reference from one seed, side by side
#   make demo FRAMEWORK=pt        PyTorch beside the reference; FRAMEWORK=tf TensorFlow beside it
#   make demo FRAMEWORK=numpy     the numpy reference alone: no large download
#   make demo SEED=7 PROMPT="The wolf"
#   make test                     everything; make test PYTEST_ARGS="-k tokenizer" for a part
#   make check                    ruff and mypy
#   make bench                    the tables of benchmarks/
#
# Each environment is made once, in .venv (or .venv-numpy), and made again when a dependency changes.

PYTHON ?= python3
FRAMEWORK ?= all
PROMPT ?= Once upon a time there was
SEED ?= 3
LENGTH ?= 100
PYTEST_ARGS ?=

ifeq ($(filter $(FRAMEWORK),all pt tf numpy),)
$(error FRAMEWORK is '$(FRAMEWORK)', expected all, pt, tf or numpy)
endif
export PROMPT
export PIP_DISABLE_PIP_VERSION_CHECK = 1
PIP = python -m pip install --quiet --constraint constraints.txt
SOURCES = setup.cfg pyproject.toml constraints.txt
STAMP = $(if $(filter numpy,$(FRAMEWORK)),.venv-numpy/numpy,.venv/$(FRAMEWORK))

.PHONY: demo test check bench clean python

demo: $(STAMP)
	@$(dir $(STAMP))bin/python scripts/demo.py --framework $(FRAMEWORK) --seed $(SEED) --length $(LENGTH) -- "$$PROMPT"

test: .venv/dev
	@. .venv/bin/activate && scripts/test $(PYTEST_ARGS)

check: .venv/dev
	@. .venv/bin/activate && scripts/check

bench: .venv/dev
	@. .venv/bin/activate && python benchmarks/run.py

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gpt2-duet needs Python 3.10 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; say make PYTHON=python3.12 ...")'

# What is there already is not fetched again: all of these are steps to the same environment.
.venv/pt .venv/tf: $(SOURCES) | python
	@echo "making .venv with $(if $(filter %pt,$@),PyTorch,TensorFlow) (once)"
	@$(PYTHON) -m venv .venv
	@. .venv/bin/activate && $(PIP) --editable '.[$(notdir $@)]'
	@touch $@

.venv/all: $(SOURCES) | python
	@echo "making .venv with PyTorch and TensorFlow (once)"
	@$(PYTHON) -m venv .venv
	@. .venv/bin/activate && $(PIP) --editable '.[pt,tf]'
	@touch $@

.venv/dev: .venv/all
	@echo "adding the test tools (once)"
	@. .venv/bin/activate && $(PIP) --editable '.[pt,tf,plots,dev]'
	@touch $@

.venv-numpy/numpy: $(SOURCES) | python
	@echo "making .venv-numpy (once)"
	@$(PYTHON) -m venv .venv-numpy
	@. .venv-numpy/bin/activate && $(PIP) --editable .
	@touch $@

clean:
	rm -rf .venv .venv-numpy
