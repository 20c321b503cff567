// Package netns gives a test a network namespace of its own. Nothing of it reaches a binary.
package netns

import (
	"errors"
	"fmt"
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

// Current returns the namespace of the calling goroutine, to come back to with Switch.
func Current(t testing.TB) int {
	t.Helper()
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

// Switch moves the calling goroutine, which Enter has locked to its thread, into a namespace that Current returned.
func Switch(t testing.TB, ns int) {
	t.Helper()
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

// Do runs f on a thread of its own in a named namespace (ip-netns(8)). Sockets that f opens, and commands that it starts, are in it;
// goroutines that it starts are not.
func Do(name string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		done <- func() error {
			ns, err := os.Open("/run/netns/" + name)
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("entering network namespace %s: %w", name, err)
			}
			return f()
		}()
	}()
	return <-done
}

// notFound is a shell's exit status when it knows no program of the name.
const notFound = 127

// OK reports whether a command line, split at white space, ends with status 0 in a named namespace. A program that is not there is no
// answer: the test fails and names it, as it does when the namespace is not there.
func OK(t testing.TB, name, line string) bool {
	t.Helper()
	f := strings.Fields(line)
	var out []byte
	err := Do(name, func() (err error) {
		out, err = exec.Command(f[0], f[1:]...).CombinedOutput()
		return err
	})
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || exit != nil && exit.ExitCode() == notFound {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return err == nil
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
