# demo, test, lint: set up .venv on first use. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The tested torch; an existing torch in the environment is kept.
TORCH ?= torch==2.13.0
# NVRTC, so that the tests compile every CUDA kernel, GPU or not; there is none for macOS.
comma := ,
CUDA := $(if $(filter Darwin,$(shell uname -s)),,$(comma)cuda)

.PHONY: setup demo test lint test-gpu sanitize bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"msq needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}: make PYTHON=..."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev$(CUDA)]"
	touch $@

demo: setup
	$(BIN)/msq demo --out demo

# A file's tests stay together: some share what is dear to make.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .typing && ln -sfn .. .typing/msq
	MYPYPATH=.typing $(BIN)/mypy -p msq

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# Every kind of kernel once under compute-sanitizer (of the CUDA toolkit), each allocation by itself. Errors of the
# driver's functions are left out: looking up whether a newer one exists is one.
sanitize: setup
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no --tool $$tool --error-exitcode 1 \
			$(BIN)/python -m pytest -q -m gpu tests/kernels/cuda/test_gpu_sanitize.py || exit 1; \
	done

bench: setup
	$(BIN)/python -m msq.experiments.check_promises --out experiments/results/promises.csv

clean:
	rm -rf build dist *.egg-info .typing .mypy_cache .ruff_cache .pytest_cache
