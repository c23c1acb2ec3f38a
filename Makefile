# Two commands on a fresh machine with Python 3.11 or newer and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= .demo
QUESTION ?= Should unemployment benefits be more generous?

.PHONY: demo study test faults check format lint types wheel figures bench bench-plan bench-build bench-inspect simulate calibrate slurm clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("politune needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.developing: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@

# Train the smallest preset, merge it, and ask the base and the tuned model the same question.
demo: $(VENV)/.installed
	rm -rf $(DEMO)/demo-left
	$(BIN)/politune train dpo --preset demo-left --output_dir $(DEMO)/demo-left
	$(BIN)/politune merge $(DEMO)/demo-left
	$(BIN)/politune ask $(DEMO)/demo-left --question "$(QUESTION)"

# A file of tests in each of two processes, and one thread in each: more would wait for one another.
test: $(VENV)/.developing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Everything that a run survives, in under 40 minutes on two quiet cores; writes docs/faults.md. `make test` does a part of it.
faults: $(VENV)/.developing
	PYTHONPATH=tests $(BIN)/python -m faults

check: lint types test wheel

lint: $(VENV)/.developing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.developing
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.developing
	$(BIN)/mypy

wheel: $(VENV)/.developing
	$(BIN)/python -m build --quiet --outdir dist

# The figures that the README quotes; each script says what it measures.
figures: $(VENV)/.developing
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/answers.py

# Speed and memory against TRL, in about 75 minutes on a quiet machine; writes benchmarks/RESULTS.md.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/speed.py

# Predicted against measured memory and time of 16 runs, in about 20 minutes on a quiet machine; writes benchmarks/PLAN.md.
bench-plan: $(VENV)/.installed
	$(BIN)/python benchmarks/plan.py

# Speed, memory and identity of data build on a million rows, in about ten minutes on a quiet machine; writes benchmarks/BUILD.md.
bench-build: $(VENV)/.installed
	$(BIN)/python benchmarks/build.py

# What `inspect-data` takes beside pandas, what of planted shortcuts it finds, and what damaged files do to it, in about an hour;
# writes benchmarks/INSPECT.md, JACKKNIFE.md, SHORTCUTS.md and DAMAGED.md.
bench-inspect: $(VENV)/.developing
	$(BIN)/python benchmarks/inspect_data.py
	$(BIN)/python benchmarks/jackknife.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/shortcuts.py
	$(BIN)/python benchmarks/damaged.py

# The shipped study: three arms, three seeds, trained, measured and compared, in well under 45 minutes on two cores.
study: $(VENV)/.installed
	$(BIN)/politune study demo -o $(DEMO)/study
	$(BIN)/python benchmarks/study.py $(DEMO)/study

# A thousand synthetic models for each case: is what was planted found, and nothing where nothing was? Writes benchmarks/SIMULATION.md.
simulate: $(VENV)/.installed
	$(BIN)/python benchmarks/simulate.py

# The demo's settings, chosen on training topics set aside: about two minutes for each arm.
calibrate: $(VENV)/.installed
	$(BIN)/python benchmarks/calibrate.py $(DEMO)/calibrate

# A study as an array job of a real one-node Slurm on this machine (Debian: slurm-wlm, munge).
slurm: $(VENV)/.installed
	$(BIN)/python benchmarks/slurm.py

clean:
	rm -rf $(VENV) $(DEMO) dist
