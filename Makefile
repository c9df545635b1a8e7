# Two commands do everything: `make demo` and `make test`. Both make the virtual environment if need be.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: install demo demo-vision test lint test-poor-cpu test-slow learning mutate golden gpu clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: install ## Train a small model end to end on text that is already on this machine.
	$(BIN)/python examples/demo.py

demo-vision: install ## A language model that knows words learns to see: real handwritten digits, in three minutes.
	$(BIN)/python tests/learning/digits.py --seeds 0 --show

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Two workers side by side, one thread per process. A file stays with one worker, where its processes are started once;
# files in the order of their folders, so that none with few but long tests comes last.
test: lint ## Style, types and all tests but the slow ones.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=20

test-poor-cpu: install ## All tests but the slow ones as on a CPU with neither AVX-512 nor 16-bit arithmetic.
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=20

test-slow: install ## Hundreds of kills and long learning runs; results belong in docs/results.md.
	$(BIN)/python -m pytest -m slow --timeout=3600

learning: install ## Each algorithm learns what it should: rewrites the tables of docs/results.md, in an hour on one core.
	$(BIN)/python tests/learning/learning_table.py
	$(BIN)/python tests/learning/reinforcement_table.py

mutate: install ## Mistakes made on purpose, one at a time: the fast suite must notice each.
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py

AGAINST ?= HEAD

golden: install ## Curves of every trainer on every engine, compared to the last bit with those of revision AGAINST.
	$(BIN)/python tests/golden/curves.py --against $(AGAINST)

GPU_OUT ?= runs/gpu

gpu: ## Everything that a GPU can prove, in ten minutes, with the system's Python: no virtual environment, no network.
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "make gpu: $(PYTHON) has no torch that sees a GPU; PYTHON=... names another"; exit 1; }
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --out $(GPU_OUT)

clean:
	rm -rf $(VENV) build dist runs
