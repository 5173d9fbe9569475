# Every target sets up what it needs; a second run sets nothing up again.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo serve test check format golden evaluate bench gpu tiny lock clean
help: ## show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/run.stamp ## install what running needs into .venv

$(VENV)/run.stamp: requirements.lock pyproject.toml deploy/setup.sh
	deploy/setup.sh $(VENV) requirements.lock
	touch $@

$(VENV)/dev.stamp: requirements-dev.lock $(VENV)/run.stamp
	deploy/setup.sh $(VENV) requirements-dev.lock
	touch $@

demo: $(VENV)/run.stamp ## start the service, customize two sample references, leave out/demo.png
	$(BIN)/dreamserve demo --out out

serve: $(VENV)/run.stamp ## start gateway, Redis and a worker on http://127.0.0.1:8080
	$(BIN)/dreamserve serve

test: $(VENV)/dev.stamp ## run the tests
	$(BIN)/python -m pytest

check: $(VENV)/dev.stamp ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/kernels/test_name.py

format: $(VENV)/dev.stamp ## format and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: $(VENV)/dev.stamp ## compare with recordings of the released pipeline
	$(BIN)/python -m tests.golden

evaluate: $(VENV)/run.stamp ## how well the model customizes StickerWorld scenes, beside controls
	$(BIN)/python -m workers.training.evaluate

bench: $(VENV)/dev.stamp ## measure; rows go to tests/benchmarks/results
	$(BIN)/python -m tests.benchmarks

gpu: ## on a machine with CUDA and torch: GPU tests, then benchmarks (PYTHON names the interpreter)
	$(or $(PYTHON),$(BIN)/python) -m pytest -m gpu tests
	$(or $(PYTHON),$(BIN)/python) -m tests.benchmarks --device cuda --write-table

tiny: $(VENV)/dev.stamp ## train the shipped model from nothing (hours; can be stopped and repeated)
	$(BIN)/python -m workers.training.small_model model/tiny

COMPILE := $(BIN)/uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--generate-hashes --no-emit-package torch --no-emit-find-links --no-annotate --no-header
lock: $(VENV)/run.stamp ## resolve the locks anew
	$(COMPILE) pyproject.toml -c deploy/torch.txt -o requirements.lock
	$(COMPILE) pyproject.toml --extra dev --extra train -c deploy/torch.txt -c requirements.lock -o requirements-dev.lock

clean: ## remove what was built
	rm -rf $(VENV) out .state
