# SPDX-License-Identifier: Apache-2.0

# A clone needs Go, make and a C compiler (for the race detector). Everything else
# is built here, once, into lab/.bin.

MODULE := github.com/tailscale-impersonate/caddy-tailscale-impersonate
BIN    := lab/.bin
TOOLS  := lab/tools

# The version of module $(2) in go.mod $(1), so that each version is pinned in one place.
version_in = $(shell awk '$$1 == "$(2)" { print $$2 }' $(1))

CADDY              := github.com/caddyserver/caddy/v2
CADDY_VERSION      := $(call version_in,go.mod,$(CADDY))
KUBERNETES_VERSION := $(call version_in,$(TOOLS)/kubernetes/go.mod,k8s.io/kubernetes)

# How long the lab's tests may take before go test gives up.
LAB_TEST_TIMEOUT ?= 30m

KUBERNETES_PARTS := etcd kube-apiserver kubectl
# What a real node consists of, and why it cannot run here. Without it, pods are
# processes of this machine, and the tests that need it are skipped.
DEBIAN_PACKAGES := $(strip $(file < lab/node/packages.txt))
NODE_PARTS      := kubernetes-node pause debian/.unpacked
NODE_REASON     := $(if $(filter-out Linux,$(shell uname -s)),this is not Linux,$(if $(filter-out 0,$(shell id -u)),you are not root,$(if $(shell command -v apt-get),$(if $(shell command -v dpkg),$(if $(shell grep -sw memory /proc/self/cgroup),,its control groups are not of version 1),there is no dpkg),there is no apt-get)))

MODULES_WANTED   := tailscale_impersonate admin.api.tailscale_impersonate http.handlers.tailscale_impersonate http.reverse_proxy.transport.kubernetes http.matchers.kubernetes http.matchers.tailnet_up tailscale_impersonate.recordings.directory tailscale_impersonate.recordings.s3

# KUBEBUILDER_ASSETS may name a folder with etcd, kube-apiserver and kubectl. If one
# is missing, none is used, so that all come from the same version.
ifneq ($(KUBEBUILDER_ASSETS),)
ASSETS_MISSING := $(foreach part,$(KUBERNETES_PARTS),$(if $(wildcard $(KUBEBUILDER_ASSETS)/$(part)),,$(part)))
ifeq ($(strip $(ASSETS_MISSING)),)
KUBERNETES_PARTS :=
ASSETS_NOTE := using etcd, kube-apiserver and kubectl from KUBEBUILDER_ASSETS=$(KUBEBUILDER_ASSETS)
else
unexport KUBEBUILDER_ASSETS
ASSETS_NOTE := not using KUBEBUILDER_ASSETS=$(KUBEBUILDER_ASSETS), which lacks: $(ASSETS_MISSING)
endif
endif

build_command = go build

# $(call build,name,tools module,package,time it takes,linker flags)
define build
	@mkdir -p $(BIN)
	@echo "==> building $(1) from $(TOOLS)/$(2), once; takes about $(4) with an empty build cache"
	@start=$$(date +%s) && \
	cd $(TOOLS)/$(2) && $(build_command) -trimpath -gcflags=all=-dwarf=false -ldflags "-w $(5)" -o ../../.bin/$(1).new $(3) && mv ../../.bin/$(1).new ../../.bin/$(1) && \
	echo "==> built $(1) in $$(( $$(date +%s) - start )) s"
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help components node node-note assets-note asciicast client-node client-python browser demo test test-long chart-test conformance conformance-mutants mutants kubernetes-conformance fuzz bench soak lint xcaddy image release-caddy clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# What the demo and the tests run, and what only the tests run.
DEMO_PARTS := $(addprefix $(BIN)/,$(KUBERNETES_PARTS) clusterrole-aggregation headscale)
TEST_PARTS := $(addprefix $(BIN)/,helm tailscaled promql servicemonitors.yaml versitygw)
ifeq ($(NODE_REASON),)
TEST_PARTS += node
endif

components: assets-note node-note $(DEMO_PARTS) $(TEST_PARTS) browser client-python client-node asciicast ## build what the lab runs (once)

# asciinema's own parser, with which a test plays recordings. Without it, that test
# is skipped.
ASCIICAST := $(TOOLS)/asciicast/node_modules/.package-lock.json

