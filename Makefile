# make demo   a question about a picture, answered with all visual tokens and with half of them
# make report  test and measure this machine, in MINUTES (10), and say where the figures can be sent
# make test-metal  the tests whose answers a GPU could change, on this machine's
# make test   lint, then the tests
# make test-lowest  the tests of what we depend on, with the oldest versions that we allow
# make test-pythons  the library alone, on the oldest and the newest Python, where they are installed
# make test-lmms-eval  the model that lmms-eval loads, by lmms-eval's own evaluator; it installs that
# make docs   the documentation as a site, in site/
# make browser  Chromium for the tests of pages, where apt-get may install it; else they are skipped
# make lint   ruff and mypy
# make clean  remove what the others made
#
# Needs python3 3.10 or newer; everything else goes into .venv, which all of them share.

# Or each process would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo report test test-metal test-lowest test-pythons test-lmms-eval docs browser lint clean

demo: $(VENV)/.demo-ready
	$(BIN)/python -m mlx_vlm_prune.generate

MINUTES ?= 10

report: $(VENV)/.report-ready
	$(BIN)/python -m benchmarks.device_report --minutes $(MINUTES)

test-metal: $(VENV)/.report-ready
	$(BIN)/python -m benchmarks.gpu_tests

# Two workers, each of one thread: several threads for each get in one another's way. A worker that
# is done takes over half of what the other has left.
WORKERS := -n 2 --dist worksteal
export OMP_NUM_THREADS := 1

test: lint
	$(BIN)/python -m pytest $(WORKERS)

LOWEST := $(VENV)-lowest
INSTALLS_alone := .
INSTALLS_hosts := '.[mlx-lm,mlx-vlm]' transformers
TESTS_alone := $(patsubst %,tests/test_%.py,answers chains generate golden_requests goldens image \
	image_refusals model overlay pages presets prompt pruners_budgets pruners_twins scenes \
	selective_scan signal_memory signals twig)
TESTS_hosts := $(patsubst %,tests/test_%.py,hosts hosts_at_once hosts_evaluate hosts_generate \
	hosts_recent hosts_several_images hosts_tower hosts_video hub image llava mlx_lm picture_memory \
	prune_into_stock pruned pruned_attach torch_ref_parts)

test-lowest: $(LOWEST)/alone/.ready $(LOWEST)/hosts/.ready
	$(LOWEST)/alone/bin/python -m pytest $(WORKERS) $(TESTS_alone)
	$(LOWEST)/hosts/bin/python -m pytest $(WORKERS) $(TESTS_hosts)

PYTHONS := 3.10 3.14
TESTS_pythons := $(patsubst %,tests/test_%.py,image image_refusals judge modules overlay prompt \
	question_folders questions)
# On the PATH, or where pyenv puts it.
FIND_PYTHON = for python in python$* $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$*.*/bin/python$*; do \
	"$$python" -c "" 2>/dev/null && break; python=; done

test-pythons: $(PYTHONS:%=test-python-%)

# Without torch, which has no small wheel for every Python on Linux.
test-python-%:
	@$(FIND_PYTHON); \
	if [ -z "$$python" ]; then echo "Python $* is not installed here: not tested"; exit; fi; \
	set -ex; "$$python" -m venv --clear $(VENV)-$*; \
	$(VENV)-$*/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		-e . pytest pytest-timeout hypothesis; \
	$(VENV)-$*/bin/python -W error -m mlx_vlm_prune.generate --overlay $(VENV)-$*/kept.png; \
	$(VENV)-$*/bin/python -m pytest $(TESTS_pythons)

LMMS_EVAL := $(VENV)-lmms-eval

test-lmms-eval: $(LMMS_EVAL)/.ready
	$(LMMS_EVAL)/bin/python -m pytest tests/test_lmms_eval.py

docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

browser:
	@if command -v chromium || command -v google-chrome; then exit; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "no Chromium here, and nothing that could install it: pages are not tested"; exit; fi; \
	(apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
		--no-install-recommends chromium fonts-dejavu-core) >/dev/null || \
		echo "Chromium cannot be installed: pages are not tested"

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(LOWEST) $(LMMS_EVAL) $(PYTHONS:%=$(VENV)-%) build dist site *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The markers say what is installed; they are made again when the requirements change.
$(VENV)/.demo-ready: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e .
	touch $@

$(VENV)/.report-ready: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e '.[mlx-lm]' torch pytest pytest-timeout hypothesis
	touch $@ $(VENV)/.demo-ready

$(VENV)/.test-ready: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e '.[test]'
	touch $@ $(VENV)/.demo-ready $(VENV)/.report-ready

$(VENV)/.docs-ready: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e '.[docs]'
	touch $@ $(VENV)/.demo-ready

$(LOWEST)/%/.ready: constraints-lowest-%.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -c $< \
		-e $(INSTALLS_$*) torch pytest pytest-timeout pytest-xdist hypothesis
	touch $@

$(LMMS_EVAL)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		-e '.[lmms-eval,mlx-vlm,serve]' pytest pytest-timeout hypothesis
	@# lmms-eval brings torchvision. One built for CUDA fails beside a torch for CPUs; tests need none.
	$(@D)/bin/python -m pip uninstall -q -y torchvision
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
