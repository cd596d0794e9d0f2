# The front door. Plain `make` lists what it can do.
.DEFAULT_GOAL := help
.PHONY: help figures report site slides student lab test test-all test-slurm data controls audit reference bench sitting address lock clean
SHELL := /bin/sh

PROFILE ?= laptop
EXECUTOR ?=
# Notebooks that run at once; unless it is said, two, or one where there is a GPU.
CORES ?=
PYTHON := .venv/bin/python
# Two processes of one thread each: files go to whichever is free, the long ones first (tests/conftest.py).
PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
UV := .venv/bin/uv
# What the cluster wants to know, such as EXECUTOR_FLAGS="--default-resources slurm_partition=gpu gpu=8 runtime=2000"
EXECUTOR_FLAGS ?=
# What a user types goes to the programs through the environment, as it was typed: no make and no shell reads quotes, \ or $ in it.
TYPED = PROFILE P DRY VERIFY EXECUTOR EXECUTOR_FLAGS CORES OUT NAME PIECES MINUTES PART REVEAL
$(foreach name,$(TYPED),$(eval override $(name) := $$(value $(name))))
export $(TYPED)
define START
What does a vision model remember of its training images? First:

  1. make figures PROFILE=smoke   a try of some minutes: sets up .venv (8 GB), runs every notebook, small
  2. make report PROFILE=smoke    pages of it to read, in runs/smoke/report/
  3. make figures                 the real thing: 20 minutes on two cores; then make report
  4. make lab                     the notebooks in JupyterLab, 00_tour first
  5. make audit                   an encoder of your own: says what it needs
  6. make test                    is all well here? Eight minutes on two cores

All targets:
endef
export START

help:  ## what to do first, and every target
	@printf '%s\n' "$$START"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

figures: .venv/.installed  ## every figure: PROFILE=smoke|laptop|study|pictures|imagenet, P="k=10", DRY=1, VERIFY=0|full
	@exec $(PYTHON) notebooks/figures.py

# Without a run there is nothing to show, which is said before Python's imports take their seconds.
EXECUTED = $(PYTHON) notebooks/site/executed.py "$$PROFILE"

report: .venv/.installed  ## what `make figures` found, as web pages: index, notebooks, figures; PROFILE=… as above
	@$(EXECUTED)
	@$(PYTHON) notebooks/site/pages.py "$$PROFILE"

site: .venv/.installed  ## all there is to read as one static site: pages of a PROFILE, results, API, search
	@$(EXECUTED)
	@$(PYTHON) notebooks/site/publish.py "$$PROFILE"

slides: .venv/.installed  ## the tour of a PROFILE as slides; reveal.js comes over the network, or from REVEAL=folder
	@$(EXECUTED)
	@$(PYTHON) notebooks/site/slides.py "$$PROFILE"
	@echo "arrow keys turn the slides; next: notebooks/TEACHING.md, The sessions"

student: .venv/.installed  ## the notebooks without their solutions, into OUT=student
	@$(PYTHON) -m nbconvert --log-level WARN --to notebook --output-dir="$${OUT:-student}" \
	  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags solution notebooks/[0-9][0-9]_*.ipynb
	@echo "the exercises are in $${OUT:-student}/; hand them out: notebooks/TEACHING.md says how"

lab: .venv/.installed  ## open the notebooks in JupyterLab
	@echo "JupyterLab saves what you run: \`git restore notebooks\` undoes that; \`make student\` makes copies to work in"
	@mkdir -p .venv/share/jupyter/lab/settings
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' \
	  > .venv/share/jupyter/lab/settings/overrides.json  # no question about news over the notebook
	@JUPYTER_PREFER_ENV_PATH=1 PYTHONPATH="$$PWD" $(PYTHON) -m jupyterlab \
	  --ServerApp.root_dir="$$PWD" --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

test: .venv/.installed  ## the quick tests, lint included
	@$(PYTHON) -m ruff format --check --quiet . || { $(PYTHON) -m ruff format --diff .; exit 1; }
	@$(PYTHON) -m ruff check dejavu_utils tests results data_manifests notebooks
	@.venv/bin/lint-imports --no-logo > /dev/null || { .venv/bin/lint-imports --no-logo; exit 1; }
	@$(PYTEST) -m "not slow"

test-all: .venv/.installed  ## every test, also the slow ones
	@$(PYTHON) -m ruff format --check --quiet . || { $(PYTHON) -m ruff format --diff .; exit 1; }
	@$(PYTHON) -m ruff check dejavu_utils tests results data_manifests notebooks
	@.venv/bin/lint-imports --no-logo > /dev/null || { .venv/bin/lint-imports --no-logo; exit 1; }
	@$(PYTEST)

test-slurm: .venv/.installed  ## the batch on a SLURM of this machine's own (Debian: apt install slurm-wlm munge)
	@$(PYTHON) -m pytest -q -rs tests/front/test_slurm.py

