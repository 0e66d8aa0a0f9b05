# SPDX-License-Identifier: Apache-2.0

# Everything a clone needs besides Go, make and a C compiler (for the race
# detector) is built here, once, into lab/.bin.

MODULE := github.com/tailscale-impersonate/caddy-tailscale-impersonate
BIN    := lab/.bin
TOOLS  := lab/tools

# The version of module $(2) in go.mod $(1): each pin stands in one place.
version_in = $(shell awk '$$1 == "$(2)" { print $$2 }' $(1))

CADDY_VERSION      := $(call version_in,go.mod,github.com/caddyserver/caddy/v2)
KUBERNETES_VERSION := $(call version_in,$(TOOLS)/kubernetes/go.mod,k8s.io/kubernetes)

# How long the lab's tests may take before they count as hung.
LAB_TEST_TIMEOUT ?= 20m

KUBERNETES_PARTS := etcd kube-apiserver kubectl
MODULES_WANTED   := admin.api.tailscale_impersonate http.handlers.tailscale_impersonate http.reverse_proxy.transport.kubernetes http.matchers.kubernetes

# KUBEBUILDER_ASSETS may name a folder with the parts of Kubernetes. One that
# lacks any of them is not used at all, as versions had better match.
ifneq ($(KUBEBUILDER_ASSETS),)
ASSETS_MISSING := $(foreach part,$(KUBERNETES_PARTS),$(if $(wildcard $(KUBEBUILDER_ASSETS)/$(part)),,$(part)))
ifeq ($(strip $(ASSETS_MISSING)),)
KUBERNETES_PARTS :=
ASSETS_NOTE := using etcd, kube-apiserver and kubectl from KUBEBUILDER_ASSETS=$(KUBEBUILDER_ASSETS)
else
unexport KUBEBUILDER_ASSETS
ASSETS_NOTE := not using KUBEBUILDER_ASSETS=$(KUBEBUILDER_ASSETS), it has no: $(ASSETS_MISSING)
endif
endif

# $(call build,name,tools module,package,time it takes,linker flags)
define build
	@mkdir -p $(BIN)
	@echo "==> building $(1) from $(TOOLS)/$(2), once; takes about $(4) when Go has nothing cached"
	@start=$$(date +%s) && \
	cd $(TOOLS)/$(2) && go build -trimpath -gcflags=all=-dwarf=false -ldflags "-w $(5)" -o ../../.bin/$(1).new $(3) && mv ../../.bin/$(1).new ../../.bin/$(1) && \
	echo "==> built $(1) in $$(( $$(date +%s) - start )) s"
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help components assets-note asciicast browser demo test test-long conformance conformance-mutants fuzz bench lint xcaddy clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# What the demo runs, and what only the tests run.
DEMO_PARTS := $(addprefix $(BIN)/,$(KUBERNETES_PARTS) clusterrole-aggregation headscale)
TEST_PARTS := $(addprefix $(BIN)/,helm tailscaled promql)

components: assets-note $(DEMO_PARTS) $(TEST_PARTS) browser asciicast ## build what the lab runs (once)

# asciinema's own parser, which the tests play recordings with. Without it, the test
# that does says that it is skipped.
ASCIICAST := $(TOOLS)/asciicast/node_modules/.package-lock.json

asciicast:
	@if [ ! -e $(ASCIICAST) ] || [ $(TOOLS)/asciicast/package-lock.json -nt $(ASCIICAST) ]; then \
		echo "==> installing asciinema's parser with npm, once"; \
		(cd $(TOOLS)/asciicast && npm ci --no-audit --no-fund --silent && touch node_modules/.package-lock.json) || \
			echo "==> it cannot be installed: the test that plays recordings with it is skipped"; \
	fi

# A browser for the tests of the whoami page: Debian's, where it can be installed.
# Without one, these tests say that they are skipped.
BROWSERS := chromium-headless-shell chromium chromium-browser google-chrome

