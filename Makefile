# Two commands do everything on a machine with Python 3.11 to 3.13 and make:
#
#   make test         environment, kernels, tests, and a summary that says which tier ran
#   make notebooks    the same for the notebooks
#
# ENV=system   use the interpreter at hand (conda, containers, no network) instead of .venv
# PYTHON=...   the Python that makes .venv (or, with ENV=system, the one that is used)
# ARGS=...     passed on: make test ARGS="-k split_kv", make bench ARGS="--quick"
# TORCH_INDEX=URL  where pip looks for torch first, for instance an index of CPU builds

ENV ?= venv
ARGS ?=
export ENV TORCH_INDEX

DEV = @PY="$$(sh tools/find_python.sh)" && exec "$$PY" tools/dev.py --env $(ENV)

.DEFAULT_GOAL := help
.PHONY: help env kernels test notebooks executed lab book bench lint clean distclean

help:  ## what there is
	@sed -n 's/^\([a-z]*\):.*## */  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

env:  ## the environment alone (.venv)
	$(DEV) env

kernels:  ## the CUDA kernels, if there is a compiler
	$(DEV) kernels

test:  ## the tests
	$(DEV) test -- $(ARGS)

notebooks:  ## the notebooks, run from top to bottom
	$(DEV) notebooks -- $(ARGS)

executed:  ## the notebooks as they run on this Hopper card, for the book
	$(DEV) executed -- $(ARGS)

lab:  ## opens jupyter lab on the notebooks
	$(DEV) lab -- $(ARGS)

book:  ## the book, in book/_build/html
	$(DEV) book -- $(ARGS)

bench:  ## the benchmark on this machine
	$(DEV) bench -- $(ARGS)

lint:  ## ruff and mypy
	$(DEV) lint

clean:  ## removes what was built here, keeps .venv
	rm -rf build dist book/_build book/stages book/generated .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and .venv too
	rm -rf .venv
