# make train            train and score DrivenMorph on the embedded cohort
# make test             the tests
# JAX=cuda13|cuda12|tpu installs the build for that accelerator; PYTHON=python3.12 takes another interpreter

PYTHON ?= python3
JAX ?= cpu
WORKDIR ?= runs/default
INSTALLED = .venv/installed-$(JAX)

.PHONY: train test

train: $(INSTALLED)
	.venv/bin/python train.py --config configs/default.py --workdir $(WORKDIR)

test: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -n 2

$(INSTALLED): requirements.txt requirements-test.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old: install Python 3.11 to 3.13, or name it, as in make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || [ "$$(id -u)" != 0 ] || \
		{ apt-get update -qq && apt-get install -qq -y python3-venv; }
	$(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "Python's venv module is missing: apt install python3-venv, then make again"; exit 1; }
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r requirements.txt -r requirements-test.txt
ifneq ($(JAX),cpu)
	.venv/bin/python -m pip install --quiet "jax[$(JAX)]"
endif
	rm -f .venv/installed-*
	touch $@
