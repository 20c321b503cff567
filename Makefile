# Everything a developer runs. `make demo` and `make test` need root: they make network namespaces.
SHELL   := /bin/bash
VERSION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
# Without golang.org/x/net/trace, which gRPC would take along: its HTML templates find methods by name, so the linker would keep every method of every type, and
# egret have 67 MB rather than 45. image/main.go and image/Dockerfile have it, too.
TAGS    := grpcnotrace
# The race detector wants the data plane tests to have time; a package that hangs is killed by this bound.
TIMEOUT := 15m
# The tests of ./integration mostly wait for what a cluster does: `make test` runs so many parts of them at once, in a lab each.
PARTS   := 1 2 3

# Everything is compiled in the one way of the binaries, for linters and tests as well: what they have in common is compiled once, which from an
# empty cache is minutes. -race alone needs cgo, and a way of its own. `make lint` vets: tests need not do that again.
export CGO_ENABLED := 0
export GOFLAGS     := $(filter-out -trimpath -tags=%,$(GOFLAGS)) -trimpath -tags=$(TAGS)
TEST := go test -vet=off
RACE := CGO_ENABLED=1 go test -vet=off -race

.PHONY: build image demo test test-unit test-integration $(PARTS:%=test-integration-%) test-integration-rest test-vm test-faults test-fuzz test-alerts test-schedules test-kubelet lint vulns generate kube tools clean

build:
	go build -ldflags '$(LDFLAGS)' -o bin/ ./cmd/egret ./cmd/egret-etcd ./cmd/egret-lab

# The image, without Docker: an archive for `ctr image import`, `docker load`, `skopeo copy oci-archive:` or `crane push`. Two builds of one commit
# have one digest. make image ARCH=amd64,arm64 REPOSITORY=registry.example/egret
ARCH       ?= $(shell go env GOARCH)
REPOSITORY ?= ghcr.io/egret-project/egret

image:
	mkdir -p bin
	go run -C image . -version $(VERSION) -revision $$(git rev-parse HEAD) -time $$(git show -s --format=%ct HEAD) -arch $(ARCH) \
		-name $(REPOSITORY):$(VERSION) -out $(CURDIR)/bin/egret-image.tar

# What the tests need beside Go: system packages, and a kube-apiserver and kube-proxy built from the Go module proxy.
tools:
	integration/tools

kube: tools
	integration/kube/build
	CGO_ENABLED=0 go build -C integration/etcd -trimpath -ldflags '-s -w' -o $(CURDIR)/bin/etcd-oldest

# It calls no program but kubectl, so it needs none of the tools. The network has time while egret is compiled.
demo:
	integration/kube/build fetch & fetched=$$!; \
		go build -ldflags '$(LDFLAGS)' -o bin/ ./cmd/egret ./cmd/egret-lab || { kill $$fetched; exit 1; }; wait $$fetched
	integration/kube/build demo
	bin/egret-lab demo

# What a test needs and did not find here, it must have found in test-vm. The programs that integration/tools lists are all that it finds.
test: export EGRET_NEEDS := $(CURDIR)/bin/needs
test:
	mkdir -p bin && rm -f $(EGRET_NEEDS)
	integration/tools bin/path
	env PATH=$(CURDIR)/bin/path $(MAKE) test-unit
	env PATH=$(CURDIR)/bin/path $(MAKE) -j3 --output-sync=target test-schedules test-alerts vulns
	env PATH=$(CURDIR)/bin/path $(MAKE) test-fuzz
	env PATH=$(CURDIR)/bin/path $(MAKE) test-vm
	env PATH=$(CURDIR)/bin/path $(MAKE) -j3 --output-sync=target test-integration test-faults
ifeq ($(EGRET_CI)$(wildcard /sys/fs/cgroup/cgroup.controllers),/sys/fs/cgroup/cgroup.controllers)
	@echo "test-kubelet is left out: the lab makes cgroups of version 1, and /sys/fs/cgroup has version 2"
else
	env PATH=$(CURDIR)/bin/path $(MAKE) test-kubelet
endif
	go run ./internal/need/needcheck $(EGRET_NEEDS)

# First the packages whose tests take minutes, half of which they wait; beside them the others compile and run, one more at once than there are
# processors. Without root, the tests that need network namespaces skip themselves here; as root they run.
SLOWEST := ./crdsync ./nft ./store ./ownership ./agent ./cmd/egret-etcd ./page

