# make train        train and score DrivenMorph on the embedded cohort
# make test         check style and types, and run the tests
# make test-slow    damage and kill far more often than make test does, register the largest pair of the tests, and run the
#                   tests on a Dask cluster
# make docs         build the site of docs/ in build/docs
# make pictures     draw the pictures of docs/view.md anew; it needs a Chromium
# make build        make the wheel and the sdist in dist/
# JAX=cuda13|cuda12|tpu installs the build for that accelerator; PYTHON=python3.12 takes another interpreter

PYTHON ?= python3
JAX ?= cpu
WORKDIR ?= runs/default
INSTALLED = .venv/installed-$(JAX)
KERNELS = .venv/kernels

.PHONY: train test test-slow lint docs pictures build

train: $(INSTALLED) $(KERNELS)
	.venv/bin/python train.py --config configs/default.py --workdir $(WORKDIR)

test: lint
	.venv/bin/python -m pytest -n 2

test-slow: $(INSTALLED) $(KERNELS)
	.venv/bin/python -m pip install --quiet distributed
	FUZZ=2000 KILLS=30 .venv/bin/python -m pytest -n 2 -m "" tests/test_fuzz.py tests/test_checkpoint.py \
		tests/test_kill.py tests/test_contrast.py tests/test_registration_cohort.py tests/test_weights.py

lint: $(INSTALLED) $(KERNELS)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: $(INSTALLED) .venv/installed-docs
	.venv/bin/mkdocs build --strict

pictures: $(INSTALLED)
	PICTURES=docs .venv/bin/python -m pytest tests/test_view_browser.py -k tour

build: $(INSTALLED)
	.venv/bin/python -m build

$(INSTALLED): requirements.txt requirements-test.txt requirements-view.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.14: name another, as in make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv module is missing: install it (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r requirements.txt -r requirements-test.txt \
		$(if $(filter-out cpu,$(JAX)),"jax[$(JAX)]") $(if $(findstring cuda,$(JAX)),-c constraints-gpu.txt)
	.venv/bin/python -m pip install --quiet --no-deps deepbet==1.0.2  # two files of weights; its torch is not needed
	.venv/bin/python -m pip install --quiet -r requirements-view.txt "playwright>=1.49" || \
		echo "the tests in a browser are skipped"  # they also need a Chromium
	rm -f .venv/installed-*
	touch $@

$(KERNELS): $(INSTALLED) setup.py drivenmorph_jax/backends/kernels.cpp
	.venv/bin/python setup.py --quiet build_ext --inplace || echo "without kernels"  # they are optional
	touch $@

.venv/installed-docs: $(INSTALLED) requirements-docs.txt
	.venv/bin/python -m pip install --quiet -r requirements-docs.txt
	touch $@
