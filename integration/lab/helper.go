package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The main goroutine stays on the main thread. An exec by any other would show the process as a zombie for a moment,
// which is how the lab tells one that has ended.
func init() { runtime.LockOSThread() }

// Helper makes the calling program one of the lab's background processes when args, os.Args, ask for that, and returns
// its exit status; ok is false, at once, in every other case. A program that calls Up calls it first thing in main (a
// test: in TestMain):
//
//	if status, ok := lab.Helper(os.Args); ok {
//		os.Exit(status)
//	}
func Helper(args []string) (status int, ok bool) {
	if len(args) < 3 {
		return 0, false
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var err error
	switch args[1] {
	case "nsexec": // PIDFILE NETNS CMD...
		err = nsexec(args[2:], func([]string) error { return nil })
	case "confined": // PIDFILE NETNS CMD...
		err = nsexec(args[2:], func(argv []string) error { return confine(capabilities(argv)) })
	case "serve": // LAB
		err = serve(ctx, args[2])
	case "etcd": // NAME DATADIR CLIENTURL PEERURL CLUSTER
		err = runEtcd(ctx, args[2:])
	case "node": // LAB NODE
		err = runNode(ctx, args[2], args[len(args)-1])
	case "node-init": // LAB NODE
		err = initNode(args[2], args[len(args)-1])
	default:
		return 0, false
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "egret-lab: %s: %v\n", args[1], err)
		return 1, true
	}
	return 0, true
}

// nsexec becomes a command in a network namespace, after confine with that command; the process id stays. "-" stands
// for no pid file, and for no other namespace. PATH is searched before the namespace is entered.
func nsexec(args []string, confine func(argv []string) error) error {
	if len(args) < 3 {
		return fmt.Errorf("want PIDFILE NETNS CMD..., got %q", args)
	}
	pidFile, netns, argv := args[0], args[1], args[2:]
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	runtime.LockOSThread() // where main did not call: exec keeps the namespaces of the thread that calls it
	if netns != "-" {
		if err := enterWithSysfs(netns); err != nil {
			return err
		}
	}
	if pidFile != "-" {
		if err := register(pidFile); err != nil {
			return err
		}
	}
	if err := confine(argv); err != nil {
		return err
	}
	return fmt.Errorf("running %s: %w", path, syscall.Exec(path, argv, os.Environ()))
}

// enterWithSysfs moves the calling thread into a network namespace, with a /sys that shows it, as `ip netns exec` does:
// /sys/class/net shows the namespace of whoever mounted it.
func enterWithSysfs(netns string) error {
	if err := enterNetns(netns); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("making a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "none", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("keeping mounts apart: %w", err)
	}
	_ = unix.Unmount("/sys", unix.MNT_DETACH) // where it cannot go, the new one covers it
	if err := unix.Mount(strings.TrimPrefix(netns, netnsDir+"/"), "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mounting sysfs: %w", err)
	}
	return nil
}
