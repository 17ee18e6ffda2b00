# Everything runs in .venv, which `make setup` (or any target that needs it) builds from pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup run report test test-all lint docs pictures bench ui clean

setup: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# The main job: does it pay? The recipe, dense runs to beat and the recipe's ideas alone, five seeds each, on embedded
# images: minutes on two cores. Typed again, it goes on, or repeats its answer.
run: setup
	$(BIN)/python -m morphtrain.run +experiment=recipe

# Every question of the thesis at its small size, and the report of all that experiments/ holds. Typed again, it goes on.
# Left out: the recipe, which is none of them, and format_time, 55 runs of a wide network.
QUESTIONS := $(filter-out recipe% format_time,$(sort $(basename $(notdir $(wildcard conf/experiment/*.yaml)))))
report: setup
	failed=; for question in $(QUESTIONS); do \
		$(BIN)/python -m morphtrain.run +experiment=$$question || { code=$$?; [ $$code -lt 128 ] || exit $$code; failed="$$failed $$question"; }; \
	done; $(BIN)/python -m morphtrain.report experiments && { [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }; }

# Two at a time, each on one core: torch's threads would fight over them. They compare bits, so they see no GPU.
test: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# With the slow proofs, and on a machine with a GPU those that need one.
test-all: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"
	$(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, into site/; a broken link is an error.
docs: setup
	$(BIN)/mkdocs build --strict

# Every picture that the README and the documentation show, from stored records; it needs Chromium.
pictures: setup
	$(BIN)/python notebooks/pictures.py

# What the product promises about its own speed, as ratios measured interleaved.
bench: setup
	cd benchmarks && for b in startup regulariser reconfiguration surgery widths ghost_norm memory loop loader tracking allocator; do ../$(BIN)/python $$b.py; done

# MLflow's UI on what was recorded here.
ui: setup
	$(BIN)/python -m morphtrain.ui

clean:
	rm -rf .venv dist build site .pytest_cache .mypy_cache .ruff_cache
