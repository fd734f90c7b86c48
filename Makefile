# `make demo` draws guided pictures with the weights that ship; `make test` runs the tests; `make docs` builds the
# documentation's site in build/site. Each makes the environment in .venv if it is missing.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test bench browser docs lint lock
.DEFAULT_GOAL := demo

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

demo: $(VENV)/installed
	$(RUN) cli.py predict -c configs/faces.yaml \
	  --text "an old man with a smile" "a young girl with brown hair" \
	  --guidance_weight 5 20 160 --n_samples 4 --seed 1 --precision auto --save_dir out/demo
	@echo "The pictures lie in out/demo; all of them at once in out/demo/grid.png"

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

bench: $(VENV)/installed
	$(RUN) benchmarks/bench.py

browser: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m browser

$(VENV)/installed_docs: $(VENV)/installed
	$(RUN) -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

docs: $(VENV)/installed_docs
	$(RUN) -m mkdocs build --strict

lint: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# the versions of constraints.txt, with the hashes that the package index has of their files
lock: $(VENV)/installed
	$(RUN) -m pip install -q uv
	$(RUN) -m uv pip compile -q pyproject.toml --all-extras -c constraints.txt --generate-hashes --no-header \
	  --no-annotate --python-version 3.11.5 --python-platform linux -o requirements.lock
