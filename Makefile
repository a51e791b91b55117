# Every target sets up what it needs; all of them run as root on a bare Debian 12 or 13.
SHELL := /bin/bash
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
SOURCES := src tests lab bench native image scripts

.PHONY: help setup demo demo-cluster test check format test-pure test-kernel test-node test-image test-chart test-cluster bench bench-capacity \
	plugin image kubernetes cluster-up cluster-down kubectl lock push sign verify-image expected reference clean

help:            ## this list
	@grep -hE '^[a-z0-9-]+: .*##' Makefile | sed -E 's/: .*##/\t/' | expand -t 16

setup:           ## install everything the other targets need
	@scripts/setup

demo: plugin     ## a real containerd starts pods, a real Envoy and a stand-in for ztunnel get their traffic
	@$(PYTHON) -m lab.demo

demo-cluster: plugin kubernetes image ## a real Kubernetes: the chart, a sidecar and two ambient pods on two nodes, their traffic
	@$(PYTHON) -m lab.cluster demo

check: setup     ## format, lint, types, contracts, pure tests
	@scripts/check

test: plugin     ## all tiers that this machine can run
	@scripts/test

test-pure: setup ## pure tier, with Python 3.13 too when there is one
	@scripts/test pure

test-kernel: setup ## real netfilter and packets in namespaces of the tests
	@scripts/test kernel

test-node: plugin ## containerd, Envoy, the built plugin and the agent
	@scripts/test node

test-image: plugin ## what is in the image, how it is signed, and running it
	@scripts/test image

test-chart: setup ## what the chart renders
	@scripts/test chart

test-cluster: plugin ## a real Kubernetes of two nodes, the chart, the built image
	@scripts/test cluster

cluster-up: plugin kubernetes image ## a Kubernetes of two nodes that stays until `make cluster-down`
	@$(PYTHON) -m lab.cluster up

cluster-down: setup ## remove it
	@$(PYTHON) -m lab.cluster down

kubectl: setup   ## ARGS="get pods -A": kubectl on that cluster
	@$(PYTHON) -m lab.cluster kubectl $(ARGS)

bench: plugin    ## costs as ratios to yardsticks of the same run
	@$(PYTHON) -m bench

bench-capacity: plugin ## what hundreds of agents cost a real API server
	@scripts/build-kubernetes hyperkube
	@$(PYTHON) -m bench.capacity

plugin: setup    ## build/istio-cni, one static executable
	@scripts/build-plugin

kubernetes: setup ## build/kubernetes: every daemon, kubectl and Helm; minutes when nothing is cached
	@scripts/build-kubernetes

image: setup     ## build/image, an OCI layout: both variants, both architectures
	@$(PYTHON) -m image build

lock: setup      ## image/lock.json anew, from what Debian's archive has now
	@$(PYTHON) -m image lock

push: image      ## the image with its attestations to REGISTRY=host/repository
	@$(PYTHON) -m image push $(or $(REGISTRY),$(error say where to: make push REGISTRY=host/repository))

sign: image      ## build/image signed with KEY=private.pem
	@$(PYTHON) -m image sign --key $(or $(KEY),$(error say with what: make sign KEY=private.pem))

verify-image: setup ## IMAGE=layout or reference: checks it (with KEY=public.pem its signatures) and builds it again
	@$(PYTHON) -m image verify --rebuild $(if $(KEY),--key $(KEY)) $(or $(IMAGE),$(error say which: make verify-image IMAGE=build/image))

expected: setup  ## write the expected rule files anew; read the diff before committing it
	@scripts/expected

reference: setup ## write docs/reference and the chart's README anew from the tables in the code and the values
	@scripts/reference
	@scripts/chart-readme

format: setup    ## format the code in place
	@.venv/bin/ruff check --fix -q $(SOURCES) || true
	@.venv/bin/ruff format -q $(SOURCES)

clean:           ## remove what the targets built; the next one sets up again
	rm -rf build .venv .venv-3.13 .tools .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
