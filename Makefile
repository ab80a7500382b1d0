# Everything runs in .venv, which the first command makes; later ones use it again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: test demo demo-short bench lint clean

$(STAMP): pyproject.toml constraints.txt setup.py CMakeLists.txt $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kpig_fast needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

test: $(STAMP) lint
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile tests benchmarks/test_benchmarks.py benchmarks/test_bench_trainer.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Trains sft and kpig over the bundled suite and compares them.
demo: $(STAMP)
	rm -rf demo
	$(BIN)/kpig train configs/demo.yaml --set strategy=sft --set output_dir=demo/sft
	$(BIN)/kpig train configs/demo.yaml --set strategy=kpig --set output_dir=demo/kpig
	$(BIN)/kpig report demo/sft demo/kpig --out demo/report

# The same with two steps and few rows, for a quick check.
demo-short: $(STAMP)
	rm -rf demo
	$(BIN)/kpig train configs/demo.yaml --set strategy=sft --set output_dir=demo/sft --set stream.steps=2 --set data.n_train=32 --set evaluation.limit=4
	$(BIN)/kpig train configs/demo.yaml --set strategy=kpig --set output_dir=demo/kpig --set stream.steps=2 --set data.n_train=32 --set evaluation.limit=4
	$(BIN)/kpig report demo/sft demo/kpig --out demo/report

clean:
	rm -rf $(VENV) build demo runs kpig_fast/*.so
