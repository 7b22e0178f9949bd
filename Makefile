# Every target but help, clean, lock and test-gpu creates .venv with the pinned versions when it is missing.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := runs/demo
WORKERS ?= 12
QUICK  := -m pytest -m "not slow" -n 2 --dist loadscope --no-loadscope-reorder
LOCKS  := $(wildcard requirements/*.txt requirements/*/pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help venv test test-all test-gpu test-lowest test-latest lint format demo figs docs docs-serve lock clean

help:  ## List the targets
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: $(VENV)/.project  ## Install the pinned versions and this project into .venv

# The stamp is written last: an environment without it is unfinished and is made again.
$(VENV)/.requirements: $(LOCKS)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found. Install Python 3.11, or name one: make venv PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { echo "make: $(PYTHON) is not Python 3.11, which the pinned versions are for: make venv PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Creating $(VENV) (about 2 GB, a few minutes the first time)"
	@trap 'rm -rf $(VENV)' EXIT; trap 'exit 130' INT TERM; set -e; \
	rm -rf $(VENV); \
	$(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet -r requirements/build.txt; \
	$(BIN)/python -m pip install --quiet --no-build-isolation -r requirements/cpu.txt -r requirements/dev.txt; \
	touch $@; trap - EXIT

$(VENV)/.project: $(VENV)/.requirements pyproject.toml
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(BIN)/python -m pip check
	@touch $@

test: venv  ## Run the quick tests and the import contract
	$(BIN)/python $(QUICK)

test-all: venv  ## Run every test
	$(BIN)/python -m pytest

test-gpu:  ## Run every test that needs a GPU, by WORKERS processes of PYTHON, whose packages stay as they are
	$(PYTHON) -m pytest tests/gpu --tb=short -rs -n $(WORKERS) --dist loadgroup --durations 5

test-lowest:  ## Run the quick tests with the oldest versions that pyproject.toml allows, in .venv-lowest
test-latest:  ## Run the quick tests with the newest versions that pyproject.toml allows, in .venv-latest

test-lowest test-latest: test-%:
	$(PYTHON) -m venv --clear $(VENV)-$*
	@$(if $(filter lowest,$*),$(PYTHON) requirements/lowest.py,true) > $(VENV)-$*/constraints.txt
	$(VENV)-$*/bin/python -m pip install --quiet -c $(VENV)-$*/constraints.txt ./requirements/fbgemm-gpu-shim -e '.[wandb,faiss,hf,fast,serve,docs,dev]'
	@$(VENV)-$*/bin/python -m pip check
	@$(VENV)-$*/bin/python -m hstu.cli.env
	$(VENV)-$*/bin/python $(QUICK)

lint: venv  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv  ## Format the code and apply the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: venv  ## Train ranking and retrieval on planted data; print each score beside the best possible one
	@test -f tmp_data/synthetic/schema.json || $(BIN)/python preprocessing/preprocessor.py --dataset_name synthetic
	@rm -rf $(RUN)
	$(BIN)/python examples/pretrain_gr_ranking.py --gin-config-file synthetic_ranking.gin --run-dir $(RUN)/ranking
	$(BIN)/python examples/pretrain_gr_retrieval.py --gin-config-file synthetic_retrieval.gin --run-dir $(RUN)/retrieval
	@$(BIN)/python -m hstu.cli.scores $(RUN)/ranking $(RUN)/retrieval

figs: venv  ## Draw figs/*.png again
	$(BIN)/python figs/draw.py

docs: venv  ## Build the documents into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: venv  ## Show the documents on this machine, built again at each change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lock:  ## Resolve requirements/*.in again into the pinned requirements/*.txt
	requirements/lock.sh $(PYTHON)

clean:  ## Remove the environment and the caches (data sets and runs stay)
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-latest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find hstu tests preprocessing examples benchmarks figs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
