// Package netns gives a test a network namespace of its own. Nothing of it reaches a binary.
package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/need"
)

// Enter moves the calling goroutine into a new network namespace in which lo is up, and IPv6 addresses are there at
// once, without duplicate address detection. It needs root (need.Root). The goroutine stays locked to its thread, and
// the thread ends with the goroutine, so the namespace goes away with the test. Commands started by the goroutine, and
// sockets opened by it, are in the namespace; those of other goroutines, subtests included, are not.
func Enter(t testing.TB) {
	t.Helper()
	need.Root(t)
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("making a network namespace: %v", err)
	}
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0) // not there without IPv6
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatalf("setting lo up: %v", err)
	}
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

// Do runs f on a thread of its own in a named namespace (ip-netns(8)). Sockets that f opens, and commands that it
// starts, are in it; goroutines that it starts are not.
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

// OK reports whether a command line, split at white space, ends with status 0 in a named namespace. A program that is
// not there is no answer: the test fails and names it, as it does when the namespace is not there.
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

// Run runs a command line, split at white space, in the namespace of the calling goroutine and returns what it printed.
// The test fails when the command does.
func Run(t testing.TB, line string) string {
	t.Helper()
	f := strings.Fields(line)
	out, err := exec.Command(f[0], f[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// sysctl does what sysctl(8) does for key=value: of a key whose first separator is a dot, the slashes are dots.
func sysctl(setting string) error {
	key, value, _ := strings.Cut(setting, "=")
	if i := strings.IndexAny(key, "./"); i >= 0 && key[i] == '.' {
		key = strings.NewReplacer(".", "/", "/", ".").Replace(key)
	}
	return os.WriteFile("/proc/sys/"+key, []byte(value), 0)
}

// inBatch begins a line that ip(8) or bridge(8) takes in a batch.
var inBatch = regexp.MustCompile(`^(ip(?: -[46])?|bridge) (?:link|addr|route|rule|neigh|fdb) `)

// Batch gives lines, without the name of the program, to one process of ip or bridge in the namespace of the calling
// goroutine, and returns what it prints: on an emulated machine a process takes longer than what it is started for.
func Batch(program string, lines ...string) (string, error) {
	f := append(strings.Fields(program), "-batch", "-")
	c := exec.Command(f[0], f[1:]...)
	c.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	out, err := c.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s of\n%s: %w\n%s", strings.Join(f, " "), strings.Join(lines, "\n"), err, out)
	}
	return string(out), nil
}

// RunAll runs lines of commands, as Run, in a named namespace; "": that of the calling goroutine. Lines of ip or bridge
// that follow each other are one process, and `sysctl -qw` is none.
func RunAll(t testing.TB, name, lines string) {
	t.Helper()
	in := func(f func() error) error { return f() }
	if name != "" {
		in = func(f func() error) error { return Do(name, f) }
	}
	if err := in(func() error { return runAll(lines) }); err != nil {
		t.Fatal(err)
	}
}

func runAll(lines string) error {
	program, batch := "", []string(nil)
	end := func() (err error) {
		if len(batch) > 0 {
			_, err = Batch(program, batch...)
		}
		batch = nil
		return err
	}
	for line := range strings.Lines(lines) {
		line = strings.TrimSpace(line)
		is := inBatch.FindStringSubmatch(line)
		if is == nil || is[1] != program {
			if err := end(); err != nil {
				return err
			}
		}
		if is != nil {
			program = is[1]
			batch = append(batch, line[len(program):])
		} else if err := runOne(strings.Fields(line)); err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
	}
	return end()
}

// runOne runs a command; none is no error.
func runOne(f []string) error {
	switch {
	case len(f) == 0:
		return nil
	case len(f) > 2 && f[0] == "sysctl" && f[1] == "-qw":
		for _, setting := range f[2:] {
			if err := sysctl(setting); err != nil {
				return err
			}
		}
		return nil
	}
	out, err := exec.Command(f[0], f[1:]...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, out)
	}
	return err
}
