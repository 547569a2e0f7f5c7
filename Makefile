# Everything runs in a virtual environment of its own, made from PYTHON (3.11 or newer).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
LINTERS := $(VENV)/.linters
PARALLEL ?= 2
# one torch thread per test process: two processes with two threads each fight for two cores
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-all lint aot-all gpu gpu-tests gpu-sanitizer gpu-attention gpu-decode gpu-small_ops gpu-generate gpu-dropin gpu-train_step gpu-paper_run gpu-memory gpu-fp8_parity gpu-training gpu-tune clean

quickstart: $(INSTALLED)
	@env -u OMP_NUM_THREADS $(VENV)/bin/llama-adapter quickstart

# twice: as users run it, then the Triton kernels in the interpreter, which cannot share a process
test: $(INSTALLED)
	$(RUN) -m pytest -n $(PARALLEL) -m "not slow"
	TRITON_INTERPRET=1 $(RUN) -m pytest -n $(PARALLEL) -m "kernel and not slow" tests/adapter_kernels tests/benchmarks/test_tune.py tests/llama_adapter/test_decoder.py

test-all: $(INSTALLED)
	$(RUN) -m pytest -n $(PARALLEL) -m slow
	$(RUN) -m tests.version_matrix

# every tile of every architecture, into benchmarks/results/ahead_of_time.json, and the small operations
# into a file of their own: what has changed since, at most 25 minutes on two cores
aot-all: $(INSTALLED)
	$(RUN) -m benchmarks.ahead_of_time

lint: $(LINTERS)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

# for a GPU machine without network: uses the machine's own Python and packages, and this folder as it
# is. Kernels are compiled in processes side by side, by pytest-xdist where it is installed; each part
# takes under 10 minutes, a benchmark no more than `make gpu MINUTES=2` gives it
PART ?= tests sanitizer attention decode small_ops generate dropin train_step paper_run memory fp8_parity
XDIST = $(shell $(PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null)
MEASURE = PYTHONPATH=.:kernels:$$PYTHONPATH $(PYTHON) -m benchmarks.
LIMIT = $(if $(MINUTES),--minutes $(MINUTES))
# without torch's cache of memory every tensor is an allocation of its own, whose ends are guarded
SANITIZED = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 --tool
CHECKED = $(PYTHON) -m pytest tests/adapter_kernels/zero_init_attention/test_triton_launch.py
TRAINING = tests/test_gpu.py tests/llama_adapter tests/benchmarks/test_memory.py \
	tests/adapter_kernels/test_linear_cross_entropy_kernel.py \
	tests/adapter_kernels/zero_init_attention/test_varlen.py \
	tests/adapter_kernels/zero_init_attention/test_triton_launch.py
gpu: $(addprefix gpu-,$(PART))
HAS_GPU = @$(PYTHON) -c 'import torch; raise SystemExit(not torch.cuda.is_available() and "make gpu: torch sees no GPU here")'
gpu-tests:
	$(HAS_GPU)
	$(PYTHON) -m pytest -v $(XDIST) -m "gpu or kernel"
gpu-sanitizer:
	$(HAS_GPU)
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer, of the CUDA toolkit, is not on the PATH"; exit 2; }
	$(SANITIZED) memcheck $(CHECKED) -k "every_form or around_the_tiles or padding_and_packing"
	$(SANITIZED) racecheck $(CHECKED) -k "padding_and_packing or (prompt_lengths and bank)"
gpu-attention:
	$(HAS_GPU)
	$(MEASURE)attention $(LIMIT)
gpu-decode:
	$(HAS_GPU)
	$(MEASURE)decode $(LIMIT)
gpu-small_ops:
	$(HAS_GPU)
	$(MEASURE)small_ops $(LIMIT)
gpu-generate:
	$(HAS_GPU)
	$(MEASURE)generate $(LIMIT)
gpu-dropin:
	$(HAS_GPU)
	$(MEASURE)dropin $(LIMIT)
gpu-train_step:
	$(HAS_GPU)
	$(MEASURE)train_step $(LIMIT)
gpu-paper_run:
	$(HAS_GPU)
	$(MEASURE)paper_run $(LIMIT)
gpu-memory:
	$(HAS_GPU)
	$(MEASURE)memory $(LIMIT)
gpu-fp8_parity:
	$(HAS_GPU)
	$(MEASURE)fp8_parity
# what fine-tuning rests on, each in a shorter form
gpu-training:
	$(HAS_GPU)
	$(PYTHON) -m pytest -v $(XDIST) -m "gpu or kernel" $(TRAINING)
	for one in train_step paper_run memory; do $(MEASURE)$$one --minutes $(or $(MINUTES),1) || exit; done
	$(MEASURE)fp8_parity --quick
gpu-tune:
	$(MEASURE)tune --processes 16

clean:
	rm -rf $(VENV) build *.egg-info

$(INSTALLED): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "Installing into $(VENV) (torch is a large download the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

$(LINTERS): $(INSTALLED)
	@$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
