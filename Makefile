# make demo | make test | make proofs | make lint | make docs | make gpu. All but the last make .venv
# when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
comma := ,
# CUDA wheels only where there is an NVIDIA GPU.
EXTRAS := dev$(if $(shell nvidia-smi -L 2>/dev/null),$(comma)cuda)

.PHONY: demo test proofs lint docs gpu clean

demo: $(VENV)/installed
	$(BIN)/python main.py --config configs/digits.py
	$(BIN)/repjax convert --workdir runs/digits
	$(BIN)/repjax evaluate --workdir runs/digits --form both

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Repeats tests on every model, which takes minutes more: before a release.
proofs: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m proof

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# build/site/index.html; `python -m http.server --directory build/site` shows the site with its search.
docs: $(VENV)/installed-docs
	$(BIN)/python scripts/build_site.py

# Takes PYTHON as it is and installs nothing: a machine with a GPU may have no network.
gpu:
	$(PYTHON) benchmarks/gpu.py

# Runs again only when pyproject.toml has changed.
$(VENV)/installed: pyproject.toml
	@echo "installing repjax[$(EXTRAS)] into $(VENV), a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

# The site is made from the source, without the packages of the tests.
$(VENV)/installed-docs: pyproject.toml
	@echo "installing repjax[docs] into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV)