browser:
	@for browser in $(BROWSERS); do command -v $$browser >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "==> installing Chromium from Debian's packages, once, for the tests of the whoami page"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -qq && apt-get install -yqq --no-install-recommends chromium-headless-shell fonts-dejavu-core >/dev/null || \
			echo "==> Chromium cannot be installed: the tests of the whoami page in a browser are skipped"; \
	else \
		echo "==> there is no Chromium, and no apt-get and root to install it with: the tests of the whoami page in a browser are skipped"; \
	fi

assets-note:
	@$(if $(ASSETS_NOTE),echo "==> $(ASSETS_NOTE)",:)

demo: assets-note $(DEMO_PARTS) ## bring the lab up and show who may do what; ONCE=1 stops after the table
	cd lab && go run ./cmd/demo $(if $(filter-out 0,$(ONCE)),-once)

# Most of a first run is compiling. Debugger information, and vet on every
# dependency, are a good part of that and of no use here: make lint vets.
TEST_FLAGS := -vet=off -gcflags=all=-dwarf=false -ldflags=-w

# Caddy 2.11 has a data race of its own, without consequence: reverse_proxy counts
# what is read of a request's body, and looks at the count when the body is closed,
# which an API server that answers early makes two goroutines do at once. It would
# fail whatever test is running. So the race detector is run with a copy of that
# Caddy in which these two methods are not watched; they are compiled as they are.
# A Caddy that has changed them fails here, and may not need this.
RACE := $(abspath $(BIN))/race

$(RACE)/stamp: go.mod go.sum lab/go.mod lab/go.sum Makefile
	@rm -rf $(RACE) && mkdir -p $(RACE)
	@cp -r "$$(go list -m -f '{{.Dir}}' github.com/caddyserver/caddy/v2)" $(RACE)/caddy && chmod -R u+w $(RACE)/caddy
	@proxy=$(RACE)/caddy/modules/caddyhttp/reverseproxy/reverseproxy.go && \
	sed -i 's|^func (b \*bodyNopCloserIfNotRead)|//go:norace\n&|' $$proxy && \
	if [ "$$(grep -c '^//go:norace' $$proxy)" != 2 ]; then echo "==> Caddy's bodyNopCloserIfNotRead is not what it was: see what the Makefile says about it" >&2; exit 1; fi
	@for module in . lab; do \
		mkdir -p $(RACE)/$$module && cp $$module/go.mod $$module/go.sum $(RACE)/$$module/ && \
		go mod edit -replace=github.com/caddyserver/caddy/v2=$(RACE)/caddy $(RACE)/$$module/go.mod || exit 1; \
	done
	@touch $@

# The lab's outcomes depend on processes that Go's test cache knows nothing about.
test: components $(RACE)/stamp ## run every test with the race detector
	@failed=; \
	echo "==> go test -race ./..."; \
	go test -race -modfile=$(RACE)/go.mod $(TEST_FLAGS) ./... || failed="$$failed root"; \
	echo "==> (in lab) go test -race -count=1 -timeout $(LAB_TEST_TIMEOUT) ./..."; \
	(cd lab && go test -race -modfile=$(RACE)/lab/go.mod -count=1 $(TEST_FLAGS) -timeout $(LAB_TEST_TIMEOUT) ./...) || failed="$$failed lab"; \
	if [ -n "$$failed" ]; then echo "==> tests failed in:$$failed"; exit 1; fi; \
	echo "==> all tests passed"

# All end-to-end tests again, and those that take minutes, under constrained
# impersonation; make test has had the older verb, and the race detector, with which
# one of these would show a race of Caddy's own.
test-long: components ## run the end-to-end tests under constrained impersonation, with those that take minutes
	cd lab && go test -count=1 $(TEST_FLAGS) -timeout 45m -v ./e2e -long -constrained

conformance: $(DEMO_PARTS) ## attack the plugin in every way that such proxies are known to fail
	cd lab && go run ./cmd/conformance

