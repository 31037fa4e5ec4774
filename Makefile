# `make help` lists the targets. Everything goes into .venv; nothing needs root or a running server.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DATA ?= $(or $(LOANMESH_DATA),../shared/data)

.PHONY: help demo test unit lint format proto lock train bench rivals chaos causes promotion simulate mutants firms docs clean manifests image kube-verify rotations fuzz audit licences

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 13

demo: $(READY) ## Watch the main job: decide, explain, lose a source, get it back
	@$(BIN)/loanmesh demo

test: $(READY) ## Run all tests, two files at a time: make test [JOBS=4]
	@$(BIN)/python -m pytest -n $(or $(JOBS),2) --dist loadfile

unit: $(READY) ## Run the tests that need no process
	@$(BIN)/python -m pytest tests/unit

lint: $(READY) ## Format, style, types and import rules
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(READY) ## Ours and its rivals side by side: make bench [ONLY=core,goodput] [QUICK=1]
	@$(BIN)/python -m benchmarks $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick)

rivals: ## Build the environment of the rivals that make bench runs (DBOS, Temporal)
	@$(PYTHON) -m venv benchmarks/rivals/.venv
	@benchmarks/rivals/.venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r benchmarks/rivals/requirements.txt

chaos: $(READY) ## Submit 100,000 under 420 faults on both databases, check every promise: make chaos ARGS="--seed 7"
	@$(BIN)/python -m lab.chaos $(ARGS)

promotion: $(READY) ## Live through a small promotion with a real mesh and compare what the simulator foretells
	@$(BIN)/python -m benchmarks.foretold $(ARGS)

causes: $(READY) ## Plant ten troubles in a real mesh; is each named first by why-failed? make causes ARGS="--only full_disk"
	@$(BIN)/python -m lab.causes $(ARGS)

simulate: $(READY) ## Live through 10,000 seeds of faults on a virtual clock
	@$(BIN)/python -m lab.simulator --seeds $(or $(SEEDS),10000)

mutants: $(READY) ## Plant bugs and see each found by the simulator
	@$(BIN)/python -m lab.simulator.mutants

fuzz: $(READY) ## Send 10,000 odd requests to every RPC, read thousands of odd files: make fuzz ARGS="--seed 7"
	@$(BIN)/python -m lab.fuzz $(ARGS)

audit: $(READY) ## Look for known vulnerabilities in what is locked; says "not audited" where nobody can be asked
	@$(BIN)/python -m lab.dependencies audit

licences: $(READY) ## Write docs/licences.md; refuse what is not allowed
	@$(BIN)/python -m lab.dependencies licences

firms: $(READY) ## Decide the 302 real firms: make firms DATA=folder
	@$(BIN)/loanmesh decide-firms $(DATA)

manifests: $(READY) ## Check deploy/k8s without a cluster: make manifests [OVERLAY=production]
	@$(BIN)/python -m lab.kube.check $(if $(OVERLAY),--overlay $(OVERLAY))

kube-verify: $(READY) ## Try an overlay on a real cluster: make kube-verify CONTEXT=kind-loanmesh [OVERLAY=local]
	@$(BIN)/python -m lab.kube.verify $(if $(CONTEXT),--context $(CONTEXT)) --overlay $(or $(OVERLAY),local) $(ARGS)

image: $(READY) ## Build the image, start the four services from it, decide an application: make image [BASE=image]
	@$(BIN)/python -m lab.kube.image $(if $(BASE),--base $(BASE)) $(ARGS)

rotations: $(READY) ## Replace certificates a thousand times under traffic: no failed call, no leak
	@LOANMESH_ROTATIONS=1000 $(BIN)/python -m pytest -s tests/integration/test_tls.py -k many_rotations

train: ## Train the models again: make train DATA=folder TRAIN_PYTHON=python with requirements/train.in
	PYTHONPATH=. $(or $(TRAIN_PYTHON),python3) -m lab.training.train $(DATA)

docs: $(READY) ## Write the generated pages of docs/ again
	@$(BIN)/python -m lab.contract_pages

proto: ## Generate the contracts' code again after editing protos/
	@rm -f $(READY)
	@$(MAKE) --no-print-directory $(READY)

lock: ## Pin requirements again: dev, runtime and build (needs uv)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header requirements/dev.in -o requirements/dev.txt
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header pyproject.toml -c requirements/dev.txt -o requirements/runtime.txt
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header requirements/build.in -c requirements/dev.txt -o requirements/build.txt
	cd benchmarks/rivals && uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header requirements.in -o requirements.txt

clean: ## Remove everything that was built
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(READY): requirements/dev.txt pyproject.toml build_protos.py $(shell find protos -type f)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "Install Python 3.11 or newer first (or name one: make $(MAKECMDGOALS) PYTHON=python3.12)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "Install Python's venv first (on Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }
	@echo "Installing into .venv (once, about a minute) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)
