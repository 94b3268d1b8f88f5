# Works with GNU make 3.81 and any POSIX shell. Choose the interpreter with `make PYTHON=python3.12 lab`.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# Two workers share the machine: one thread each, or they fight for cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: help lab test lectures bench format clean test-tools

help: ## Show these commands (the default)
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

lab: .venv/.installed-lab ## Install what is missing and open the course in JupyterLab
	@$(BIN)/course lab

test: test-tools .venv/.installed-test ## Run all tests and execute every notebook, as CI does
	@set -- tests; \
	for folder in lectures solutions exercises; do \
	    for notebook in $$folder/*.ipynb; do \
	        if [ -e "$$notebook" ]; then set -- "$$@" "$$folder"; break; fi; \
	    done; \
	done; \
	$(TEST_ENV) $(BIN)/python -m pytest "$$@" -n 2 --dist loadfile --durations=20 \
	    --nbval-lax --nbval-current-env --nbval-cell-timeout=300

lectures: .venv/.installed-lab ## Build and execute the notebooks from their sources
	@$(BIN)/course build

bench: .venv/.installed-lab ## Measure ratios of time and memory
	@$(BIN)/course bench

format: .venv/.installed-test ## Sort imports, fix what can be fixed, format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove caches and build outputs; .venv, my_course and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . \( -path ./.git -o -path ./.venv -o -path ./my_course -o -path ./runs \) -prune -o \
	    -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

# Programs that some tests need and pip cannot bring. CI must have them; elsewhere their tests are skipped.
test-tools:
	@lacking() { \
	    if [ "$$CI" = true ]; then echo "$$1 is missing, and CI must have it: apt-get install $$2" >&2; exit 1; fi; \
	    echo "$$1 is missing: $$3 are skipped (Debian package $$2)"; \
	}; \
	command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	    || lacking chromium chromium "the browser tests"; \
	command -v bwrap >/dev/null || lacking bwrap bubblewrap "the tests of the grading sandbox"; \
	command -v ffmpeg >/dev/null || lacking ffmpeg ffmpeg "the tests that write video"

# An empty file marks each finished install, so that it is repeated only when the requirements change.
.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Python 3.11 or later is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1). Try: make PYTHON=python3.12 lab" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv || { \
	    echo "The virtual environment could not be made. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

.venv/.installed-lab: pyproject.toml constraints.txt | .venv/.created
	$(PIP_INSTALL) -e .
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt | .venv/.created
	$(PIP_INSTALL) -e '.[test,grade]'
	@touch .venv/.installed-lab $@
