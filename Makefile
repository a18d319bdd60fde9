# Everything a newcomer runs. Each target sets up what it needs; `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help setup test test-fast test-exhaustive test-portable test-lowest test-newest test-wheel tritonserver plugins loader ray cpp-deps lint typecheck check demo bench bench-reducers bench-search bench-gpu \
    bench-cpp support-table docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

setup: $(STAMP)  ## create .venv with everything the tests and the demo need

# One process a core, one thread each: tiny models spend their time waiting for a second thread. A file stays in one process,
# so that what its fixtures build is built once.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: setup tritonserver ray plugins loader  ## run the whole test suite (docs/testing.md)
	$(PYTEST)

test-fast: setup  ## what a developer runs before a commit: a few minutes, nothing to build
	$(PYTEST) -m "not (slow or built or exhaustive)"

test-exhaustive: setup tritonserver ray plugins loader  ## every combination, and other random examples each time
	$(PYTEST) -m "" --hypothesis-profile=random

# $(call beside,WHAT,VARIABLE,PACKAGES): the venv of a target, with what some tests need beside ours. Where that cannot be
# had (no network, another machine), one line says why, and they are skipped; it is an error where VARIABLE is set.
beside = @echo "installing $(1) for the tests into $(@D)"; mkdir -p $(dir $(@D)); rm -rf $(@D); \
    { $(PYTHON) -m venv $(@D) && $(@D)/bin/python -m pip install -q --disable-pip-version-check $(3); } >$(@D).log 2>&1 && \
    touch $@ || { rm -rf $(@D); \
    echo "the tests of $(1) are skipped, it cannot be installed: $$(tail -n 1 $(@D).log)" >&2; test -z "$${$(2):-}"; }

# The tests that compute numbers, as other processors would: other vector code in torch, oneDNN and OpenBLAS, MKL's own
# choice of code for every machine, another number of threads. Each line is one run. Widths that this processor lacks do
# nothing; those that it has beyond AVX2 are what `make test` uses.
NUMERIC := tests/kernels tests/exporter/reducers tests/exporter/lowering tests/exporter/searching tests/exporter/rewrite \
    tests/engines/backends tests/engines/test_preprocess.py tests/examples
test-portable: setup  ## the tests that compute numbers, under other vector code and BLAS (long)
	@set -e; for settings in \
	    'ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Prescott MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1' \
	    'ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell MKL_CBWR=AVX2 OMP_NUM_THREADS=2'; do \
	    echo "$$settings"; env $$settings $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m 'not (built or exhaustive)' $(NUMERIC); \
	done

# A real Triton Inference Server for the tests, with what a server has beside it. Its Python backend needs numpy below 2.
SERVER := build/tritonserver
$(SERVER)/.installed: constraints.txt
	$(call beside,Triton Inference Server,VP_REQUIRE_TRITON,\
	    nvidia-pytriton==0.7.0 'numpy<2' onnxruntime==1.31.1 pydantic==2.14.3 pillow==13.0.0)

# Ray for the tests, with what a node of a cluster has beside it. Not held to constraints.txt: pip looks for a set of
# versions that fits Ray and them for longer than ten minutes.
RAY := build/ray
$(RAY)/.installed: constraints.txt
	$(call beside,Ray Serve,VP_REQUIRE_RAY,\
	    'ray[serve]==2.60.0' numpy==2.4.6 onnxruntime==1.31.1 pydantic==2.14.3 pillow==13.0.0)

# The smoke suite with the oldest versions that pyproject.toml allows, and with the newest that there are.
LEG := '.[export,cpu,search,openvino,serve]' 'tritonclient[http]' pytest pytest-timeout
test-lowest:  ## the smoke suite with the lowest declared versions, in an environment of its own (5 GB)
	$(PYTHON) -m venv --clear build/lowest
	build/lowest/bin/python -m pip install -q --disable-pip-version-check -c constraints-lowest.txt -e $(LEG)
	OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -q tests/smoke

test-newest:  ## the smoke suite with the newest versions, in an environment of its own (5 GB)
	$(PYTHON) -m venv --clear build/newest
	build/newest/bin/python -m pip install -q --disable-pip-version-check -c constraints-newest.txt -e $(LEG)
	OMP_NUM_THREADS=1 build/newest/bin/python -m pytest -q tests/smoke

ray: $(RAY)/.installed  ## Ray Serve, for the tests

test-wheel: setup  ## the wheel in an environment of pip's own for each install line of README and docs (downloads gigabytes)
	VP_FRESH=1 $(BIN)/python -m pytest tests/test_wheel.py --timeout 3600

tritonserver: $(SERVER)/.installed  ## a Triton Inference Server on the CPU, for the tests

