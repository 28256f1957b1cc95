# make demo and make test do all the set-up they need.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow faults lint format types bench docker clean
DOCKER ?= docker

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## phantom cohort, five trainings, swap table (about 6 minutes on 2 cores with bf16)
	$(BIN)/python -m mrgen.launch.demo demo

test: $(READY)  ## the fast suite, a process a core up to four
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)  ## the slow tests alone
	$(BIN)/python -m pytest -m slow

faults: $(READY)  ## 2,000 damaged files, hostile ones, 200 kills, full disks: the table of docs/reliability.md (tens of minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.run build/faults --report docs/reliability.md --findings build/faults/findings.md

lint: $(READY)  ## ruff, and formatting as it should be
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## mypy
	$(BIN)/mypy

bench: $(READY)  ## speed as ratios against peers, kept in benchmarks/results
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docker:  ## images mrgen:cpu and mrgen:gpu; DOCKER=podman, TORCH_INDEX=… for mrgen:cpu, ARGUMENTS='--build-arg BASE=…'
	$(DOCKER) build $(ARGUMENTS) --build-arg TORCH_INDEX=$(TORCH_INDEX) --target cpu -t mrgen:cpu .
	$(DOCKER) build $(ARGUMENTS) --target gpu -t mrgen:gpu .

clean:  ## what the commands wrote, the environment included
	rm -rf .venv demo runs cohorts stores build dist .pytest_cache .ruff_cache .mypy_cache
