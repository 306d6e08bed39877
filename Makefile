# The usual commands: make venv, test, check, demo, bench.
PYTHON ?= python3
JOBS   ?= 2
# Extra arguments for installing torch, for instance
#   make venv TORCH_ARGS='--index-url https://download.pytorch.org/whl/cpu'
# where the default index serves the CUDA build.
TORCH_ARGS ?=

BIN   := .venv/bin
STAMP := .venv/.stamp-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-12)

# One thread a test worker: torch and ONNX Runtime would each start one per core in each of them.
export OMP_NUM_THREADS = 1

.PHONY: venv test test-all check demo bench clean

venv: $(STAMP)

# torch comes first and by itself: resolved together with the rest, pip may take the CUDA build and its gigabytes.
$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0 $(TORCH_ARGS)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[onnx,hf,report,models,dev,triton]'
	rm -f .venv/.stamp-*
	touch $@

test: venv
	$(BIN)/python -m pytest -ra -n $(JOBS) --dist worksteal -m "not exhaustive"

test-all: venv
	$(BIN)/python -m pytest -ra -n $(JOBS) --dist worksteal

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: venv
	$(BIN)/aropt optimize digits-ar -o build/demo --force
	$(BIN)/aropt run build/demo -n 10

bench: venv
	$(BIN)/python -m perf.run

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
