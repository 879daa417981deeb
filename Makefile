# Everything runs in .venv, with the versions of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python -m
# Test files that run at a time; each starts ranks of its own, and waits for them for much of its time.
WORKERS ?= 2
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: install quickstart test test-long test-slurm faults lint clean

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	@echo "installing pinned versions into $(VENV) (a few minutes, once)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install -qq --disable-pip-version-check -c constraints.txt torch
	@$(VENV)/bin/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test,tensorboard]'
	@touch $@

quickstart: install
	@$(RUN) pretrain prepare quickstart_plain
	@$(RUN) pretrain train quickstart_plain
	@$(RUN) pretrain train quickstart_agg
	@$(RUN) pretrain evaluate runs/quickstart/plain
	@$(RUN) pretrain evaluate runs/quickstart/agg
	@$(RUN) pretrain report runs/quickstart/plain runs/quickstart/agg --output runs/quickstart/report.html

test: install
	@$(RUN) pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-long: install
	@$(RUN) pytest -q -m long

# Where no cluster can be started, the reason is printed (exit code 69 of the first command), and that is all.
test-slurm: install
	@code=0; $(RUN) tests.slurm.requirements || code=$$?; \
	case $$code in 0) $(RUN) pytest -q -m slurm tests/slurm ;; 69) ;; *) exit $$code ;; esac

faults: install
	@$(RUN) tests.faults --kills 36

lint: install
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
