# Two commands: `make demo` shows the main job, `make test` passes the suite. Both build .venv first.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export GRADIO_ANALYTICS_ENABLED ?= False
export TOKENIZERS_PARALLELISM ?= false
# Threads that wait by spinning cost a factor of a hundred as soon as another process wants a core.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: demo test check format clean

# Train a subject from five pictures and draw it in new places.
demo: .venv/.ok
	@$(BIN)/python -m vgm_peft.demo

# The whole suite.
test: .venv/.ok
	@$(BIN)/python -m pytest

# Formatting, lint and types, as CI and pre-commit run them.
check: .venv/.ok
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Mend what can be mended by machine.
format: .venv/.ok
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamp is written last, so that an installation cut short is begun again.
.venv/.ok: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vgm_peft needs Python 3.11 or newer; set PYTHON=/path/to/it")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