# TensorRT plugins for the tests, with few kernels: NvInfer.h comes from a wheel that carries a copy, cubins need no GPU.
PLUGINS := build/plugins
TEST_KERNELS := attention_fp32_d32* attention_fp16_d64_n17_32* attention_bf16_d64_n193_208 sum_* gather_norm/fp32_192* select/64 select/64_by_score \
    select/fuse_fp32_64 merge_rows/fp32_192_r16* match_merge/fp32_d64_32* density_merge/fp32*
build/nvinfer/.installed:
	@mkdir -p $(@D); { $(PYTHON) -m pip download -q --disable-pip-version-check --no-deps -d $(@D) kernel-lens==2.0.1 && \
	(cd $(@D) && $(PYTHON) -m zipfile -e kernel_lens-*.whl .); } >$(@D).log 2>&1 && touch $@ || { tail -n 1 $(@D).log >&2; test -z "$${VP_REQUIRE_CPP:-}"; }

build/plugin-kernels/index.json: $(STAMP) Makefile $(wildcard kernels/vp_kernels/*.py kernels/vp_kernels/*/*.py)
	env -u TRITON_INTERPRET $(BIN)/python -m vp_kernels.aot --sm 90 --all --force --out build/plugin-kernels \
	    $(foreach kernel,$(TEST_KERNELS),--match '$(kernel)') 2>build/plugin-kernels.log || { rm -f $@; test -z "$${VP_REQUIRE_CPP:-}"; }

plugins: cpp-deps build/plugin-kernels/index.json build/nvinfer/.installed  ## the TensorRT plugins, for the tests
	@lacks=""; test -e build/plugin-kernels/index.json || lacks="their kernels do not compile: $$(tail -n 1 build/plugin-kernels.log)"; \
	test -e build/nvinfer/.installed || lacks="there is no NvInfer.h: $$(tail -n 1 build/nvinfer.log)"; \
	command -v cmake >/dev/null && command -v c++ >/dev/null || lacks="they need cmake and a C++ compiler"; \
	test -z "$$lacks" || { echo "the TensorRT plugins are not built or tested: $$lacks" >&2; test -z "$${VP_REQUIRE_CPP:-}"; exit; }; \
	cmake -S . -B $(PLUGINS) -DVP_BUILD_ENGINE=OFF -DVP_PLUGIN_HARNESS=ON -DVP_KERNELS_DIR="$(CURDIR)/build/plugin-kernels" \
	    -DTENSORRT_INCLUDE_DIR="$(CURDIR)/build/nvinfer/kernel_lens/include/tensorrt" >/dev/null && \
	cmake --build $(PLUGINS) --parallel 2 -- -s

loader: setup cpp-deps  ## the C++ loader as its tests run it
	@$(BIN)/python -m tests.engines.cpp.builds

cpp-deps:  ## Debian packages that the C++ loader is built with, where they are missing
	@engines/cpp/install-deps.sh

lint: setup  ## ruff, and the floors that imports keep to
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: setup  ## mypy
	$(BIN)/mypy

check: lint typecheck test  ## what CI runs

demo: setup  ## digits ViT + searched mask -> ORT engine -> checked against dense -> report
	$(BIN)/python examples/digits/demo.py

bench: setup  ## the flowers ViT-S/16 on every engine that runs here (needs ../shared)
	$(BIN)/python benchmarks/flowers.py --out docs/results/flowers.md

bench-reducers: setup  ## every reducer on the flowers ViT-S/16 (needs ../shared); goes on where it was interrupted
	@mkdir -p build
	$(BIN)/python benchmarks/reducers.py --cache build/bench-reducers.json --out docs/results/reducers.md

bench-search: setup  ## searched plans on the flowers ViT-S/16 (needs ../shared; hours); goes on where it was interrupted
	@mkdir -p build
	$(BIN)/python benchmarks/search.py --cache build/bench-search.json --out docs/results/search.md

bench-gpu:  ## kernels and reduced models on a GPU, with nothing installed but torch, triton and timm
	@mkdir -p build
	$(PYTHON) -m benchmarks.gpu --cache build/gpu.json --out docs/results/gpu.md

bench-cpp: setup cpp-deps  ## the C++ loader against torch's own (needs ../shared)
	$(BIN)/python benchmarks/cpp_loader.py --out docs/results/cpp.md

support-table: setup  ## regenerate docs/models.md
	$(BIN)/python -m vp_exporter.model.support_table > docs/models.md

# In a venv of its own: the site needs neither torch nor what the tests need.
DOCS := build/docs
$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(DOCS)/.installed  ## the documentation as a site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

clean:  ## remove what the targets made
	rm -rf $(VENV) build *.egg-info
