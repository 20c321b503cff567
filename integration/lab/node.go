package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// restartDelay is how long after its end a service of a node is started again, as its unit of systemd has it.
const restartDelay = 2 * time.Second

// runNode is the process of a node with a kubelet, from outside: it starts PID 1 of the node in namespaces of its own
// and waits for its end. When this process dies, in whatever way, all that runs on the node dies at once, as when the
// power goes.
func runNode(ctx context.Context, name, node string) error {
	l, _, err := load(name)
	if err != nil {
		return err
	}
	if _, err := l.NodeNumber(node); err != nil {
		return err
	}
	if err := enterNetns(netnsPath(l.netns(node))); err != nil { // the main thread: see init of helper.go
		return err
	}
	cmd := exec.CommandContext(ctx, l.cfg.Self, "node-init", name, node)
	cmd.Dir, cmd.Stdout, cmd.Stderr = l.dir, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL, // of the main thread, which ends with the process
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting PID 1 of %s: %w", node, err)
	}
	if err := writeFile(l.path(node, "init"), []byte(strconv.Itoa(cmd.Process.Pid))); err != nil {
		return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("PID 1 of %s ended: %w", node, err)
}

// nodeInit returns the process id of PID 1 of a node that runs.
func (l *Lab) nodeInit(node string) (int, error) {
	if _, ok := l.process(kubeletProc(node)); !ok {
		return 0, fmt.Errorf("%s does not run", node)
	}
	b, err := os.ReadFile(l.path(node, "init"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(b))
}

// NodeRoot returns where the file system of a node with a kubelet is, as it is until the node's end.
func (l *Lab) NodeRoot(node string) (string, error) {
	pid, err := l.nodeInit(node)
	return fmt.Sprintf("/proc/%d/root", pid), err
}

// initNode is PID 1 of a node: it gives the node a file system with folders of its own where kubelet and containerd
// write, starts them, and starts again what ends.
func initNode(name, node string) error {
	l, _, err := load(name)
	if err != nil {
		return err
	}
	n, err := l.NodeNumber(node)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Sethostname([]byte(node)), l.mountNode(node)); err != nil {
		return fmt.Errorf("preparing %s: %w", node, err)
	}
	bin := func(elem ...string) string { return filepath.Join(append([]string{l.cfg.KubeBin}, elem...)...) }
	path := []string{bin("debian/usr/bin"), bin("debian/usr/sbin"), os.Getenv("PATH")}
	if err := os.Setenv("PATH", strings.Join(path, ":")); err != nil {
		return err
	}
	var ips []string
	for _, ip := range NodeIPs(n) {
		ips = append(ips, ip.String())
	}
	services := [][]string{
		{bin("debian/usr/bin/containerd"), "--config", l.path(node, "containerd.toml")},
		{
			bin("kubelet"), "--config=" + l.path(node, "kubelet.yaml"), "--kubeconfig=" + l.path(node, "kubeconfig"),
			"--hostname-override=" + node, "--node-ip=" + strings.Join(ips, ","),
		},
		{
			bin("kube-proxy"), "--kubeconfig=" + l.path("kubeconfig.control"), "--proxy-mode=nftables", "--hostname-override=" + node,
			// what is of the machine is left as it is
			"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s",
		},
	}
	return l.supervise(node, services)
}

// supervise runs the services and reaps every process of the node that has no other parent. It returns only when it
// can start none.
func (l *Lab) supervise(node string, services [][]string) error {
	var mu sync.Mutex // guards running, which is right only with what is started meanwhile
	running := map[int][]string{}
	launch := func(argv []string) error {
		mu.Lock()
		defer mu.Unlock()
		log, err := os.OpenFile(l.path("logs", filepath.Base(argv[0])+"-"+node), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		defer log.Close()
		p, err := os.StartProcess(argv[0], argv, &os.ProcAttr{Dir: "/", Files: []*os.File{nil, log, log}})
		if err != nil {
			return err
		}
		running[p.Pid] = argv
		return p.Release() // reaped below, with all others
	}
	for _, argv := range services {
		if err := launch(argv); err != nil {
			return err
		}
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("waiting for the processes of %s: %w", node, err)
		}
		mu.Lock()
		argv, ok := running[pid]
		delete(running, pid)
		mu.Unlock()
		if !ok {
			continue
		}
		service := filepath.Base(argv[0])
		fmt.Fprintf(os.Stderr, "%s of %s ended: %v\n", service, node, status)
		go func() {
			for {
				time.Sleep(restartDelay)
				if _, err := os.Stat(l.heldFile(node, service)); err == nil {
					continue
				}
				err := launch(argv)
				if err == nil {
					return
				}
				fmt.Fprintf(os.Stderr, "starting %s of %s again: %v\n", service, node, err)
			}
		}()
	}
}

