# Everything a developer runs. Each target does its own set-up: Python 3.11 or newer and make are all that is needed.
#
#   make demo    a whole topology on this machine: real images, a real model, a SQLite file at the end
#   make test    the tests
#   make check   format, lint and types
#   make help    the rest

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCK := requirements-dev.lock

# The first Python that is new enough; choose another with: make test PYTHON=python3.12
PYTHON ?= $(firstword $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p; done; true))

# The smallest machine that we develop on has two cores, and most tests wait longer than they compute; more: make test JOBS=8
JOBS ?= 3
# Its processes start hundreds of times here: the compiled modules are kept, as pip keeps those of an installation.
unexport PYTHONDONTWRITEBYTECODE

# More for pytest, e.g. make test TESTS="tests/test_cli.py -k tap"
TESTS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test campaigns check format bench fuzz chaos soak docs wheel lock clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## run the demo topology on the embedded broker, then say what it did
	@$(BIN)/penstock demo

test: $(READY) ## run the tests (TESTS=… for some of them); the long ones are "make campaigns"
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(or $(TESTS),-m "not campaign")

campaigns: $(READY) ## run the tests that kill, cut or learn for long, and the suite over every foreign broker
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m campaign

check: $(READY) ## format, lint and types, without changing anything
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/mypy tests/conftest.py

format: $(READY) ## put the code into its format and repair what the linter can
	@$(BIN)/ruff check --fix --exit-zero .
	@$(BIN)/ruff format .

bench: $(READY) ## run the benchmarks and print their figures (NAME=telemetry for one, ROUNDS=1 for a quick look, ONLY=text for some rows)
	@$(BIN)/python -m benchmarks $(NAME) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(ONLY),--only "$(ONLY)")

fuzz: $(READY) ## coverage-guided fuzzing of what foreign bytes reach (FOR=60 seconds each)
	@$(BIN)/python -m pip install --quiet atheris
	@for t in broker session message topology expression; do \
		$(BIN)/python tests/fuzz/run_fuzz.py $$t --seconds $(or $(FOR),60) || exit 1; done

chaos: $(READY) ## kill every process and cut the network of a running topology, again and again (MINUTES=5, SEED=1)
	@$(BIN)/python tests/chaos/campaign.py --seed $(or $(SEED),1) --minutes $(or $(MINUTES),5)

soak: $(READY) ## run at half of the maximum rate and name what grows (FOR=10 minutes)
	@$(BIN)/python -m benchmarks.soak --seconds $$(($(or $(FOR),10) * 60))

docs: $(READY) ## write the generated pages anew, then check every link and command of the documentation
	@$(BIN)/penstock nodes --markdown > docs/kinds.md.new
	@mv docs/kinds.md.new docs/kinds.md
	@$(BIN)/python -m pytest -q -n 0 tests/test_project_docs.py

wheel: $(READY) ## build the wheel into dist/
	@$(BIN)/python -m hatchling build -t wheel

lock: $(READY) ## resolve the development environment anew (UPGRADE=1: to the newest versions)
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile pyproject.toml --quiet --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links --no-emit-package penstock \
		$(if $(UPGRADE),--upgrade) --output-file $(LOCK)

clean: ## remove the environment and everything that was generated
	@rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The stamp is touched last: an interrupted set-up is begun again.
$(READY): $(LOCK) pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Penstock needs Python 3.11 or newer and found none; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$("$(PYTHON)" -V) (once)"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(LOCK)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
