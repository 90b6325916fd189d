# Needs python3 (3.10 or newer), make and git. "make" alone lists the targets.

PYTHON ?= python3
# More arguments for pytest or the benchmarks, as in: make test ARGS="-k flags -x"
ARGS =

# Threads that wait must not spin: on a machine that does anything else besides, two spinning threads are slower than one.
export OMP_WAIT_POLICY ?= passive

VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check

help:
	@echo 'make install   set up .venv with the package, its examples and the development tools'
	@echo 'make .venv     set up .venv with the package and its examples only'
	@echo 'make demo      train a ResNet-18 on digits with and without BLNSwap()'
	@echo 'make test      run the tests; ARGS="-k flags" goes to pytest'
	@echo 'make check     formatting, lint and types, changing nothing'
	@echo 'make format    format the code and fix what lint can fix'
	@echo 'make bench     run the benchmarks; ARGS goes to benchmarks.run'
	@echo 'make zoo-table cards of the trained weights, and their table in README.md'
	@echo 'make build     build the wheel into dist/'
	@echo 'make clean     remove caches and build products; .venv stays'
	@echo 'PYTHON=python3.12 chooses the interpreter of a new .venv (now: $(PYTHON)).'

.venv: $(VENV)/.installed

install: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	$(BIN)/python examples/digits_resnet18.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.run $(ARGS)

zoo-table: $(VENV)/.installed-dev
	$(BIN)/python -m zoo.cards

build: $(VENV)/.installed-dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov lightning_logs
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# An environment that has pip is left as it is. Debian's python3 lacks ensurepip until python3-venv is installed: then
# the environment is made without pip, and pip comes from PyPI.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo 'error: Python 3.10 or newer is needed; name one with: make PYTHON=python3.12' >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	{ $(PYTHON) -m venv --without-pip $(VENV) && $(BIN)/python scripts/bootstrap_pip.py; } || \
	{ echo 'error: cannot set up $(VENV) (see above); the package python3-venv may be missing' >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(PIP) install -e '.[examples]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(PIP) install -e '.[dev]'
	@touch $@

.PHONY: help .venv install demo test check format bench zoo-table build clean
