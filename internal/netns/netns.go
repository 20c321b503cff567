// Package netns gives a test a network namespace of its own. Nothing of it reaches a binary.
package netns

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/need"
)

// Enter moves the calling goroutine into a new network namespace in which lo is up, and IPv6 addresses are there at once, without
// duplicate address detection. It needs root (need.Root). The goroutine stays locked to its thread, and the thread ends with the goroutine,
// so the namespace goes away with the test. Commands started by the goroutine, and sockets opened by it, are in the namespace; those of
// other goroutines, subtests included, are not.
func Enter(t testing.TB) {
	t.Helper()
	need.Root(t)
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("making a network namespace: %v", err)
	}
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0) // not there without IPv6
	Run(t, "ip link set lo up")
}

// Run runs a command line, split at white space, in the namespace of the calling goroutine and returns what it printed. The test
// fails when the command does.
func Run(t testing.TB, line string) string {
	t.Helper()
	f := strings.Fields(line)
	out, err := exec.Command(f[0], f[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}
