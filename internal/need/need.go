package need

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Root is for a test that makes network namespaces, or needs root otherwise.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "needs root")
	}
	present(t)
}

// KubeProgram returns the path of a program of Kubernetes: in the folder that EGRET_KUBE_BIN names, or where `make
// kube` puts it.
func KubeProgram(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("EGRET_KUBE_BIN")
	if dir == "" {
		dir = kubeBin()
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		missing(t, fmt.Sprintf("needs %s: run `make kube`, or name its folder by EGRET_KUBE_BIN", name))
	}
	present(t)
	return path
}

// CgroupV1 is for a test of a lab with kubelets, which makes cgroups in hierarchies of version 1.
func CgroupV1(t testing.TB) {
	t.Helper()
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		missing(t, "needs cgroups of version 1 (cgroups(7)), and /sys/fs/cgroup has version 2: boot the machine with systemd.unified_cgroup_hierarchy=0")
	}
	present(t)
}

// began is where the test began: `go test` runs it in the folder of its package.
var began, _ = os.Getwd()

// kubeBin returns where `make kube` puts its programs, "" where it did not run.
func kubeBin() string {
	for dir := began; ; dir = filepath.Dir(dir) {
		found, _ := filepath.Glob(filepath.Join(dir, "bin/k8s-*/kube-apiserver")) // fails for a bad pattern only
		if len(found) > 0 {
			return filepath.Dir(found[len(found)-1])
		}
		if dir == filepath.Dir(dir) {
			return ""
		}
	}
}

// Chromium returns the path of the browser: of the program itself, since Debian's launcher calls many others.
func Chromium(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		missing(t, "needs chromium: integration/tools installs it")
	}
	if program := "/usr/lib/chromium/chromium"; exec.Command(program, "--version").Run() == nil {
		path = program
	}
	present(t)
	return path
}

// Dummy is for a test of dummy links.
func Dummy(t testing.TB) {
	t.Helper()
	kernel(t, "dummy links (CONFIG_DUMMY)", "ip link add dev d0 type dummy")
}

// VLAN is for a test of VLAN links.
func VLAN(t testing.TB) {
	t.Helper()
	kernel(t, "VLAN links (CONFIG_VLAN_8021Q)", "ip link add dev v0 type veth peer name v1", "ip link add link v0 name v0.1 type vlan id 1")
}

// VXLANGBP is for a test of an overlay with group policies.
func VXLANGBP(t testing.TB) {
	t.Helper()
	kernel(t, "VXLAN links with group policies (CONFIG_VXLAN)", "ip link add dev x0 type vxlan id 1 dstport 8479 gbp")
}

// Flowtable is for a test of flowtables.
func Flowtable(t testing.TB) {
	t.Helper()
	kernel(t, "flowtables (CONFIG_NF_FLOW_TABLE_INET)", "nft add table inet f", "nft add flowtable inet f f { hook ingress priority 0 ; devices = { lo } ; }")
}

// OwnedTables is for a test of nftables that outlive the socket that owns them, which the test itself has tried to
// make: nft(8) of Debian does not know them.
func OwnedTables(t testing.TB, made bool) {
	t.Helper()
	Root(t)
	if !made {
		skip(t, "needs a kernel with tables that outlive their owner (Linux 6.9)")
	}
}

// TCX is for a test of eBPF programs at links.
func TCX(t testing.TB) {
	t.Helper()
	Root(t)
	if _, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress}); err != nil {
		skip(t, fmt.Sprintf("needs a kernel with eBPF programs at links (Linux 6.6): %v", err))
	}
}

// Clock is for a test that sets the machine's clock.
func Clock(t testing.TB) {
	t.Helper()
	Root(t)
	if os.Getenv("EGRET_VM") == "" {
		skip(t, "needs a machine whose clock nobody else reads: integration/vm/run")
	}
}

// kernel looks for a feature by commands in a namespace of its own, so that it neither finds nor leaves anything in the
// test's.
func kernel(t testing.TB, feature string, lines ...string) {
	t.Helper()
	Root(t)
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the namespace ends with the thread
		err := unix.Unshare(unix.CLONE_NEWNET)
		for _, line := range lines {
			if err == nil {
				err = command(line)
			}
		}
		result <- err
	}()
	if err := <-result; errors.Is(err, exec.ErrNotFound) {
		t.Fatalf("looking for %s: %v", feature, err) // the kernel was not asked
	} else if err != nil {
		skip(t, fmt.Sprintf("needs a kernel with %s: %v", feature, err))
	}
}

func command(line string) error {
	f := strings.Fields(line)
	if out, err := exec.Command(f[0], f[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", line, err, bytes.TrimSpace(out))
	}
	return nil
}

// missing ends a test that needs what every machine can have.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("EGRET_CI") != "" {
		t.Fatal(what)
	}
	skip(t, what)
}

func skip(t testing.TB, why string) {
	t.Helper()
	record(t, "skipped", ": "+strings.ReplaceAll(why, "\n", " "))
	t.Skip(why)
}

// present records at the test's end that it ran: what it needs next may be missing.
func present(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		if !t.Skipped() {
			record(t, "ran", "")
		}
	})
}

// record appends a line in one write: tests of several processes do so at the same time.
func record(t testing.TB, what, why string) {
	t.Helper()
	path := os.Getenv("EGRET_NEEDS")
	if path == "" {
		return
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err == nil {
		info, _ := debug.ReadBuildInfo() // a test binary has it: its path is that of the package
		_, err = fmt.Fprintf(f, "%s %s %s%s\n", what, strings.TrimSuffix(info.Path, ".test"), t.Name(), why)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Errorf("recording what ran where: %v", err)
	}
}
