# Two commands do everything on a fresh Debian or Ubuntu: make demo, make test. The rest: invoke --list
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test
demo: .venv/verify
	@$(BIN)/inferfleet demo

test: .venv/dev
	@tests/tools/packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/pytest -m "not engine" -n 2 --dist loadfile $(ARGS)

# a stamp for each set of extras; a changed pyproject.toml installs again
.venv/%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv 2>/dev/null || { \
	  rm -rf .venv; test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -qq -y python3-venv >/dev/null \
	  && $(PYTHON) -m venv .venv; } || { \
	  echo "no virtual environment can be made: install python3-venv (Python 3.11 or newer)"; exit 1; }
	@echo "installing inferfleet and its extra '$*' into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@
