package netns

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Keep takes all capabilities but these from the calling goroutine, which Enter has locked to its thread, and from what
// it starts: for good, and so for the rest of the test. Threads are made by the runtime with those of another thread,
// so other goroutines keep theirs.
func Keep(t testing.TB, capabilities ...int) {
	t.Helper()
	keep := map[int]bool{}
	for _, c := range capabilities {
		keep[c] = true
	}
	for c := range unix.CAP_LAST_CAP + 1 {
		if keep[c] {
			continue
		}
		// an older kernel does not know it
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && err != unix.EINVAL {
			t.Fatalf("dropping capability %d: %v", c, err)
		}
	}
	var set [2]unix.CapUserData
	for c := range keep {
		set[c/32].Permitted |= 1 << (c % 32)
		set[c/32].Effective |= 1 << (c % 32)
	}
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &set[0]); err != nil {
		t.Fatalf("dropping capabilities: %v", err)
	}
}

// Container gives the calling goroutine, which Enter has locked to its thread, and what it starts, what a container
// that is not privileged has in the network of its node: these capabilities, and /proc/sys read-only. It returns where
// a bind mount of /proc/sys/net is that can be written.
func Container(t testing.TB, capabilities ...int) (sysctl string) {
	t.Helper()
	sysctl, err := os.MkdirTemp("", "egret-sysctl-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // by another thread: for this one it is a mount
		removed := make(chan error)
		go func() { removed <- os.Remove(sysctl) }()
		if err := <-removed; err != nil {
			t.Error(err)
		}
	})
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatalf("making a mount namespace: %v", err)
	}
	for _, m := range []struct {
		source, target string
		flags          uintptr
	}{
		{"none", "/", unix.MS_PRIVATE | unix.MS_REC},
		{"/proc/sys/net", sysctl, unix.MS_BIND},
		{"/proc/sys", "/proc/sys", unix.MS_BIND},
		{"none", "/proc/sys", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	} {
		if err := unix.Mount(m.source, m.target, "", m.flags, ""); err != nil {
			t.Fatalf("mounting %s: %v", m.target, err)
		}
	}
	Keep(t, capabilities...)
	return sysctl
}