// heldFile is there while a service of a node is not to be started again.
func (l *Lab) heldFile(node, service string) string { return l.path(node, "held-"+service) }

// KillServices kills services of a node with a kubelet, "kubelet", "containerd" or "kube-proxy", and returns when they
// are gone. They stay so until RestartServices. What containerd has started runs on.
func (l *Lab) KillServices(ctx context.Context, node string, services ...string) error {
	init, err := l.nodeInit(node)
	if err != nil {
		return err
	}
	for _, service := range services {
		if err := os.WriteFile(l.heldFile(node, service), nil, 0o600); err != nil {
			return err
		}
		pid, err := childNamed(init, service)
		if err != nil {
			return fmt.Errorf("killing %s of %s: %w", service, node, err)
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			return fmt.Errorf("killing %s of %s: %w", service, node, err)
		}
		for err == nil {
			if err := sleep(ctx, 5*time.Millisecond); err != nil {
				return fmt.Errorf("waiting for the end of %s of %s: %w", service, node, err)
			}
			_, err = childNamed(init, service)
		}
	}
	return nil
}

// RestartServices has the services of a node start again that KillServices killed: within 2 s, restartDelay.
func (l *Lab) RestartServices(node string, services ...string) error {
	var errs []error
	for _, service := range services {
		errs = append(errs, os.Remove(l.heldFile(node, service)))
	}
	return errors.Join(errs...)
}

// childNamed returns the child of a process that has a name (proc_pid_stat(5)). The list of children that /proc has of a
// process may leave some out while others end.
func childNamed(parent int, name string) (int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	for _, file := range files {
		stat, _ := os.ReadFile(file) // it may have ended
		rest, named := bytes.CutPrefix(stat[bytes.IndexByte(stat, ' ')+1:], []byte("("+name+") "))
		if fields := bytes.Fields(rest); named && len(fields) > 1 && string(fields[1]) == strconv.Itoa(parent) {
			return strconv.Atoi(filepath.Base(filepath.Dir(file)))
		}
	}
	return 0, fmt.Errorf("process %d has no child %s", parent, name)
}

// machineSysctls are settings of the whole machine that a kubelet writes: on a node they are files.
var machineSysctls = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
	"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
}

// mountNode makes the file system of a node from that of the machine, in the mount namespace of the caller: with
// folders in memory where a kubelet and containerd write, so that nothing of them is on the machine's disk, and the
// lab's own folder where it was.
func (l *Lab) mountNode(node string) error {
	var errs []error
	mount := func(source, target, kind string, flags uintptr) {
		if err := unix.Mount(source, target, kind, flags, ""); err != nil {
			errs = append(errs, fmt.Errorf("mounting %s at %s: %w", source, target, err))
		}
	}
	mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC)
	// A copy of a named network namespace would keep it alive after its end.
	for _, dir := range slices.Backward(mountsBelow(netnsDir + "/")) {
		_ = unix.Unmount(dir, unix.MNT_DETACH) // where it cannot go, it is hidden below
	}
	mount("proc", "/proc", "proc", 0)
	keep := "/var/lib/egret-lab"
	mount("tmpfs", "/var/lib", "tmpfs", 0)
	mount("tmpfs", "/var/log", "tmpfs", 0)
	errs = append(errs, os.MkdirAll(keep, 0o700))
	mount(l.dir, keep, "", unix.MS_BIND)
	mount("tmpfs", "/run", "tmpfs", 0)
	errs = append(errs, os.MkdirAll(l.dir, 0o700), os.MkdirAll(netnsDir, 0o755))
	mount(keep, l.dir, "", unix.MS_BIND)
	if l.cfg.flannel() {
		errs = append(errs, l.makeFlannelFolders())
	}
	if err := unix.Unmount(keep, unix.MNT_DETACH); err != nil {
		errs = append(errs, fmt.Errorf("unmounting %s: %w", keep, err))
	}
	errs = append(errs, os.Remove(keep))
	errs = append(errs, os.MkdirAll(l.path(node, "sysctl"), 0o700))
	for _, name := range machineSysctls {
		file := l.path(node, "sysctl", strings.ReplaceAll(name, "/", "."))
		b, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		errs = append(errs, err, os.WriteFile(file, b, 0o600))
		mount(file, filepath.Join("/proc/sys", name), "", unix.MS_BIND)
	}
	mount("", "/", "", unix.MS_SHARED|unix.MS_REC)
	return errors.Join(errs...)
}

// mountsBelow returns the mount points whose paths begin with prefix, in the order in which they were mounted
// (proc_pid_mounts(5)).
func mountsBelow(prefix string) []string {
	b, _ := os.ReadFile("/proc/self/mounts") // nothing is unmounted then, which costs memory alone
	var dirs []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], prefix) {
			dirs = append(dirs, f[1])
		}
	}
	return dirs
}