data: .venv/.installed  ## download and verify a data set: NAME=tiny_imagenet (see data_manifests/)
	@test -n "$$NAME" || { echo "make data NAME=…, one of:"; ls data_manifests | sed -n 's/\.yaml$$//p'; exit 1; }
	@$(PYTHON) data_manifests/fetch.py "$$NAME"
	@echo "next: make figures P=\"dataset=$$NAME\", or a profile that is made for it (README, Notebooks and profiles)"

controls: .venv/.installed  ## negative and positive controls, the cheap ones 100 times
	@$(PYTHON) tests/controls.py
	@echo "next: results/README.md, Coverage: the same for whole pairs of encoders"

AUDIT = ENCODER WEIGHTS REFERENCE REFERENCE_WEIGHTS IMAGES PUBLIC HELD_OUT OUT JSON STRICT
$(foreach name,$(AUDIT),$(eval override $(name) := $$(value $(name))))
export $(AUDIT)

audit: .venv/.installed  ## audit an encoder: ENCODER=name [WEIGHTS=file] IMAGES=folder PUBLIC=folder [HELD_OUT=folder]
	@$(PYTHON) notebooks/batch.py audit --set="$$P"

reference: .venv/.installed  ## real photographs in pieces of some minutes, on a GPU: PIECES="vicreg-100 …", MINUTES=25
	@set -f; $(PYTHON) results/reference.py run $$PIECES $(if $(MINUTES),--minutes="$$MINUTES")
	@$(PYTHON) results/reference.py merge

bench: .venv/.installed  ## measure this machine: training, embedding, k-NN, sampling, each beside its limit
	@$(PYTHON) tests/bench/bench.py
	@echo "next: tests/bench/README.md says what each row means, results/bench.md what we measured"

# A machine with a GPU may have its own torch and no network: its python3 does where there is no .venv.
sitting:  ## a sitting at a GPU, to a clock: OUT=folder MINUTES=9 [PART=check|evidence] (results/sitting.py)
	@test -n "$$OUT" || { echo "make sitting OUT=folder MINUTES=9 [PART=check|evidence]" >&2; exit 1; }
	@$(or $(wildcard $(PYTHON)),python3) results/sitting.py run --minutes="$${MINUTES:-9}" --part="$$PART" -- "$$OUT"

address: .venv/.installed  ## write the public address of pyproject.toml into README.md, CITATION.cff and the tour
	@$(PYTHON) results/address.py

lock:  ## resolve the dependencies of pyproject.toml again into requirements.lock
	@$(UV) lock
	@$(UV) export --frozen --format requirements.txt --all-groups --no-emit-project --no-header > requirements.lock.new
	@mv requirements.lock.new requirements.lock
	@! grep -n '://' requirements.lock

clean:  ## remove runs/ (everything produced; never data)
	@rm -rf runs

# Python 3.11-3.13 that really runs (version managers leave stubs that do not) makes .venv; without one, uv fetches 3.12.
RUNS = import sys, venv, ensurepip; assert (3, 11) <= sys.version_info[:2] <= (3, 13)
PTH = import pathlib, sysconfig; \
	pathlib.Path(sysconfig.get_path('purelib'), 'dejavu.pth').write_text(str(pathlib.Path.cwd()) + '\n')

.venv/.installed: requirements.lock
	@set -e; if ! $(PYTHON) -c "" 2>/dev/null; then \
	  for python in python3.13 python3.12 python3.11 python3; do \
	    if $$python -c "$(RUNS)" >/dev/null 2>&1; then break; fi; python=; \
	  done; \
	  if [ -n "$$python" ]; then \
	    echo "making .venv with $$($$python --version)"; $$python -m venv --clear .venv; \
	  elif uv --version >/dev/null 2>&1; then uv venv --clear --seed -p 3.12 .venv; \
	  elif python3 -m uv --version >/dev/null 2>&1; then python3 -m uv venv --clear --seed -p 3.12 .venv; \
	  else \
	    echo "No Python 3.11, 3.12 or 3.13 with venv was found, and no uv that could fetch one." >&2; \
	    echo "Install one (Debian, Ubuntu: sudo apt install python3-venv; else https://docs.astral.sh/uv) and run make again." >&2; \
	    exit 1; \
	  fi; fi
	@test -x $(UV) || $(PYTHON) -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	@echo "installing requirements.lock into .venv"
	@VIRTUAL_ENV="$$PWD/.venv" $(UV) pip install --quiet --compile-bytecode --python $(PYTHON) --no-deps --require-hashes -r requirements.lock
	@$(PYTHON) -c "$(PTH)"
	@$(PYTHON) -m ipykernel install --sys-prefix --name python3 >/dev/null 2>&1
	@touch $@