asciicast:
	@if [ ! -e $(ASCIICAST) ] || [ $(TOOLS)/asciicast/package-lock.json -nt $(ASCIICAST) ]; then \
		echo "==> installing asciinema's parser with npm, once"; \
		(cd $(TOOLS)/asciicast && npm ci --no-audit --no-fund --silent && touch node_modules/.package-lock.json) || \
			echo "==> cannot install asciinema's parser: the test that plays recordings is skipped"; \
	fi

# Kubernetes' JavaScript and Python clients, which a test each runs. Without one, its test
# is skipped.
CLIENT_NODE := $(TOOLS)/client-node/node_modules/.package-lock.json

client-node:
	@if [ ! -e $(CLIENT_NODE) ] || [ $(TOOLS)/client-node/package-lock.json -nt $(CLIENT_NODE) ]; then \
		echo "==> installing Kubernetes' JavaScript client with npm, once"; \
		(cd $(TOOLS)/client-node && npm ci --no-audit --no-fund --silent && touch node_modules/.package-lock.json) || \
			echo "==> cannot install Kubernetes' JavaScript client: its test is skipped"; \
	fi

client-python:
	@if /usr/bin/python3 -c 'import kubernetes' 2>/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "==> installing Kubernetes' Python client from Debian's packages, once"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -qq && apt-get install -yqq --no-install-recommends python3-kubernetes >/dev/null || \
			echo "==> cannot install Kubernetes' Python client: its test is skipped"; \
	else \
		echo "==> no Kubernetes' Python client, and installing it needs apt-get and root: its test is skipped"; \
	fi

# A browser for the tests of web pages, from Debian's packages where possible. Without
# one, these tests are skipped.
BROWSERS := chromium-headless-shell chromium chromium-browser google-chrome

browser:
	@for browser in $(BROWSERS); do command -v $$browser >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "==> installing Chromium from Debian's packages, once, for the tests of web pages"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -qq && apt-get install -yqq --no-install-recommends chromium-headless-shell fonts-dejavu-core >/dev/null || \
			echo "==> cannot install Chromium: the tests of web pages in a browser are skipped"; \
	else \
		echo "==> no Chromium, and installing it needs apt-get and root: the tests of web pages in a browser are skipped"; \
	fi

# What a real node consists of, for tests and for those who start one themselves.
node: node-note $(addprefix $(BIN)/,$(NODE_PARTS)) ## build and unpack what a real Kubernetes node consists of (once)

node-note:
	@$(if $(NODE_REASON),echo "==> no real node: $(NODE_REASON); pods are processes of this machine",:)

assets-note:
	@$(if $(ASSETS_NOTE),echo "==> $(ASSETS_NOTE)",:)

# One name in front of two replicas needs a machine that is on the tailnet.
REPLICAS ?= 1

demo: assets-note $(DEMO_PARTS) $(if $(NODE_REASON),,node) $(if $(filter-out 1,$(REPLICAS)),$(BIN)/tailscaled) ## start the lab and show who may do what; ONCE=1 stops after the table; REPLICAS=2: one name, one replica killed, kubectl going on (needs root)
	cd lab && go run ./cmd/demo $(if $(filter-out 0,$(ONCE)),-once) $(if $(filter-out 1,$(REPLICAS)),-replicas $(REPLICAS))

# A first run mostly compiles. Debug information and vet take a good part of that and
# are not needed here: make lint vets.
TEST_FLAGS := -vet=off -gcflags=all=-dwarf=false -ldflags=-w

# Caddy 2.11 has a harmless data race: the wrapper that reverse_proxy puts around a
# request's body counts what is read and looks at the count when the body is closed,
# and an API server that answers early makes two goroutines do both at once. The race
# detector would fail whichever test is running. So it runs with an overlay of the one
# file, in which it does not watch these two methods. If a new Caddy has changed them,
# this target fails; the overlay may then be unnecessary.
#
# Go refuses overlays of files in the module cache. So the overlay also has both go.mod
# files with Caddy replaced by a symbolic link to its folder in the module cache.
RACE := $(abspath $(BIN))/race

