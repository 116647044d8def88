# Everything runs in .venv, which is made on first use and again when its inputs change.
# PYTHON=python3.12 chooses the interpreter; PYTEST_ARGS goes to pytest.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NEURON := .venv-neuron
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-cuda test-neuron test-neuron-sources lint format kernels constraints clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## Run the demo model on whatever hardware is here
	@$(BIN)/lmi-multi demo

test: $(STAMP) ## Run every test (PYTEST_ARGS="-k name" for some)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-cuda: kernels ## Compile the kernels, then run the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m cuda $(PYTEST_ARGS)

test-neuron: $(NEURON)/.installed ## Run the Neuron backend's tests on the emulator (Python 3.11 or later)
	LMI_MULTI_NEURON_RUNTIME=emulator $(NEURON)/bin/python -m pytest -n 2 --dist worksteal -k neuron \
		$(PYTEST_ARGS) tests/test_matrix.py $(addprefix tests/test_neuron_,emulator.py compile.py \
		beams.py sampling.py nxd_emulated.py lint.py devices.py plan.py)

test-neuron-sources: $(NEURON)/.installed ## Run Neuron's libraries from their sources: NXD= and TNX= checkouts
	@test -n "$(NXD)$(TNX)" || { echo "error: set NXD, TNX or both to a checkout" >&2; exit 1; }
	$(NEURON)/bin/python -m pip install --quiet --disable-pip-version-check tenacity
	$(if $(NXD),LMI_MULTI_NXD_SOURCES="$(NXD)" $(NEURON)/bin/python -m pytest -rP $(PYTEST_ARGS) \
		tests/test_neuron_nxd_sources.py)
	$(if $(TNX),LMI_MULTI_TNX_SOURCES="$(TNX)" $(NEURON)/bin/python -m pytest $(PYTEST_ARGS) \
		tests/test_neuron_transformers_neuronx_sources.py)

lint: $(STAMP) ## Check style, format and types, and the containers' files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint containers/Dockerfile.*

format: $(STAMP) ## Mend style and format where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

kernels: $(STAMP) ## Compile the CUDA kernels (needs nvcc; LMI_MULTI_CUDA_ARCHS=90 for one GPU's)
	$(BIN)/python setup_kernels.py

constraints: $(STAMP) ## Write constraints.txt anew (UPGRADE=1 for newest versions)
	$(BIN)/python tools/constraints.py $(if $(UPGRADE),--upgrade)

clean: ## Remove .venv and everything that was built
	rm -rf $(VENV) $(NEURON) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Plain python3 if it is one that is tested (3.10 to 3.13), else the newest of those.
$(STAMP): pyproject.toml constraints.txt
	@set -euo pipefail; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
			if $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
				2>/dev/null; then found=$$python; break; fi; \
		done; \
		if [ -z "$${found:-}" ]; then \
			echo "error: no Python 3.10 to 3.13 found; name one: make PYTHON=/path/to/python" >&2; \
			exit 1; \
		fi; \
		echo "making $(VENV) with $$($$found --version)"; \
		$$found -m venv --clear $(VENV) || { \
			rm -rf $(VENV); \
			echo "error: $$found cannot make virtual environments (Debian: python3-venv)" >&2; \
			exit 1; \
		}; \
	fi; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	touch $@

# Its torch is another one than .venv's: the one that torch-xla was built for.
$(NEURON)/.installed: pyproject.toml constraints.txt constraints-neuron.txt
	@set -euo pipefail; \
	$(NEURON)/bin/python -m pip --version >/dev/null 2>&1 \
		|| $(or $(PYTHON),python3) -m venv --clear $(NEURON); \
	grep -v '^torch==' constraints.txt > $(NEURON)/constraints.txt; \
	$(NEURON)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(NEURON)/constraints.txt -c constraints-neuron.txt -e '.[dev]' torch-xla jax jaxlib; \
	touch $@
