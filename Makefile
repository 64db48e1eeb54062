# make demo, make test, make reproduce: each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# The persistent compilation cache: a second run need not compile again.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5

# Of reproduce: smoke, cpu-hour, gpu-hour, full; and where the data sets lie.
SCALE ?= smoke
DATA ?=

.PHONY: demo test reproduce lint clean

demo: $(VENV)/installed
	$(BIN)/python -m experiments.compare --config=configs/digits_resnet8.py \
	  --methods=static8,dpc --workdir=runs/demo

reproduce: $(VENV)/installed
	$(BIN)/python -m experiments.reproduce --scale=$(SCALE) \
	  $(if $(DATA),--data_dir='$(DATA)')

# What looks at rounding is compiled as users have it, all else in a hurry.
test: lint
	$(TESTS) --compiler=fast
	$(TESTS) --compiler=users

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11: make PYTHON=python3.12"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf $(VENV) .cache build runs/demo