$(RACE)/overlay.json: go.mod lab/go.mod Makefile
	@rm -rf $(RACE) && mkdir -p $(RACE)/lab
	@ln -s "$$(go list -m -f '{{.Dir}}' $(CADDY))" $(RACE)/caddy
	@for dir in . lab; do go mod edit -print -replace=$(CADDY)=$(RACE)/caddy $$dir/go.mod > $(RACE)/$$dir/go.mod || exit 1; done
	@proxy=modules/caddyhttp/reverseproxy/reverseproxy.go && \
	sed 's|^func (b \*bodyNopCloserIfNotRead)|//go:norace\n&|' $(RACE)/caddy/$$proxy > $(RACE)/reverseproxy.go && \
	if [ "$$(grep -c '^//go:norace' $(RACE)/reverseproxy.go)" != 2 ]; then echo "==> Caddy's bodyNopCloserIfNotRead has changed: see the Makefile's comment" >&2; exit 1; fi && \
	printf '{"Replace": {"%s": "%s", "%s": "%s", "%s": "%s"}}\n' $(RACE)/caddy/$$proxy $(RACE)/reverseproxy.go \
		$(CURDIR)/go.mod $(RACE)/go.mod $(CURDIR)/lab/go.mod $(RACE)/lab/go.mod > $@

# The lab's tests depend on processes that Go's test cache does not see, hence -count=1.
test: components $(RACE)/overlay.json ## run every test with the race detector
	@failed=; \
	echo "==> go test -race ./..."; \
	go test -race -overlay=$(RACE)/overlay.json $(TEST_FLAGS) ./... || failed="$$failed root"; \
	echo "==> (in s3) go test -race ./..."; \
	(cd s3 && go test -race $(TEST_FLAGS) ./...) || failed="$$failed s3"; \
	echo "==> (in lab) go test -race -count=1 -timeout $(LAB_TEST_TIMEOUT) ./..."; \
	(cd lab && go test -race -overlay=$(RACE)/overlay.json -count=1 $(TEST_FLAGS) -timeout $(LAB_TEST_TIMEOUT) ./...) || failed="$$failed lab"; \
	if [ -n "$$failed" ]; then echo "==> tests failed in:$$failed"; exit 1; fi; \
	echo "==> all tests passed"

# The end-to-end tests again, now under constrained impersonation, and those that take
# minutes. make test runs them with the older verb and with the race detector, which
# is off here: one of the long tests would hit another race of Caddy's.
test-long: components ## run the end-to-end tests under constrained impersonation, with those that take minutes
	cd lab && go test -count=1 $(TEST_FLAGS) -timeout 45m -v ./e2e -long -constrained
	cd lab && go test -count=1 $(TEST_FLAGS) -timeout 45m -v ./replicas -long
	cd lab && go test -count=1 $(TEST_FLAGS) -timeout 45m -v ./install -long

# What the chart's tests run, which are a part of make test and make test-long. Without a
# real node, no pod of it runs.
CHART_PARTS := $(addprefix $(BIN)/,$(KUBERNETES_PARTS) clusterrole-aggregation headscale helm servicemonitors.yaml)
ifeq ($(NODE_REASON),)
CHART_PARTS += node
endif

chart-test: assets-note node-note $(CHART_PARTS) ## test the Helm chart with Helm and the API server, and on a real node, as root
	cd lab && go test -count=1 $(TEST_FLAGS) ./chart
	cd lab && go test -count=1 $(TEST_FLAGS) -timeout 45m -v ./install -long

conformance: $(DEMO_PARTS) ## attack the plugin, also in the ways in which other such proxies have failed
	cd lab && go run ./cmd/conformance

conformance-mutants: $(DEMO_PARTS) ## remove each line that security depends on, one at a time: a test or an attack must fail
	cd lab && go run ./cmd/conformance-mutants

# The packages whose mutants are tried, all by default, and the branch that CHANGED=1
# compares with.
PKG  ?=
BASE ?= main

mutants: ## change the code that security rests on, one line at a time: a test must fail; PKG=impersonate for one package, CHANGED=1 for lines that differ from BASE (main)
	cd lab && go run ./cmd/mutants $(if $(PKG),-packages "$(PKG)") $(if $(filter-out 0,$(CHANGED)),-changed $(BASE))

# Kubernetes' own tests, and what they run in pods.
KUBETEST_PARTS := $(addprefix $(BIN)/,e2e.test ginkgo agnhost sample-apiserver)

