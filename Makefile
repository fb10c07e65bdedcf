# Everything runs in .venv; the first target that needs it builds it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow lint format notebook bench clean

# A stamp per extra: rebuilt when pyproject.toml changes.
$(VENV)/.%: pyproject.toml
	@echo "== installing jaxsvd[$*] into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[$*]'
	@touch $@

demo: $(VENV)/.demo
	@echo "== SmolLM2-135M-Instruct at keep 0.8, compressed here and run low-rank"
	@$(BIN)/python scripts/demo.py

test: $(VENV)/.test
	@$(BIN)/python -m jaxsvd.demo
	@$(BIN)/python -m pytest

test-slow: $(VENV)/.test
	@$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

notebook: $(VENV)/.notebook
	@$(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/quickstart.ipynb

bench: $(VENV)/.test
	@$(BIN)/python benchmarks/decode_cpu.py

clean:
	rm -rf $(VENV)
