PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

help:                 ## show this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## /\1\t/p' Makefile | expand -t 22

# k-hop induction: the symbol that three look-ups lead to. Two layers cannot, six can.
demo: $(VENV)/.run    ## five small models on a task that needs depth, compared; 5 minutes with the install
	OMP_NUM_THREADS=1 $(BIN)/layer-tying compare --exp demo --overwrite \
		--policies none,plain-2,cycle-2,mixture-2,dqn --residual-scaling 1 \
		--dataset khop:3 --bptt 25 --batch-size 32 \
		--family llama --nlayers 6 --nhead 2 --emsize 48 --init-std 0.1 \
		--lr 5e-3 --final-lr 0 --weight-decay 0 \
		--max-steps 700 --every 25 --eval-every 100 --eval-batches 8

test: $(VENV)/.test   ## the tests, in minutes, without a network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.test ## the tests that take longer
	$(BIN)/python -m pytest -m slow

# The kernels of a processor without AVX. What each variable changes was found by comparing results
# to the last bit, with torch 2.13 on an AMD EPYC that has AVX2:
# - ATEN_CPU_CAPABILITY: PyTorch's own kernels, such as softmax, layer norm, attention, GELU in
#   bf16, and normally distributed random numbers.
# - ONEDNN_MAX_CPU_ISA: oneDNN's kernels, which are GELU in fp32 and convolutions.
# - MKL_ENABLE_INSTRUCTIONS: nothing on AMD, since MKL heeds it on Intel processors only.
# - MKL_CBWR: matrix products, on any processor.
WEAK := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	MKL_CBWR=COMPATIBLE
test-weak: $(VENV)/.test ## the tests that depend on kernels, as an old processor runs them
	$(WEAK) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
		-m 'numerics and not slow'

test-oldest:          ## the tests with the oldest versions that are supported: gigabytes to install
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install -qq --disable-pip-version-check \
		-c constraints-oldest.txt --editable '.[test]'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.test  ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/test_imports.py

docs: $(VENV)/.docs   ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench-memory: $(VENV)/.run ## peak memory of 48 x 1600, conventional and tied: 25 minutes, resumes
	$(BIN)/python benchmarks/memory.py

bench-speed: $(VENV)/.run ## steps, decisions, compiling, generating: 13 minutes, resumes
	$(BIN)/python benchmarks/speed.py

bench-alternatives: $(VENV)/.bench ## 8-bit AdamW, APOLLO and LoRA on the same step: 11 minutes, resumes
	$(BIN)/python benchmarks/alternatives.py

bench-scaling: $(VENV)/.run ## several processes, replicated and sharded: minutes, resumes
	$(BIN)/python benchmarks/scaling.py

bench-quality: $(VENV)/.test ## patterns and policies compared: a day or two, resumes
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/quality_times.py

bench-compress: $(VENV)/.test ## a trained model made smaller, by compress and its rivals: hours, resumes
	$(BIN)/python benchmarks/compress.py

bench-agent: $(VENV)/.test ## the paper's agent against random changes and its start: an hour, resumes
	$(BIN)/python benchmarks/agent.py

paper-small: $(VENV)/.test ## every row of the paper at small scale: hours, resumes
	$(BIN)/python benchmarks/paper.py

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable '.[test,check]'
	touch $@

$(VENV)/.bench: $(VENV)/.run
	$(PIP) --editable '.[bench]'
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) --editable '.[docs]'
	touch $@

.PHONY: paper-small docs help demo test test-slow test-weak test-oldest check bench-memory bench-speed bench-alternatives bench-scaling bench-quality bench-compress bench-agent
