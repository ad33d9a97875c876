# Keyhaven. `make help` lists the targets.

# The newest stable Go compiles everything here. go.mod names it; where the installed Go is older, it fetches that
# toolchain through the module proxy, as it does any other module.
export GOTOOLCHAIN ?= $(shell sed -n 's/^toolchain //p' go.mod)+auto
GO ?= go
# How long each fuzz target runs.
FUZZTIME ?= 5s
# Of make chaos.
ROUNDS ?= 4
DURATION ?= 0s
SEED ?= 0
# What packages are made for.
PACKAGE_ARCHS ?= amd64 386 arm64 armhf armel armv6
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK = golang.org/x/vuln/cmd/govulncheck@v1.8.0
# What is built, and the time that stands for now in it: the same source gives the same bytes. Both can be set.
ifndef VERSION
VERSION = $(eval VERSION := $$(shell $(GO) run ./packaging/release version))$(VERSION)
endif
ifndef SOURCE_DATE_EPOCH
SOURCE_DATE_EPOCH = $(eval SOURCE_DATE_EPOCH := $$(shell $(GO) run ./packaging/release epoch))$(SOURCE_DATE_EPOCH)
endif
LDFLAGS = -s -w -X github.com/keyhaven/keyhaven/internal/cli.release=$(VERSION)
# Flags of every program that leaves this tree.
GOBUILD = $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)'

# Of make containers; those of the key server are made for this machine's architecture alone.
CONTAINER_ARCHS ?= $(shell $(GO) env GOARCH)

.DEFAULT_GOAL := help
.PHONY: help setup build demo demo-check test unit netns lockorder chaos idle upgrade browser interop peer transit reliability fuzz lint vuln bench image image-lock image-e2e image-cuts image-check packages repo packages-check install-site binaries binaries-check containers containers-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what tests and demo need and the machine lacks (SoftHSM2, curl, openssl, iproute2, …)
	@./scripts/setup

build: ## compile the three programs into bin/
	CGO_ENABLED=1 $(GOBUILD) -o bin/keyhaven-keyserver ./cmd/keyserver
	CGO_ENABLED=0 $(GOBUILD) -o bin/keyhaven-connector ./cmd/connector
	CGO_ENABLED=0 $(GOBUILD) -o bin/keyhaven-edge ./cmd/edge

bin/keyhaven-demo: build
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./demo

demo: setup bin/keyhaven-demo ## run a whole installation with its keys in SoftHSM2, until Ctrl-C
	@bin/keyhaven-demo

demo-check: setup bin/keyhaven-demo ## the same without a person: a line for each check, exit code 0 or 1
	@bin/keyhaven-demo --check

test: setup unit netns ## all tests, with the race detector

unit: ## the tests that need no namespaces
	$(GO) test -race ./...

netns: ## the tests over network namespaces (as root, or in a user namespace)
	@$(GO) build -race -o /dev/null ./cmd/keyserver ./cmd/connector ./cmd/edge ./demo # fetches what the namespace cannot
	@$(GO) test -race -tags netns -run '^$$' ./internal/testnet ./integration >/dev/null
	./scripts/rootless $(GO) test -race -count=1 -tags netns ./internal/testnet ./integration

lockorder: ## whether tests take two mutexes in both orders, in PACKAGES or everywhere
	@GO="$(GO)" ./scripts/lockorder $(PACKAGES)

chaos: ## faults at random for ROUNDS rounds, or for DURATION; SEED repeats a run
	@$(GO) build -race -o /dev/null ./cmd/keyserver ./cmd/connector ./cmd/edge
	@$(GO) test -race -tags netns -run '^$$' ./integration/chaos >/dev/null
	./scripts/rootless $(GO) test -race -count=1 -tags netns -timeout 0 -v ./integration/chaos -rounds $(ROUNDS) -duration $(DURATION) -seed $(SEED)

idle: ## what 10,000 idle WebSockets and UDP sessions cost (netns has the same test with 1,000)
	KEYHAVEN_FULL=1 ./scripts/rootless $(GO) test -count=1 -tags netns -timeout 20m -run TestIdle -v ./integration

upgrade: ## the programs of the previous minor version, built from the history, beside the present ones
	@$(GO) build -race -o /dev/null ./cmd/keyserver ./cmd/connector ./cmd/edge ./demo
	@$(GO) test -race -tags 'netns upgrade' -run '^$$' ./integration >/dev/null
	./scripts/rootless $(GO) test -race -count=1 -tags 'netns upgrade' -run 'Upgrade|RollingRestart|OldConfigurations' -v ./integration

browser: ## the tests with a real browser, over HTTP/2 and HTTP/3 (installs Chromium)
	@./scripts/setup browser
	./scripts/rootless $(GO) test -race -count=1 -tags 'netns browser' -run Browser -v ./integration

interop: peer transit ## against the other implementations: the two targets below

peer: setup ## our key server and client against the existing client and key server of the protocol
	cd interop/gokeyless && $(GO) vet ./... && $(GO) test -race -count=1 ./...

transit: ## the Transit backend against Vault's own engine
	cd interop/vault && $(GO) vet ./... && $(GO) test -race -count=1 ./...

reliability: setup ## the fault matrix, with its table written into docs/reliability.md
	$(GO) run ./reliability/cmd/matrix

fuzz: ## each fuzz target for FUZZTIME
	@GO="$(GO)" ./scripts/fuzz $(FUZZTIME)

