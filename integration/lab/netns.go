package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2 keeps named namespaces: what the lab makes works with `ip netns`.
const netnsDir = "/run/netns"

// netnsPath returns the path of a named namespace. One that has no name here is named by its path.
func netnsPath(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(netnsDir, name)
}

// onThread runs f on a thread of its own, which ends with it: whatever f did to its namespaces touches nothing else.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread is spoilt, and the runtime ends it with the goroutine
		done <- f()
	}()
	return <-done
}

// inNetns runs f on a thread in the named namespace. Sockets that f makes stay in it; goroutines that f starts are not
// in it.
func inNetns(name string, f func() error) error {
	return onThread(func() error {
		if err := enterNetns(netnsPath(name)); err != nil {
			return err
		}
		return f()
	})
}

// enterNetns moves the calling thread.
func enterNetns(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("entering a network namespace: %w", err)
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering network namespace %s: %w", path, err)
	}
	return nil
}

// createNetns makes a named namespace, as `ip netns add` does.
func createNetns(name string) error {
	err := onThread(func() error {
		if err := shareNetnsDir(); err != nil {
			return err
		}
		f, err := os.OpenFile(netnsPath(name), os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
		if err != nil {
			return err
		}
		f.Close()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", netnsPath(name), "none", unix.MS_BIND, "")
	})
	if err != nil {
		return fmt.Errorf("making network namespace %s: %w", name, err)
	}
	return nil
}

// shareNetnsDir makes netnsDir a shared mount, so that the end of a namespace reaches processes with mounts of their
// own: they would keep it alive.
func shareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	dir, err := os.Open(netnsDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	// as iproute2: a second bind mount would hide the first
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	if err := unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	return unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
}

// deleteNetns removes a named namespace; nil when there is none. The namespace itself ends with its last process and
// socket.
func deleteNetns(name string) error {
	err := unix.Unmount(netnsPath(name), unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // EINVAL: a file, but not mounted
		return fmt.Errorf("unmounting network namespace %s: %w", name, err)
	}
	if err := os.Remove(netnsPath(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing network namespace %s: %w", name, err)
	}
	return nil
}

// In runs f on a thread of its own in a network namespace of the lab: "node", "pod", "outside", "control" or "lan".
// Sockets that f opens and commands that it starts are in the namespace; goroutines that it starts are not.
func (l *Lab) In(kind, name string, f func() error) error {
	ns, err := l.target(kind, name)
	if err != nil {
		return err
	}
	return inNetns(ns, f)
}

// target returns the namespace that a kind and a name stand for.
func (l *Lab) target(kind, name string) (string, error) {
	switch kind {
	case "node":
		if _, err := l.NodeNumber(name); err != nil {
			return "", err
		}
		return l.netns(name), nil
	case "pod":
		s, err := l.read()
		if err != nil {
			return "", err
		}
		if l.cfg.Kubelet {
			return l.sandbox(name)
		}
		if _, ok := s.Pods[name]; !ok {
			return "", fmt.Errorf("pod %q: lab %q has no such pod, want namespace/name", name, l.cfg.Name)
		}
		return l.netns(podNetns(name)), nil
	case "outside", "control", "lan":
		if name != "" {
			return "", fmt.Errorf("%s %q: there is one, it has no name", kind, name)
		}
		return l.netns(kind), nil
	}
	return "", fmt.Errorf("%q: want pod, node, outside, control or lan", kind)
}
