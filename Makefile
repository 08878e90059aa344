# The two commands: `make simulate` and `make test`. Everything is installed into .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DELETE_ON_ERROR:
.PHONY: simulate federation test faults hospitals clean

simulate: $(VENV)/app.done
	$(BIN)/hemafed-sim demo $(ARGS)

federation: $(VENV)/app.done
	$(BIN)/hemafed-sim federation $(ARGS)

test: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy shared client/boundary
	$(BIN)/pytest tests/test_imports.py
	$(BIN)/pytest -n 2 --dist loadgroup --ignore=tests/test_imports.py

faults: $(VENV)/test.done
	$(BIN)/pytest -m long tests/federation

hospitals: $(VENV)/app.done
	$(BIN)/hemafed-sim sites $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "hemafed needs Python 3.11 or newer, $(PYTHON) is %d.%d; call make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/app.done: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[app]'
	@touch $@

$(VENV)/test.done: $(VENV)/app.done
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[app,test]'
	@touch $@

clean:
	rm -rf $(VENV) hospitals runs federation
