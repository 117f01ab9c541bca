# `make` alone lists the targets. PYTHON picks the interpreter that .venv is made from.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv venv-peers demo test test-all test-peers test-gpu lint format docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(BIN)/installed ## make .venv with the exact versions of constraints.txt
	@:

# The stamp is newer than what it was made from, so an install is not repeated.
$(BIN)/installed: constraints.txt setup.cfg pyproject.toml
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || \
	  { echo "Python 3.11 or newer is needed$(if $(PYTHON),; $(PYTHON) is none). Name one: make venv PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv || \
	  { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@echo "installing into .venv (about 1.2 GB, a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

venv-peers: $(BIN)/installed-peers ## add torch and transformers to .venv, which we are compared with
	@:

$(BIN)/installed-peers: $(BIN)/installed
	@echo "adding torch and transformers to .venv (about 1 GB; several where the index has torch for CUDA only)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,peers]'
	@touch $@

demo: venv ## pretrain, fine-tune and compare on text that is already on this machine
	@$(BIN)/python -m zoo demo --workdir=runs/demo

# A file's tests share what they compile and the runs they look at, so that a file is one worker's; those of few long tests not last.
test: venv ## the tests, without the slow ones
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m "not slow and not peers and not aot"

test-all: venv ## all tests, those against other libraries where they are installed
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder

test-peers: venv-peers ## compare every family of checkpoints with its source library, forward, backward and exported
	@$(BIN)/python -m pytest -q -m peers tests/peers

# Those whose programs run on the device; the others are about files, processes and commands.
ON_DEVICE := $(addprefix tests/,kernels encodings mixers layers models tasks training test_train.py test_float16.py test_compatibility.py)

test-gpu: venv ## the tests of programs, compiled for a GPU; install jax[cuda13] into .venv first
	@ZOO_TEST_PLATFORM=cuda $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow and not peers and not aot" $(ON_DEVICE)

bench-gpu: venv ## on a Hopper GPU: attention at all lengths and pretraining steps, as tables into runs/bench-gpu
	@mkdir -p runs/bench-gpu
	@for width in 64 128; do $(BIN)/python -m benchmarks.attention --head-dim=$$width --lengths=512,1024,2048,4096,8192,16384,32768 \
	  --json=runs/bench-gpu/attention.jsonl | tee runs/bench-gpu/attention-$$width.md; done
	@$(BIN)/python -m benchmarks.pretraining_step --model=bert-base,bert-large,nezha-base,deberta-v3-base --layers=loop,laid_out --kernels=40 \
	  --json=runs/bench-gpu/pretraining_step.jsonl | tee runs/bench-gpu/pretraining_step.md

# The newest jax needs Python 3.12, so it has an environment of its own.
PYTHON312 ?= $(shell for p in python3.13 python3.12 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && echo $$p && break; done)
NEWEST := .venv-newest/bin

$(NEWEST)/installed: constraints.txt setup.cfg pyproject.toml
	@test -n "$(PYTHON312)" || { echo "Python 3.12 or newer is needed. Name one: make PYTHON312=/path/to/python3.12 …" >&2; exit 1; }
	@"$(PYTHON312)" -m venv .venv-newest
	@$(NEWEST)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

test-gpu-interpret: $(NEWEST)/installed ## interpret the GPU kernels on a CPU, by the newest jax; needs Python 3.12 or newer
	@JAX_PLATFORMS=cpu $(NEWEST)/python -m pytest -q -n $(WORKERS) tests/kernels/test_pallas_gpu.py

# Compilers lie beside the environments and not in them: with a CUDA plugin or libtpu every other program would look for a GPU or a TPU.
.venv/aot/jax_plugins: | venv
	@version=$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("jax"))') && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/aot \
	  "jax-cuda12-plugin==$$version" "jax-cuda12-pjrt==$$version" nvidia-cuda-nvcc-cu12

# The libtpu that jax's extra `tpu` asks for.
%/aot-tpu/libtpu: | %/bin/installed
	@libtpu=$$($*/bin/python -c 'import importlib.metadata as m; print(next(x.split(";")[0] for x in m.requires("jax") if x.startswith("libtpu")))') && \
	  $*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $*/aot-tpu "$$libtpu"

test-aot: .venv/aot/jax_plugins .venv/aot-tpu/libtpu .venv-newest/aot-tpu/libtpu ## compile the kernels for an H100 and for TPUs that need not be there, by the oldest and the newest jax
	@PYTHONPATH=.venv/aot:.venv/aot-tpu JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n $(WORKERS) -m aot tests/aot
	@PYTHONPATH=.venv-newest/aot-tpu JAX_PLATFORMS=cpu $(NEWEST)/python -m pytest -q -n $(WORKERS) -m aot tests/aot --ignore=tests/aot/test_pallas_gpu.py

lint: venv ## check style and formatting
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: venv ## mend style and formatting
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: venv ## write the tables in docs/ that are made from the code
	@$(BIN)/python -m zoo docs

clean: ## remove caches and build output, but neither .venv nor runs
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