# all, or ci for a part of a few minutes.
PART ?= all

kubernetes-conformance: $(DEMO_PARTS) node $(KUBETEST_PARTS) ## run Kubernetes' own tests directly and through the plugin (hours; PART=ci: minutes); needs root
	cd lab && go build -o .bin/kubernetes-conformance ./cmd/kubernetes-conformance && .bin/kubernetes-conformance -part $(PART)

# How long each fuzz target runs.
FUZZTIME ?= 60s
FUZZ_TARGETS := .:FuzzRequest impersonate:FuzzStripClient impersonate:FuzzIdentity impersonate:FuzzParseTarget impersonate:FuzzLimit impersonate:FuzzDeviceUser impersonate:FuzzChoose internal/requestinfo:FuzzParse internal/sessionrecording:FuzzFrames internal/transport:FuzzPath

fuzz: ## run every fuzz target for FUZZTIME (default 60s)
	@for target in $(FUZZ_TARGETS); do \
		echo "==> fuzzing $${target#*:} for $(FUZZTIME)"; \
		go test -run '^$$' -fuzz "^$${target#*:}$$" -fuzztime $(FUZZTIME) ./$${target%:*} || exit 1; \
	done

bench: $(DEMO_PARTS) ## measure what a request costs, compared with the alternatives; writes docs/performance.md
	cd lab && go build -o .bin/bench ./cmd/bench && .bin/bench

# How long the attacks last.
SOAKTIME ?= 10m

soak: $(DEMO_PARTS) ## attack the proxy from 100 devices for SOAKTIME (default 10m), beside 20 that must not notice
	cd lab && go build -o .bin/soak ./cmd/soak && go build -trimpath -ldflags "-s -w" -o .bin/caddy-standin ./cmd/caddy && .bin/soak -duration $(SOAKTIME)

