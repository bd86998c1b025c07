# make quickstart   environment, shapes data, training, evaluation, pictures
# make test         unit tests
# make test-end-to-end   tests that train and evaluate
# make test-all     these and what stresses longer: sanitizers, 4096x4096, every family of the toolboxes (an hour)
# make test-ops TORCH=torch==2.6.0 VENV=.venv-2.6   ops, backbone and checkpoints on another PyTorch, without a toolbox
# make docs         documentation site, into work_dirs/site
# make lint         ruff
# make wheel        into dist/: a universal wheel, and on Linux one with kernels for CPUs, bound to the PyTorch of $(VENV)

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Only mmpretrain's tests need it. It has no CPU build on PyPI, and the CUDA build beside a CPU torch would break
# MMEngine, so it goes into a folder of its own (tests/torchvision_setup.py).
TORCHVISION ?= torchvision==0.28.0
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
TORCH_VERSION := $(wildcard $(VENV)/lib/python*/site-packages/torch/version.py)
# Test files at a time. Their threads outnumber the processors, so one that waits gives its processor back.
TEST_WORKERS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile
QUICKSTART := work_dirs/quickstart
QUICKSTART_CHECKPOINT := $(QUICKSTART)/epoch_10.pth

# make, and the compilation of mmcv, take a path with blanks for several paths.
ifneq ($(words $(CURDIR)),1)
$(error the path of this folder has blanks, which make cannot handle: move the checkout, now in "$(CURDIR)")
endif

# What test-ops runs. PyTorch 2.1 needs NUMPY=numpy==1.26.4 and SETUPTOOLS=setuptools==69.5.1.
NUMPY ?= numpy<2.3
SETUPTOOLS ?= setuptools>=77,<82
OPS_TESTS := gradients direct_calls weights_only golden checkpoint spatial_mamba vmamba scan_states selective_scan \
	state_fusion structure_aware_ssm depthwise_conv downsample fusion_taps layer_norm gated_norm gelu mlp ssm_layer

.PHONY: env quickstart test test-ops test-end-to-end test-all wheel docs lint

# A part of the environment is made again when what it is made from has changed, a newer PyTorch included.
env: $(VENV)/.kernels $(VENV)/.complete

$(VENV)/.torch: requirements/build.txt
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 13) or \
		sys.exit('mmcv 2.1.0 builds on Python 3.10 to 3.12, found %d.%d: make $(MAKECMDGOALS) PYTHON=python3.12' % v)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r requirements/build.txt
	$(BIN)/pip install "$(TORCH)" "numpy<2.3"
	$(BIN)/python -c "import triton" || $(BIN)/pip install triton==3.6.0  # which a CPU build of PyTorch lacks
	touch $@

# The package alone; the kernels below are compiled in place, so that ninja compiles again what has changed only.
$(VENV)/.package: setup.py pyproject.toml $(VENV)/.torch
	MMSPATIALMAMBA_BUILD_OPS=0 $(BIN)/pip install --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.kernels: setup.py $(wildcard ops/*/*.cpp ops/*/*.h) $(TORCH_VERSION) | $(VENV)/.package
	@mkdir -p build
	$(BIN)/python setup.py --quiet build_ext --inplace > build/kernels.log 2>&1 || { cat build/kernels.log; exit 1; }
	@sed -n '/^mmspatialmamba:/p' build/kernels.log # says why the kernels were left out, if they were
	touch $@

$(VENV)/.complete: $(filter-out requirements/build.txt,$(wildcard requirements/*.txt)) $(TORCH_VERSION) | $(VENV)/.kernels
	$(BIN)/python -m mmspatialmamba.install_mmcv
	$(BIN)/pip install --no-build-isolation -r requirements/openmmlab.txt -r requirements/mim.txt \
		-r requirements/test.txt -r requirements/docs.txt -r requirements/export.txt
	$(BIN)/pip install --no-deps openmim==0.3.9
	$(BIN)/pip install --no-deps --upgrade --target $(VENV)/torchvision $(TORCHVISION)
	$(BIN)/python -m mmspatialmamba
	touch $@

quickstart: $(QUICKSTART_CHECKPOINT)
	$(BIN)/mim test mmdet configs/quickstart_mask_rcnn.py --checkpoint $(QUICKSTART_CHECKPOINT) \
		--work-dir $(QUICKSTART)/test --show-dir ../../predictions
	@echo "Ground truth beside predictions: $(QUICKSTART)/predictions"

$(QUICKSTART_CHECKPOINT): | env data/shapes/complete.json
	$(BIN)/mim train mmdet configs/quickstart_mask_rcnn.py --work-dir $(QUICKSTART) --resume

data/shapes/complete.json: | env
	$(BIN)/python tools/make_shapes_dataset.py data/shapes

test: env
	$(PYTEST) -m "not end_to_end and not long" --durations 15

test-ops:
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$(TORCH)" "$(NUMPY)" "$(SETUPTOOLS)" wheel ninja psutil \
		mmengine==0.10.7 mmcv-lite==2.1.0 pytest hypothesis expecttest
	rm -rf build # which may hold kernels for another PyTorch
	MMSPATIALMAMBA_BUILD_OPS=1 $(BIN)/pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall .
	MMSPATIALMAMBA_REQUIRE=cpp $(BIN)/pytest -m "not end_to_end and not long" \
		$(patsubst %,tests/test_%.py,$(OPS_TESTS))

test-end-to-end: env
	$(PYTEST) -m "end_to_end and not long" --durations 15

test-all: env
	$(PYTEST)

wheel: $(VENV)/.torch
	rm -rf build
	MMSPATIALMAMBA_BUILD_OPS=0 $(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir dist .
	MMSPATIALMAMBA_BUILD_OPS=1 MMSPATIALMAMBA_CPU_VARIANTS=all \
		$(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir dist .

docs: env
	$(BIN)/sphinx-build -W --keep-going -b html docs work_dirs/site

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