conformance-mutants: $(DEMO_PARTS) ## take away each line that security rests on, one at a time, and see a test or an attack notice
	cd lab && go run ./cmd/conformance-mutants

# Each fuzz target for that long.
FUZZTIME ?= 60s
FUZZ_TARGETS := .:FuzzRequest impersonate:FuzzStripClient impersonate:FuzzIdentity impersonate:FuzzParseTarget guard:FuzzLimit apirequest:FuzzParse transport:FuzzPath

fuzz: ## run every fuzz target for FUZZTIME (default 60s)
	@for target in $(FUZZ_TARGETS); do \
		echo "==> fuzzing $${target#*:} for $(FUZZTIME)"; \
		go test -run '^$$' -fuzz "^$${target#*:}$$" -fuzztime $(FUZZTIME) ./$${target%:*} || exit 1; \
	done

bench: $(DEMO_PARTS) ## measure what a request costs, beside the alternatives; writes docs/performance.md
	cd lab && go build -o .bin/bench ./cmd/bench && .bin/bench

lint: $(BIN)/golangci-lint ## run the linters over both modules
	@failed=; \
	for dir in . lab; do \
		echo "==> (in $$dir) golangci-lint run"; \
		(cd $$dir && "$(CURDIR)/$(BIN)/golangci-lint" run --config "$(CURDIR)/.golangci.yml" ./...) || failed="$$failed $$dir"; \
	done; \
	if [ -n "$$failed" ]; then echo "==> lint failed in:$$failed"; exit 1; fi

xcaddy: $(BIN)/xcaddy ## build Caddy with the plugin through xcaddy, and look for its modules
	@echo "==> xcaddy build $(CADDY_VERSION) --with $(MODULE)"
	$(BIN)/xcaddy build $(CADDY_VERSION) --with $(MODULE)@v0.0.0=$(CURDIR) --output $(BIN)/caddy
	@$(BIN)/caddy list-modules > $(BIN)/caddy.modules
	@for module in $(MODULES_WANTED); do \
		grep -qx "$$module" $(BIN)/caddy.modules || { echo "==> $(BIN)/caddy has no module $$module"; exit 1; }; \
		echo "==> $(BIN)/caddy has $$module"; \
	done

clean: ## remove everything that was built, and what lab runs left
	rm -rf $(BIN) lab/.run

$(BIN)/etcd: $(TOOLS)/etcd/go.mod $(TOOLS)/etcd/go.sum
	$(call build,etcd,etcd,go.etcd.io/etcd/server/v3,20 seconds)

# Without the version the server calls itself v0.0.0-master.
$(BIN)/kube-apiserver: $(TOOLS)/kubernetes/go.mod $(TOOLS)/kubernetes/go.sum
	$(call build,kube-apiserver,kubernetes,k8s.io/kubernetes/cmd/kube-apiserver,4 minutes,-X k8s.io/component-base/version.gitVersion=$(KUBERNETES_VERSION))

$(BIN)/kubectl: $(TOOLS)/kubernetes/go.mod $(TOOLS)/kubernetes/go.sum
	$(call build,kubectl,kubernetes,k8s.io/kubernetes/cmd/kubectl,1 minute,-X k8s.io/component-base/version.gitVersion=$(KUBERNETES_VERSION))

# The one controller the lab runs, from Kubernetes' own package.
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

$(BIN)/xcaddy: $(TOOLS)/xcaddy/go.mod $(TOOLS)/xcaddy/go.sum
	$(call build,xcaddy,xcaddy,github.com/caddyserver/xcaddy/cmd/xcaddy,10 seconds)

$(BIN)/golangci-lint: $(TOOLS)/golangci-lint/go.mod $(TOOLS)/golangci-lint/go.sum
	$(call build,golangci-lint,golangci-lint,github.com/golangci/golangci-lint/v2/cmd/golangci-lint,4 minutes)