lint: $(BIN)/golangci-lint $(BIN)/actionlint ## run the linters on all modules and on the workflows
	@failed=; \
	echo "==> actionlint"; \
	$(BIN)/actionlint -shellcheck= -pyflakes= .github/workflows/*.yml || failed="$$failed workflows"; \
	for dir in . s3 lab; do \
		echo "==> (in $$dir) golangci-lint run"; \
		(cd $$dir && "$(CURDIR)/$(BIN)/golangci-lint" run --allow-parallel-runners --config "$(CURDIR)/.golangci.yml" ./...) || failed="$$failed $$dir"; \
	done; \
	if [ -n "$$failed" ]; then echo "==> lint failed in:$$failed"; exit 1; fi

xcaddy: $(BIN)/xcaddy ## build Caddy with the plugin through xcaddy, and check that it has the plugin's modules
	@echo "==> xcaddy build $(CADDY_VERSION) --with $(MODULE) --with $(MODULE)/s3"
	$(BIN)/xcaddy build $(CADDY_VERSION) --with $(MODULE)@v0.0.0=$(CURDIR) --with $(MODULE)/s3@v0.0.0=$(CURDIR)/s3 --output $(BIN)/caddy
	@$(BIN)/caddy list-modules > $(BIN)/caddy.modules
	@for module in $(MODULES_WANTED); do \
		grep -qx "$$module" $(BIN)/caddy.modules || { echo "==> $(BIN)/caddy lacks module $$module"; exit 1; }; \
		echo "==> $(BIN)/caddy has $$module"; \
	done

# docs/releasing.md says how a release uses these targets.
IMAGE_FLAGS = -twice $(if $(CADDY_AMD64),-caddy amd64=$(abspath $(CADDY_AMD64))) $(if $(CADDY_ARM64),-caddy arm64=$(abspath $(CADDY_ARM64))) $(if $(VERSION),-version $(VERSION))

image: ## build the container image for amd64 and arm64, twice, into lab/.bin/image; without CADDY_AMD64 and CADDY_ARM64 it has the lab's stand-in for caddy-tailscale
	cd lab && go run ./cmd/image $(IMAGE_FLAGS)
	cd lab && go test -count=1 $(TEST_FLAGS) ./cmd/image

CADDY_TAILSCALE         := github.com/tailscale/caddy-tailscale
CADDY_TAILSCALE_VERSION := $(shell sed -n 's/^ARG CADDY_TAILSCALE_VERSION=//p' xcaddy.Dockerfile)

# A release takes the plugin by its version, so that Caddy says which it has and the path of
# the working copy is not part of its bytes.
release-caddy: $(BIN)/xcaddy ## build Caddy with caddy-tailscale and the plugin for the image, into lab/.bin/release; the plugin of VERSION, or of the working copy; with the storage in S3 if WITH_S3=1
	@for arch in amd64 arm64; do \
		echo "==> xcaddy build $(CADDY_VERSION) for $$arch"; \
		GOOS=linux GOARCH=$$arch CGO_ENABLED=0 $(BIN)/xcaddy build $(CADDY_VERSION) \
			--with $(CADDY_TAILSCALE)@$(CADDY_TAILSCALE_VERSION) \
			--with $(MODULE)@$(if $(VERSION),$(VERSION),v0.0.0=$(CURDIR)) \
			$(if $(filter-out 0,$(WITH_S3)),--with $(MODULE)/s3@$(if $(VERSION),$(VERSION),v0.0.0=$(CURDIR)/s3)) \
			--output $(BIN)/release/caddy-linux-$$arch || exit 1; \
	done

clean: ## remove everything that was built, and what runs of the lab left
	rm -rf $(BIN) lab/.run

$(BIN)/etcd: $(TOOLS)/etcd/go.mod $(TOOLS)/etcd/go.sum
	$(call build,etcd,etcd,go.etcd.io/etcd/server/v3,20 seconds)

# Without the version, the server reports v0.0.0-master.
$(BIN)/kube-apiserver: $(TOOLS)/kubernetes/go.mod $(TOOLS)/kubernetes/go.sum
	$(call build,kube-apiserver,kubernetes,k8s.io/kubernetes/cmd/kube-apiserver,4 minutes,-X k8s.io/component-base/version.gitVersion=$(KUBERNETES_VERSION))

$(BIN)/kubectl: $(TOOLS)/kubernetes/go.mod $(TOOLS)/kubernetes/go.sum
	$(call build,kubectl,kubernetes,k8s.io/kubernetes/cmd/kubectl,1 minute,-X k8s.io/component-base/version.gitVersion=$(KUBERNETES_VERSION))

# Kubernetes' own tests, their runner, and what they run in pods: from the same version as the
# API server, which they have to match. The tests are a test binary. They choose some of what they
# create by the two numbers of their version, which are stamped apart from it.
KUBERNETES_NUMBERS := $(subst ., ,$(KUBERNETES_VERSION:v%=%))
E2E_STAMP          := $(foreach stamp,gitVersion=$(KUBERNETES_VERSION) gitMajor=$(word 1,$(KUBERNETES_NUMBERS)) gitMinor=$(word 2,$(KUBERNETES_NUMBERS)),-X k8s.io/component-base/version.$(stamp))

$(BIN)/e2e.test: build_command = go test -c
$(BIN)/e2e.test: $(TOOLS)/kubernetes/go.mod $(TOOLS)/kubernetes/go.sum
	$(call build,e2e.test,kubernetes,k8s.io/kubernetes/test/e2e,12 minutes,$(E2E_STAMP))

$(BIN)/ginkgo: $(TOOLS)/kubernetes/go.mod $(TOOLS)/kubernetes/go.sum
	$(call build,ginkgo,kubernetes,github.com/onsi/ginkgo/v2/ginkgo,15 seconds)

$(BIN)/agnhost: $(TOOLS)/kubernetes/go.mod $(TOOLS)/kubernetes/go.sum
	$(call build,agnhost,kubernetes,k8s.io/kubernetes/test/images/agnhost,1 minute)

$(BIN)/sample-apiserver: $(TOOLS)/kubernetes/go.mod $(TOOLS)/kubernetes/go.sum
	$(call build,sample-apiserver,kubernetes,k8s.io/sample-apiserver,1 minute)

# kubelet, kube-proxy, kube-controller-manager and kube-scheduler.
$(BIN)/kubernetes-node: $(TOOLS)/kubernetes/go.mod $(TOOLS)/kubernetes/go.sum $(wildcard $(TOOLS)/kubernetes/kubernetes-node/*.go)
	$(call build,kubernetes-node,kubernetes,./kubernetes-node,3 minutes,-X k8s.io/component-base/version.gitVersion=$(KUBERNETES_VERSION))

# The first process of every pod on a real node.
$(BIN)/pause: lab/cmd/pause/main.go
	@mkdir -p $(BIN)
	cd lab && go build -trimpath -ldflags "-s -w" -o .bin/pause ./cmd/pause

# Debian's packages, unpacked rather than installed: nothing of this machine changes.
# A list of packages that is out of date is one reason why they cannot be downloaded.
$(BIN)/debian/.unpacked: lab/node/packages.txt
	@echo "==> unpacking containerd, runc and others from Debian's packages, once"
	@rm -rf $(BIN)/debian $(BIN)/debian.new && mkdir -p $(BIN)/debian.new/packages
	@cd $(BIN)/debian.new/packages && \
	{ apt-get -qq -o APT::Sandbox::User=root download $(DEBIAN_PACKAGES) || \
	{ apt-get -qq update && apt-get -qq -o APT::Sandbox::User=root download $(DEBIAN_PACKAGES); }; } && \
	for package in *.deb; do dpkg -x "$$package" .. || exit 1; done
	@rm -rf $(BIN)/debian.new/packages $(BIN)/debian.new/usr/share && mv $(BIN)/debian.new $(BIN)/debian && touch $@

# The only controller that the lab runs without a real node, from Kubernetes' own package.
$(BIN)/clusterrole-aggregation: $(TOOLS)/kubernetes/go.mod $(TOOLS)/kubernetes/go.sum $(wildcard $(TOOLS)/kubernetes/clusterrole-aggregation/*.go)
	$(call build,clusterrole-aggregation,kubernetes,./clusterrole-aggregation,10 seconds)

$(BIN)/headscale: $(TOOLS)/headscale/go.mod $(TOOLS)/headscale/go.sum
	$(call build,headscale,headscale,github.com/juanfont/headscale/cmd/headscale,90 seconds)

$(BIN)/helm: $(TOOLS)/helm/go.mod $(TOOLS)/helm/go.sum
	$(call build,helm,helm,helm.sh/helm/v4/cmd/helm,1 minute)

$(BIN)/tailscaled: $(TOOLS)/tailscaled/go.mod $(TOOLS)/tailscaled/go.sum
	$(call build,tailscaled,tailscaled,tailscale.com/cmd/tailscaled,3 minutes)

$(BIN)/promql: $(TOOLS)/prometheus/go.mod $(TOOLS)/prometheus/go.sum $(wildcard $(TOOLS)/prometheus/promql/*.go)
	$(call build,promql,prometheus,./promql,40 seconds)

# The ServiceMonitor of the Prometheus operator, as a CustomResourceDefinition.
OPERATOR := github.com/prometheus-operator/prometheus-operator

$(BIN)/servicemonitors.yaml: $(TOOLS)/prometheus-operator/go.mod $(TOOLS)/prometheus-operator/go.sum
	@mkdir -p $(BIN)
	cd $(TOOLS)/prometheus-operator && go mod download $(OPERATOR) && \
	install -m 644 "$$(go list -m -f '{{.Dir}}' $(OPERATOR))/example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml" ../../.bin/servicemonitors.yaml

$(BIN)/versitygw: $(TOOLS)/versitygw/go.mod $(TOOLS)/versitygw/go.sum
	$(call build,versitygw,versitygw,github.com/versity/versitygw/cmd/versitygw,2 minutes)

$(BIN)/xcaddy: $(TOOLS)/xcaddy/go.mod $(TOOLS)/xcaddy/go.sum
	$(call build,xcaddy,xcaddy,github.com/caddyserver/xcaddy/cmd/xcaddy,10 seconds)

$(BIN)/actionlint: $(TOOLS)/actionlint/go.mod $(TOOLS)/actionlint/go.sum
	$(call build,actionlint,actionlint,github.com/rhysd/actionlint/cmd/actionlint,10 seconds)

$(BIN)/golangci-lint: $(TOOLS)/golangci-lint/go.mod $(TOOLS)/golangci-lint/go.sum
	$(call build,golangci-lint,golangci-lint,github.com/golangci/golangci-lint/v2/cmd/golangci-lint,4 minutes)
