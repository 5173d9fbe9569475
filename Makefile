# Every target sets up what it needs; a second run sets nothing up again.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo serve test check format golden openapi evaluate faults fuzz bench wheels gpu gpu-bench tiny lock clean
help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 11

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
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

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

openapi: $(VENV)/run.stamp ## write docs/openapi.json anew
	$(BIN)/dreamserve openapi > docs/openapi.json

evaluate: $(VENV)/run.stamp ## how well the model customizes StickerWorld scenes, beside controls
	$(BIN)/python -m workers.training.measuring.evaluate

faults: $(VENV)/dev.stamp ## 10,000 jobs while workers and Redis are killed and stopped, and controls that must be caught (hours)
	$(BIN)/python -m tests.faults --jobs 10000 --kills 200 --redis-kills 20 --stops 25 --drills 100 --controls 100
	$(BIN)/python -m tests.faults --jobs 0 --cancels 500 --leaves 100 --shared 300 --flood 1000

fuzz: $(VENV)/dev.stamp ## hostile pictures, slow sockets, lost replies and 100,000 cases of the contract (an hour and a half)
	$(BIN)/python -m tests.fuzz pictures --rounds 12
	$(BIN)/python -m tests.fuzz sockets --sockets 1000
	$(BIN)/python -m tests.fuzz lost-replies --number 10000
	$(BIN)/python -m tests.fuzz contract --examples 3800 --processes 2

bench: $(VENV)/dev.stamp ## measure; rows go to tests/benchmarks/results
	$(BIN)/python -m tests.benchmarks

# The lock's part for deploy/gpu.txt, with its hashes, in wheels for Python 3.12 on Linux.
wheels: $(VENV)/run.stamp ## fetch what a machine with CUDA, Python 3.12 and no network lacks (deploy/gpu.txt)
	mkdir -p wheels
	deploy/lock-part.sh requirements-dev.lock deploy/gpu.txt > wheels/lock.txt
	$(BIN)/python -m pip download --quiet --require-hashes --no-deps --only-binary :all: --python-version 3.12 \
		--implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 --dest wheels -r wheels/lock.txt

GPU = PYTHON=$(or $(PYTHON),$(BIN)/python) deploy/gpu.sh
gpu: ## on a machine with CUDA: GPU tests, benchmarks, a training; goes on where it was (PYTHON names the interpreter)
	$(GPU)

gpu-bench: ## its benchmarks alone; also gpu-tests, gpu-train and each one: gpu-step, gpu-training …
	$(GPU) ops step precision training

gpu-%:
	$(GPU) $*

tiny: $(VENV)/dev.stamp ## train the shipped model from nothing (hours; can be stopped and repeated)
	$(BIN)/python -m workers.training.tiny.small_model model/tiny

COMPILE := $(BIN)/uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--generate-hashes --no-emit-package torch --no-emit-find-links --no-annotate --no-header
lock: $(VENV)/run.stamp ## resolve the locks anew
	$(COMPILE) pyproject.toml -c deploy/torch.txt -o requirements.lock
	$(COMPILE) pyproject.toml --extra dev --extra train --extra plan --extra traces -c deploy/torch.txt -c requirements.lock -o requirements-dev.lock

clean: ## remove what was built
	rm -rf $(VENV) out .state .gpu wheels
