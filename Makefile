# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors

GO      ?= go
BIN     := build/bin
VERSION ?= 0.1.0-dev
LDFLAGS := -s -w -X github.com/muster-vm/muster/internal/version.Version=$(VERSION)
LINT    := build/tools/golangci-lint
# Named in one place; see docs/adr for why the versions are pinned.
LINT_VERSION := v2.15.0

.PHONY: help build check test e2e demo docs lint clean

help: ## show this list
	@grep -hE '^[a-z0-9]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

build: ## build the three programs into build/bin
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/muster ./cmd/musterd ./cmd/muster-guard

check: ## formatting, vet and lint
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "not gofmt'ed:"; echo "$$out"; exit 1; }
	$(GO) vet ./...
	$(MAKE) lint

lint: $(LINT) ## golangci-lint
	$(LINT) run --allow-parallel-runners ./...

$(LINT):
	@mkdir -p build/tools
	GOBIN=$(CURDIR)/build/tools $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINT_VERSION)

test: ## everything that CI runs
	scripts/test

e2e: build ## integration tests with real QEMU and a real failover
	$(GO) test -count=1 ./node/...
	scripts/demo --check

demo: ## three hosts, a guest, a power cut
	scripts/demo

docs: build ## regenerate the reference pages
	$(GO) run ./cmd/muster docs --dir docs/reference

clean: ## remove what was built (a running demo: scripts/demo --down)
	rm -rf build/bin build/tools