test-unit: tools kube
	$(RACE) -p $$(($$(nproc) + 1)) -shuffle=on -timeout $(TIMEOUT) $(SLOWEST) $$(go list ./... | grep -v /integration)
	cd image && $(TEST) -shuffle=on -timeout $(TIMEOUT) ./...

# Schedules of who owns an IP (docs/ownership.md), as many as SCHEDULES allows, from new seeds. They take what processor time others leave: `make test`
# has the alerts beside them, which mostly wait.
SCHEDULES ?= 3m

test-schedules:
	nice -n 19 $(TEST) -count=1 -v -timeout 0 ./ownership -run 'TestSchedules$$' -schedules-time $(SCHEDULES)

# What comes from outside (etcd, the kernel, the API server, files of a log), with bytes that nobody thought of, FUZZ of each. Bytes that show a fault
# are left in the package's testdata, where they are a test from then on. A number of runs (x) and no time: before Go 1.27, a time that ends may fail
# the test by "context deadline exceeded" (https://go.dev/issue/75804).
FUZZ ?= 20000x

test-fuzz:
	set -e; n=0; for file in $$(git grep -lE '^func Fuzz' -- '*_test.go'); do \
		for f in $$(sed -nE 's/^func (Fuzz[A-Za-z0-9]+).*/\1/p' $$file); do \
			$(TEST) ./$$(dirname $$file) -run NONE -fuzz "^$$f\$$" -fuzztime $(FUZZ); n=$$((n+1)); done; done; \
	[ $$n -gt 0 ] || { echo "no fuzz target was found"; exit 1; }

test-integration: $(PARTS:%=test-integration-%) test-integration-rest

$(PARTS:%=test-integration-%): test-integration-%: build kube
	$(TEST) -count=1 -shuffle=on -timeout 30m ./integration -part $*/$(words $(PARTS))

test-integration-rest: build kube
	$(TEST) -count=1 -shuffle=on -timeout 30m $$(go list ./integration/... | grep -v -e /integration$$ -e /faults -e /alerts -e /integration/kubelet)

# The tests of the packages that program the kernel, on Debian's kernel in a virtual machine: integration/vm/test.
test-vm: tools
	integration/vm/test

# Egret installed on a cluster of kubelets, upgraded, drained, restored, uninstalled: by the commands of docs/install.md. It needs cgroups v1: without,
# `make test` leaves it out, but in CI. make test-kubelet CNI=flannel: with flannel's manifest as its CNI; CNI=flannel-nftables: with EnableNFTables in it.
CNI ?= bridge

test-kubelet:
	@test ! -e /sys/fs/cgroup/cgroup.controllers || { echo "test-kubelet: the lab makes cgroups of version 1, and /sys/fs/cgroup has version 2:" \
		"boot the machine with systemd.unified_cgroup_hierarchy=0"; exit 1; }
	$(MAKE) build
	integration/tools bin/path
	integration/kube/build kubelet
	[ $(CNI) = bridge ] || integration/kube/flannel/build
	$(MAKE) image REPOSITORY=$(REPOSITORY)
	go run -C image . -version next -arch $(ARCH) -name $(REPOSITORY):next -out $(CURDIR)/bin/egret-image-next.tar
	env PATH=$(CURDIR)/bin/path $(TEST) -count=1 -v -timeout 20m ./integration/kubelet -image $(CURDIR)/bin/egret-image.tar -image-name $(REPOSITORY):$(VERSION) \
		-next-image $(CURDIR)/bin/egret-image-next.tar -next-tag next -cni $(CNI)

# Random faults for DURATION, under a probe every INTERVAL. A seed that failed: make test-faults SEED=<seed> ROUND=<round>.
DURATION ?= 2m
INTERVAL ?= 5ms
SEED     ?= 0
ROUND    ?= -1

test-faults: build kube
	$(TEST) -count=1 -v -timeout 0 ./integration/faults -seed $(SEED) -round $(ROUND) -time $(DURATION) -interval $(INTERVAL)

# Alerts fired by their faults, in a lab that a Prometheus scrapes: three minutes.
test-alerts: build kube
	$(TEST) -count=1 -v -timeout $(TIMEOUT) ./integration/alerts

lint:
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not gofmt:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	go vet -C manifests/render ./...
	go vet -C image ./...
	go tool staticcheck ./...

# Known vulnerabilities in what egret and egret-etcd are built of: integration/vulns/check. Like the schedules, it takes
# what processor time others leave.
vulns:
	nice -n 19 integration/vulns/check

generate:
	go generate ./...

clean:
	rm -rf bin
