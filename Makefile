# The two commands of the README: `make demo` and `make test`. Each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test pytest lint test-slow bench dist docs docs-site clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "Downloading and installing the libraries into $(VENV), about 7 GB on disk: 3 to 10 minutes"
	@# On a terminal, pip shows its progress; in a log, that would be hundreds of lines.
	@test -t 1 || quiet=--quiet; \
		$(BIN)/pip install --disable-pip-version-check $$quiet --constraint constraints.txt --editable '.[docs,test]'
	@touch $@

demo: $(READY)
	$(BIN)/lungddpm run --cores all
	@$(BIN)/lungddpm verdict

test: pytest lint

pytest: $(READY)
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakemake --lint
	$(BIN)/snakefmt --check Snakefile workflow

# What takes a minute or more each: Slurm, full disks and damaged files, random kills, a browser.
test-slow: $(READY)
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m slow

# Minutes to an hour; BENCH='--size 128 --device cuda' and the like.
bench: $(READY)
	$(BIN)/lungddpm bench $(BENCH)

# What is generated from the config models, the registry of measures and the plan of each config; tests compare them.
docs: $(READY)
	$(BIN)/lungddpm config schema > workflow/schemas/config.schema.json
	$(BIN)/lungddpm config schema --markdown > config/README.md
	$(BIN)/python -m lungddpm.evaluation.reference docs/reference/measures.md
	$(BIN)/python docs/site/cost.py
	$(BIN)/python docs/site/pipeline.py > docs/images/pipeline.svg

# Wheel and sdist in build/dist, used as a stranger would: outside of this folder.
dist: $(READY)
	@echo "Building sdist and wheel, then trying the wheel outside of this folder"
	VENV=$(VENV) .ci/built

# The site in build/site: opens from the disk, and is built without a network. Fails on a broken link.
docs-site: $(READY)
	@echo "Building the site and checking its links"
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d build/site-cache -c docs/site . build/site
	@echo "Open build/site/index.html"

clean:
	find results/ -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf .snakemake
