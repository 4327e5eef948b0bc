# The project's commands; `make` alone lists them. Needs Python 3.10 to 3.12, pip, make and git.
#
# Everything lives in .venv and comes from requirements.lock, every file checked against its hash. The lock pins uv as
# well: pip installs that one uv, and uv the rest, several times faster than pip would. Both take their package index
# from the environment or from pip's settings; nothing here names one.

PYTHON ?=# the interpreter to build .venv with; empty: the first of PYTHONS that is 3.10 to 3.12
PYTHONS := python3.12 python3.11 python3.10 python3 python
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
INSTALLED := $(VENV)/.installed# newer than the lock and pyproject.toml: nothing to install
WORKERS ?= logical# processes that share the tests, at most four: as many as there are cores
PYTEST_ARGS ?=
GROUPS := --all-extras --group bench --group dev --group docs

# uv does not read pip's settings: hand it the index that pip has been told of, where there is one.
pip_index = $(BIN)/python -m pip config list 2>/dev/null | sed -n "s/^global.index-url='\(.*\)'$$/\1/p"
export_index = index="$${UV_DEFAULT_INDEX:-$${UV_INDEX_URL:-$${PIP_INDEX_URL:-$$($(pip_index))}}}"; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi

# Whose byte code is written once: where Python is told to write none, parsing takes as long as all else of a start. The
# last one, and sympy with it, torch imports when it first broadcasts shapes.
IMPORTED := import shiftadd3d.configs.methods, shiftadd3d.nerf.movie, shiftadd3d.vision.evaluate, \
    torch.fx.experimental.symbolic_shapes

# A process that the system kills says nothing itself, and make's own line is easily taken for the work's.
say_killed = [ $$code -le 128 ] || [ $$code -eq 130 ] || \
	echo "error: signal $$((code - 128)) ended this; 9 is what the system sends when memory runs out" >&2

.DEFAULT_GOAL := help
.PHONY: help setup test demo lint format lock docs peers release-check clean
.DELETE_ON_ERROR:

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## make .venv and install exactly requirements.lock and this project

test: $(INSTALLED) ## run the tests (PYTEST_ARGS="-m slow", PYTEST_ARGS=tests/nn, ...)
	$(BIN)/pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

demo: $(INSTALLED) ## render the embedded scene untrained, train shiftadd-gnt-tiny on it, render again and make a video
	@$(BIN)/shiftadd3d demo || { code=$$?; $(say_killed); exit $$code; }

lint: $(INSTALLED) ## ruff, basedpyright and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(INSTALLED) ## let ruff sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(UV) ## regenerate requirements.lock from pyproject.toml, keeping what still fits (LOCK_ARGS=--upgrade: newest)
	@$(export_index); $(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate \
	    --custom-compile-command "make lock" $(GROUPS) $(LOCK_ARGS) pyproject.toml -o requirements.lock
	@$(export_index); $(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate \
	    --custom-compile-command "make lock" --no-deps --group peers $(LOCK_ARGS) -o requirements-peers.lock

docs: $(INSTALLED) ## build the documentation site into site/, strictly: a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

peers: $(INSTALLED) ## install other engines into .venv, for benchmarks/peers.py
	@$(export_index); $(UV) pip install --python $(BIN)/python --require-hashes --no-deps -r requirements-peers.lock

release-check: $(INSTALLED) ## build wheel and sdist, and try the wheel where nothing else is
	bash .ci/release-check

clean: ## remove .venv, build output and caches
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(INSTALLED): requirements.lock pyproject.toml | $(UV)
	@$(export_index); $(UV) pip sync --python $(BIN)/python --require-hashes requirements.lock
	@$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation --offline --editable .
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -W ignore -c "$(IMPORTED)"
	@touch $@

# A Debian without python3-venv has no ensurepip: there the machine's own pip fills the environment.
$(UV):
	@for python in $(or $(PYTHON),$(PYTHONS)); do \
	    if "$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
	    then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "error: shiftadd3d needs Python 3.10, 3.11 or 3.12, and none of these is one: $(or $(PYTHON),$(PYTHONS));" \
	        "install one, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	set -e; rm -rf $(VENV); \
	if "$$found" -c 'import ensurepip' 2>/dev/null; \
	then "$$found" -m venv $(VENV); pip="$(BIN)/python -m pip"; \
	else "$$found" -m venv --without-pip $(VENV); pip="$$found -m pip --python $(BIN)/python"; fi; \
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.txt; \
	$$pip install --quiet --no-deps --require-hashes --requirement $(VENV)/uv.txt
