# make demo | test | lint need nothing before them but git, make and Python >= 3.10.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATASET := /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz

.DEFAULT_GOAL := help
.PHONY: help demo test lint venv data clean

help:
	@echo "make demo   train, forget and compare on Fashion-MNIST (configs/unlearning/demo.yaml)"
	@echo "make test   the full test suite; make test ARGS='tests/nn -x' for a part of it"
	@echo "make lint   ruff, mypy and import-linter"
	@echo "make venv   the virtual environment $(VENV) with the package and what its development needs"
	@echo "make data   the Fashion-MNIST package of Debian and Ubuntu, where it can be installed"
	@echo "make clean  remove builds and caches (not $(VENV), data/ or runs/)"

# threads that wait asleep: waiting awake, they make an epoch many times slower while another process wants a core
demo: export OMP_WAIT_POLICY ?= PASSIVE
demo: venv data
	$(BIN)/lightning-trust run configs/unlearning/demo.yaml

test: export OMP_NUM_THREADS = 1
test: venv data
	$(BIN)/python -m pytest $(ARGS)

# -m and -c, not scripts: with --system-site-packages a tool may be installed outside $(VENV)
lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -c "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"

venv: $(STAMP)

# A torch >= 2.6 with a working torchvision that $(PYTHON) has already is kept: $(VENV) then sees its packages.
$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "lightning_trust needs Python 3.10 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@if [ -e $(VENV) ] && ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "$(VENV) is there, but its Python or pip does not run. Remove it and try again: rm -rf $(VENV)" >&2; exit 1; fi
	@if [ ! -e $(VENV) ]; then \
	  kept=$$($(PYTHON) -c "$$FIND_TORCH" 2>/dev/null); \
	  echo "Making $(VENV)$${kept:+, which keeps the torch in $$kept}"; \
	  make_venv() { $(PYTHON) -m venv $${kept:+--system-site-packages} $(VENV) || { rm -rf $(VENV); return 1; }; }; \
	  if ! make_venv; then \
	    if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	      echo "Installing python3-venv, without which the Python of Debian and Ubuntu makes no environments"; \
	      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null \
	        && make_venv || exit 1; \
	    else \
	      echo "'$(PYTHON) -m venv' fails. On Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; \
	    fi; \
	  fi; \
	  if [ -n "$$kept" ]; then $(BIN)/python -c "$$SEE_TORCH" "$$kept" || { rm -rf $(VENV); exit 1; }; fi; \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@

# Prints the folder of packages that holds the torch to keep; fails where there is none.
define FIND_TORCH
import pathlib, torch, torchvision
assert tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
torchvision.ops.nms(torch.zeros(1, 4), torch.ones(1), 0.5)
print(pathlib.Path(torch.__file__).resolve().parent.parent)
endef
export FIND_TORCH

# --system-site-packages shows the packages of the system, not those of a virtual environment that is active.
define SEE_TORCH
import importlib.util, pathlib, sys, sysconfig
if importlib.util.find_spec("torch") is None:
    pathlib.Path(sysconfig.get_path("purelib"), "kept_torch.pth").write_text(sys.argv[1] + "\n")
endef
export SEE_TORCH

# Never fails: where the package cannot be had, torchvision downloads the data set into data/ at first use.
data:
	@if [ -f $(DATASET) ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then as=none; \
	elif [ "$$(id -u)" = 0 ]; then as=; \
	elif sudo -n true 2>/dev/null; then as="sudo -n"; else as=none; fi; \
	if [ "$$as" != none ]; then \
	  echo "Installing the data set package dataset-fashion-mnist"; \
	  $$as apt-get update -qq >/dev/null 2>&1; \
	  $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq dataset-fashion-mnist >/dev/null 2>&1; \
	fi; \
	[ -f $(DATASET) ] || echo "Fashion-MNIST is no system package here: torchvision will download it into data/"

clean:
	rm -rf build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find lightning_trust tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
