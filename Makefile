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

.PHONY: demo test check bench clean

demo: .venv-$(FRAMEWORK)/ready
	@.venv-$(FRAMEWORK)/bin/python scripts/demo.py --framework $(FRAMEWORK) --seed $(SEED) --length $(LENGTH) "$(PROMPT)"

test: .venv/ready
	@. .venv/bin/activate && scripts/test $(PYTEST_ARGS)

check: .venv/ready
	@. .venv/bin/activate && scripts/check

bench: .venv/ready
	@. .venv/bin/activate && python benchmarks/run.py

.venv/ready: $(SOURCES)
	@echo "making .venv with PyTorch and the test tools (once)"
	@$(PYTHON) -m venv .venv
	@. .venv/bin/activate && $(PIP) --editable '.[pt,dev]'
	@touch $@

.venv-pt/ready: .venv/ready
	@rm -rf .venv-pt && ln -s .venv .venv-pt

.venv-numpy/ready: $(SOURCES)
	@echo "making .venv-numpy (once)"
	@$(PYTHON) -m venv .venv-numpy
	@. .venv-numpy/bin/activate && $(PIP) --editable .
	@touch $@

clean:
	rm -rf .venv .venv-pt .venv-numpy
