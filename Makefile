# Thin: every target calls one job of scripts/. `make help` lists them.
PYTHON ?= python3
PY := .venv/bin/python
STACK := $(PY) -m scripts.stack
# CUDA=118|121|130|cpu and RUNTIME=docker|host; settings of .env.example may be given likewise.
CHOICE := $(if $(CUDA),--cuda $(CUDA)) $(if $(RUNTIME),--runtime $(RUNTIME))
URL ?=

.DEFAULT_GOAL := help
.PHONY: help up down restart status logs key keys tls build download models pin fit doctor configure generate bench bench-serve bench-start smoke test test-gpu lint lock engine publish release bundle sbom

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

up: .venv/host ## Bring the endpoint up: make up [CUDA=121] [RUNTIME=docker|host] [PORT=8000]
	@$(STACK) up $(CHOICE)

down: .venv/host ## Stop everything that `make up` started; models and images stay
	@$(STACK) down $(CHOICE)

status: .venv/host ## Show what runs
	@$(STACK) status $(CHOICE)

logs: .venv/host ## Follow the logs
	@$(STACK) logs $(CHOICE)

build: .venv/host ## Build the images: make build [CUDA=118|121|130|cpu|all]
	@$(STACK) build $(CHOICE)

restart: .venv/host ## Restart the replicas one by one; with two or more no request fails
	@$(STACK) restart $(CHOICE)

key: .venv/host ## Make a key for a client: make key NAME=alice [REVOKE=1]; make keys lists them
	@$(STACK) key $(if $(REVOKE),revoke,add) "$(NAME)" $(CHOICE)

keys: .venv/host
	@$(STACK) key list $(CHOICE)

tls: .venv/host ## Make a self-signed certificate for the endpoint
	@$(STACK) tls $(CHOICE)

download: .venv/host ## Bring the model
	@$(STACK) download $(CHOICE)

models: .venv/host ## List the models of the volume: make models [REMOVE=owner/name]
	@$(STACK) models $(CHOICE) $(if $(REMOVE),--remove $(REMOVE))

doctor: .venv/host ## Check this host, and say how to mend it: make doctor [CUDA=121]
	@$(PY) -m scripts.doctor $(CHOICE)

configure: .venv/host ## Write what `make up` would choose into .env; your own lines stay
	@$(STACK) configure $(CHOICE)

fit: .venv/host ## Show how much context fits: make fit [GPU=rtx3090] [MODEL=…] [CUDA=121]
	@$(STACK) fit $(CHOICE) $(if $(GPU),--gpu $(GPU))

pin: .venv/host ## Pin the model on the volume: later downloads must be the same, file by file
	@$(STACK) pin $(CHOICE)

generate: .venv/host ## Answer prompts without a server: make generate INPUT=prompts.jsonl [OUTPUT=…] [ARGS=…]
	@$(STACK) $(CHOICE) $(if $(INPUT),--input "$(INPUT)") $(if $(OUTPUT),--output "$(OUTPUT)") \
	  generate -- $(ARGS) $(if $(PROMPT),"$(PROMPT)")

bench: .venv/bench ## Measure vLLM against transformers and the card's limit: make bench [ARGS="--fp8"]
	@$(STACK) $(CHOICE) bench -- $(ARGS)

bench-serve: .venv/bench ## Measure a served endpoint under load: make bench-serve [URL=…] [ARGS=…]
	@$(STACK) $(CHOICE) bench-serve -- $(if $(URL),--url $(URL)) $(ARGS)

bench-start: .venv/bench ## Measure a start, cold and warm, to the first token
	@$(STACK) $(CHOICE) bench-start -- $(ARGS)

smoke: .venv/dev ## Check a running endpoint, ours or any: make smoke [URL=http://…:8000]
	@url=$(or $(URL),$$($(STACK) url $(CHOICE))) && $(PY) -m pytest -q tests/smoke --url "$$url"

test: .venv/dev ## Run all tests: make test [TESTS=tests/unit] [VARIANTS=cpu]; `make engine` first
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && \
	  $(PY) -m pytest $(TESTS) $(if $(VARIANTS),--variants $(VARIANTS))

test-gpu: .venv/dev ## Test an image on this host's GPU: make test-gpu CUDA=121
	@$(PY) -m pytest -s tests/gpu --gpu-variant cu$(CUDA)

lint: .venv/dev ## Correct the form of the code
	@$(PY) -m ruff check --fix . ; $(PY) -m ruff format .

lock: .venv/host ## Compile a lock file: make lock CUDA=121 [VLLM_VERSION=… RESOLVED_BEFORE=…]
	@$(PY) -m scripts.lock $(CUDA) $(if $(VLLM_VERSION),--vllm $(VLLM_VERSION)) \
	  $(if $(RESOLVED_BEFORE),--before $(RESOLVED_BEFORE))

publish: .venv/dev ## Build, test and push every image: make publish REGISTRY=host/path[,…] [CUDA=121,cpu]
	@$(PY) -m scripts.publish --registry "$(REGISTRY)" $(if $(CUDA),--cuda $(CUDA)) $(ARGS)

release: .venv/host ## Write dist/glm4-stack-<version>.tar.gz: what a host needs that only pulls
	@$(PY) -m scripts.release

bundle: .venv/host ## Write all that a host without a network needs: make bundle CUDA=121 [MODEL=…] [RUNTIME=host]
	@$(PY) -m scripts.bundle $(CHOICE)

sbom: .venv/host ## Write what the built images contain, and the licences: make sbom CUDA=121
	@$(PY) -m scripts.contents $(if $(CUDA),--cuda $(CUDA))

engine: .venv/host ## Bring up a Docker engine on a Debian host, as root
	@$(PY) -m scripts.engine

.venv/host: scripts/host.lock
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: $(PYTHON) lacks venv or is older than 3.11; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "preparing .venv"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

.venv/bench: scripts/bench.lock .venv/host
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

.venv/dev: tests/dev.lock .venv/host
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@
