# One environment, .venv/, made from settings.ini and constraints.txt; every target below hangs on it.
#   make demo    the whole chain on phantoms or FLARE22: curate, embed, fine-tune, evaluate
#   make test    every test: notebooks, pytest, packaging, documentation
#   make bench   how fast this machine is: the drawing cell, the models
#   make env, lab, docs, notebooks, sync, clean: see CONTRIBUTING.md
SHELL  := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.made
MIN    := $(shell sed -n 's/^min_python *= *//p' settings.ini)

# The demo. DATA=folder takes your own volumes (images/ and labels/ inside); else FLARE22 where it is fetched; else phantoms.
# LABEL: one id, ids such as 1,9, or all. SIZE: slices,rows,columns of a phantom. RUN: a name under work_dir/.
N      ?= 10
SEED   ?= 2023
SIZE   ?= 40,512,512
LABEL  ?= 9
MODEL  ?= lite
EPOCHS ?= 8
LR     ?= 5e-5
RUN    ?= demo
FLARE  := data/FLARE22Train
DATA   ?= $(if $(wildcard $(FLARE)/images),$(FLARE),data/phantom)
comma  := ,
override DATA := $(patsubst %/,%,$(DATA))
NAME   ?= $(notdir $(DATA))_$(subst $(comma),-,$(LABEL))
NPZ    := data/npz/CT_$(NAME)

.PHONY: help env demo test bench lint lab docs notebooks sync pins clean
help:
	@sed -n '2,5p' Makefile | cut -c3-

env: $(STAMP)
$(STAMP): settings.ini setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "No '$(PYTHON)' on the PATH. Install Python $(MIN) or newer, or name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < tuple(map(int, "$(MIN)".split("."))))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), and this package needs Python $(MIN) or newer. Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make a virtual environment: its venv or ensurepip module is missing. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Making $(VENV)/ with $$($(PYTHON) -V): several GB of packages, some minutes the first time ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' </dev/null
	@touch $@
	@echo "Made $(VENV)/. Next: make lab (draw a box), or make demo (the whole chain)"

demo: $(STAMP)
ifeq ($(DATA),data/phantom)
	@echo; echo "== 1/5 phantoms: $(N) volumes into $(DATA) (no DATA given, and $(FLARE) is not there)"
	$(BIN)/medsam_phantom --out $(DATA) --n $(N) --seed $(SEED) --size $(SIZE)
else
	@echo; echo "== 1/5 volumes: $(DATA)"
endif
	@echo; echo "== 2/5 curate label $(LABEL): $(NPZ)"
	$(BIN)/medsam_curate $(DATA)/images $(DATA)/labels --label_id $(LABEL) --modality CT --anatomy $(NAME) --out data/npz --seed $(SEED)
	@echo; echo "== 3/5 embed with $(MODEL): data/embeddings/$(MODEL)"
	$(BIN)/medsam_embed $(NPZ) --model $(MODEL)
	@echo; echo "== 4/5 fine-tune the mask decoder: work_dir/$(RUN)"
	$(BIN)/medsam_finetune $(NPZ) --model $(MODEL) --epochs $(EPOCHS) --lr $(LR) --batch_size 2 --seed $(SEED) --run $(RUN)
	@echo; echo "== 5/5 evaluate, pretrained against fine-tuned: work_dir/$(RUN)"
	$(BIN)/medsam_evaluate $(NPZ) --run $(RUN) --seed $(SEED)

# Two CPU cores are enough: two notebooks at a time, then two groups of tests at a time (tests/conftest.py), one thread each. Both always run; either fails the target.
test: $(STAMP)
	@rc=0; echo "== notebooks"; \
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python tools/nbtest.py || rc=1; \
	echo "== pytest"; \
	$(BIN)/python -m pytest tests -n 2 --dist loadgroup --no-loadscope-reorder --durations=40 || rc=1; \
	exit $$rc

bench: $(STAMP)
	$(BIN)/python tools/bench.py

lint: $(STAMP)
	@$(BIN)/python -m pytest -q tests/test_repo.py

lab: $(STAMP)
	$(BIN)/jupyter lab --ServerApp.root_dir=$(CURDIR) --LabApp.default_url=/lab/tree/nbs/index.ipynb $(LAB_ARGS)

docs: $(STAMP)
	$(BIN)/python tools/docs.py

notebooks: $(STAMP)
	$(BIN)/python tools/notebooks.py

sync: $(STAMP)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py

pins: $(STAMP)
	$(BIN)/python tools/pins.py

# What the tools made. The environment, data/ and work_dir/ stay: they are yours, and slow to make again.
clean:
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -not -path './$(VENV)/*' -prune -exec rm -rf {} +
