# Needs Python >= 3.10, a C++20 compiler and a package index; everything else is installed into .venv here.
#   make test ARGS="-k voxelize"      make demo ARGS=--quick      make test TORCH=torch==2.14.1 PYTHON=python3.12
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
CUDA_ARCHS ?= 8.0;9.0;10.0+PTX
ARGS ?=

export WERROR ?= 1

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test bench wheel cuda-check docs lint clean

# Folders count as well: a file that was added or removed changes theirs.
SOURCES := setup.py $(shell find csrc -not -name '*.md')
# A stamp's name holds what was installed, so another TORCH or PYTHON is another stamp and starts anew.
key = $(shell echo '$(PYTHON) $(1)' | cksum | cut -d' ' -f1)
ENV := .venv/env-$(call key,$(TORCH))
BUILT := .venv/built-$(call key,$(TORCH))
CUDA_ENV := .venv-cuda/env-$(call key,$(CUDA_TORCH))
CUDA_CHECKED := .venv-cuda/checked-$(call key,$(CUDA_TORCH) $(CUDA_ARCHS))
RUN = source $(1)/bin/activate &&

define make_env
$(PYTHON) -c 'import sys; sys.exit("fastnuggets needs Python >= 3.10" if sys.version_info < (3, 10) else 0)'
$(PYTHON) -m venv $$(test -e $@ || echo --clear) $(1)
rm -f $(1)/env-* $(1)/built-* $(1)/checked-*
$(call RUN,$(1)) pip install --quiet --disable-pip-version-check '$(2)' 'setuptools>=77' wheel 'ninja>=1.11'
endef

test: $(BUILT)
	$(call RUN,.venv) python -m pytest $(ARGS)

demo: $(BUILT)
	$(call RUN,.venv) fastnuggets demo $(ARGS)

bench: $(BUILT) .venv/bench .venv/peers
	$(call RUN,.venv) python -m bench $(ARGS)

wheel: $(ENV)
	rm -rf build/lib.* build/bdist.*
	$(call RUN,.venv) pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

cuda-check: $(CUDA_CHECKED)

docs:
	@echo 'There are no generated pages yet: the contracts are the docstrings of fastnuggets/ops and csrc/*/README.md.' >&2
	@exit 1

lint: $(BUILT) .venv/dev
	$(call RUN,.venv) .ci/lint

clean:
	rm -rf .venv .venv-cuda build dist *.egg-info fastnuggets/_C.*.so fastnuggets/_build.json

# The editable install brings the dependencies, the command and the first build in one go.
$(ENV): pyproject.toml
	$(call make_env,.venv,$(TORCH))
	$(call RUN,.venv) pip install --quiet --no-build-isolation --editable '.[test]'
	touch $@

$(BUILT): $(ENV) $(SOURCES)
	$(call RUN,.venv) python setup.py --quiet build_ext --inplace
	touch $@

.venv/bench .venv/dev: $(ENV)
	$(call RUN,.venv) pip install --quiet --no-build-isolation --editable '.[$(notdir $@)]'
	touch $@

# These would bring a torchvision, and that another torch, or a compiler; what is measured of them needs neither.
.venv/peers: .venv/bench
	$(call RUN,.venv) pip install --quiet --no-deps timm==1.0.31 bayesian-torch==0.5.0 blitz-bayesian-pytorch==0.2.8 \
		fpie==0.3.4
	touch $@

$(CUDA_ENV):
	$(call make_env,.venv-cuda,$(CUDA_TORCH))
	$(call RUN,.venv-cuda) pip install --quiet 'numpy>=1.26'
	touch $@

$(CUDA_CHECKED): $(CUDA_ENV) $(SOURCES) .ci/cuda-check .ci/kernel_resources.py
	$(call RUN,.venv-cuda) TORCH_CUDA_ARCH_LIST='$(CUDA_ARCHS)' .ci/cuda-check
	touch $@