lint: ## gofmt, go vet, staticcheck
	@bad=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$bad" ]; then echo "gofmt would change:"; echo "$$bad"; exit 1; fi
	$(GO) vet ./...
	$(GO) vet -tags 'netns browser upgrade packages image' ./packaging/... ./images/... ./internal/testnet ./integration/...
	$(GO) run $(STATICCHECK) -tags netns,browser,upgrade,packages,image ./...
	cd interop/vault && $(GO) run $(STATICCHECK) ./...
	cd bench/peers && $(GO) vet ./...
	@if cd interop/gokeyless && $(GO) mod download github.com/cloudflare/gokeyless >/dev/null 2>&1; then $(GO) run $(STATICCHECK) -tags pkcs11 ./...; fi

vuln: ## known vulnerabilities in what is reachable from our code (needs the vulnerability database's host)
	$(GO) run $(GOVULNCHECK) ./...

bench: setup build ## measure, print a table and JSON lines
	$(GO) run ./bench

# The machine that QEMU plays in image-e2e: arm64, armhf and amd64 are generic ones, raspi3b and raspi0 are Pis; and in the
# tests of updates, mistakes and power cuts, for which the fastest does.
BOARD ?= arm64
CUTS_BOARD ?= amd64
image_arch_raspi3b = arm64
image_arch_raspi0 = armel
image_arch = $(or $(image_arch_$(1)),$(1))
# A test of images: its pattern and the machine.
define image-test
./scripts/setup image-tests
$(MAKE) image ARCH=$(call image_arch,$(2))
$(GO) build -o /dev/null ./cmd/keyserver ./cmd/connector ./cmd/edge ./demo # fetches what the namespace cannot
$(GO) test -tags image -run '^$$' ./images/rpi/qemu >/dev/null
./scripts/rootless $(GO) test -count=1 -tags image -timeout 0 -v -run '$(1)' ./images/rpi/qemu -board $(2) -kernel $(or $(KERNEL),stable)
endef

image: ## the card's image for ARCH (arm64, armhf, armel, amd64), with update, checksums, bill of materials, Imager's entry
	@./scripts/setup image
	@GO='$(GO)' VERSION='$(VERSION)' SOURCE_DATE_EPOCH='$(SOURCE_DATE_EPOCH)' ./images/rpi/build

image-lock: ## pin the Debian packages of images to what the mirror has now
	@./scripts/setup image
	@./images/rpi/lock/renew

image-e2e: ## boot the image in BOARD, a machine of QEMU: a visitor of an edge gets pictures of its camera
	$(call image-test,TestPetCam|TestSizes,$(BOARD))

image-cuts: ## cut the power of CUTS_BOARD at many points of an update and of the first boot
	$(call image-test,TestCuts|TestKills,$(CUTS_BOARD))

image-check: image-e2e ## all tests of images: every architecture, mistakes, updates, power cuts, reproducibility (hours)
	$(call image-test,TestMistakes|TestClock|TestBroken|TestFull|TestRefused|TestBadSlots,$(CUTS_BOARD))
	$(MAKE) image-cuts
	$(MAKE) image-e2e BOARD=arm64 KERNEL=backports
	$(MAKE) image-e2e BOARD=armhf
	$(MAKE) image-e2e BOARD=raspi3b
	$(MAKE) image-e2e BOARD=raspi0
	./images/rpi/check-reproducible

packages: ## deb and rpm packages of PACKAGE_ARCHS into dist/packages, with checksums, signature and bills of materials
	@./scripts/setup packages $(if $(filter-out amd64,$(PACKAGE_ARCHS)),packages-foreign)
	@$(GO) run ./packaging/release key --dir dist/keys
	rm -rf dist/packages
	@GO='$(GO)' VERSION='$(VERSION)' SOURCE_DATE_EPOCH='$(SOURCE_DATE_EPOCH)' PACKAGE_ARCHS='$(PACKAGE_ARCHS)' ./packaging/nfpm/build dist/packages

repo: packages ## the signed apt and yum repository in dist/repo, for a web server at REPO_URL
	@GO='$(GO)' ./packaging/repo/build dist/packages dist/repo

packages-check: ## install, upgrade and refuse packages of PACKAGE_ARCHS with real apt and dnf, in trees of their own
	@./scripts/setup packages packages-check $(if $(filter-out amd64,$(PACKAGE_ARCHS)),packages-foreign)
	@GO='$(GO)' PACKAGE_ARCHS='$(PACKAGE_ARCHS)' ./packaging/test/check

binaries: ## static programs for every system into dist/bin, or those that BINARIES names, with checksums, signature and bill of materials
	@rm -rf dist/bin
	@GO='$(GO)' VERSION='$(VERSION)' SOURCE_DATE_EPOCH='$(SOURCE_DATE_EPOCH)' ./packaging/release/binaries dist/bin

install-site: binaries repo ## what an edge serves at /install.sh (docs/install-script.md), in dist/install
	@GO='$(GO)' ./packaging/site/build dist/bin dist/repo dist/install

binaries-check: binaries ## build the connector twice, and run the programs for Linux under QEMU
	@./scripts/setup binaries
	$(GO) test -count=1 -tags packages -timeout 0 -v ./packaging/release

containers: ## images of the programs for CONTAINER_ARCHS as OCI archives into dist/containers, without root
	@./scripts/setup containers
	@rm -rf dist/containers
	@GO='$(GO)' VERSION='$(VERSION)' SOURCE_DATE_EPOCH='$(SOURCE_DATE_EPOCH)' CONTAINER_ARCHS='$(CONTAINER_ARCHS)' ./packaging/container/build dist/containers

containers-check: containers ## run them: a connector joins an edge, a key server loads SoftHSM2's module
	$(GO) test -count=1 -tags packages -timeout 10m -v ./packaging/container

clean: ## remove what the targets made
	rm -rf bin build dist
