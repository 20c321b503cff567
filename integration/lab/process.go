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
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// pollInterval is how often conditions are looked at that nothing reports: short against every wait of a lab.
const pollInterval = 50 * time.Millisecond

// The names of the lab's processes; an agent's is agent-<node>. Each has a file of that name in pids/ and in logs/.
const (
	serveProc    = "serve"
	etcdProc     = "etcd"
	kubeEtcdProc = "kube-etcd"
	apiProc      = "kube-apiserver"
	crdsyncProc  = "crdsync"
)

func agentProc(node string) string { return "agent-" + node }

// process is what tells one process from every other since the machine started.
type process struct {
	pid   int
	start uint64 // field 22 of /proc/<pid>/stat, clock ticks since boot
}

// self returns the calling process. Its identity stays the same over exec.
func self() (process, error) {
	_, start, err := stat(os.Getpid())
	return process{os.Getpid(), start}, err
}

// stat returns the state letter and the start time of a process (proc_pid_stat(5)).
func stat(pid int) (status byte, start uint64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// the name, in parentheses, may hold blanks and parentheses itself
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 20 {
		return 0, 0, fmt.Errorf("reading the state of process %d: %q", pid, b)
	}
	start, err = strconv.ParseUint(string(f[19]), 10, 64)
	return f[0][0], start, err
}

// status returns the state letter of the process, 0 when it has ended. A zombie has.
func (p process) status() byte {
	status, start, err := stat(p.pid)
	if err != nil || start != p.start || status == 'Z' || status == 'X' {
		return 0
	}
	return status
}

// signal sends a signal to the process, and to no other that has got its id since.
func (p process) signal(sig syscall.Signal) error {
	h, err := os.FindProcess(p.pid) // a pidfd: the process cannot be replaced from here on
	if err != nil {
		return err
	}
	defer h.Release()
	if p.status() == 0 {
		return os.ErrProcessDone
	}
	return h.Signal(sig)
}

func (p process) String() string { return fmt.Sprintf("%d %d\n", p.pid, p.start) }

// process returns the process of that name which runs; ok is false when none does.
func (l *Lab) process(name string) (p process, ok bool) {
	b, err := os.ReadFile(l.path("pids", name))
	if err != nil {
		return process{}, false
	}
	if _, err := fmt.Sscan(string(b), &p.pid, &p.start); err != nil {
		return process{}, false
	}
	return p, p.status() != 0
}

// processes returns the names of all that were started and not stopped, sorted, whether they still run or not.
func (l *Lab) processes() []string {
	files, _ := os.ReadDir(l.path("pids")) // no folder: nothing was started
	var names []string
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".new") {
			names = append(names, f.Name())
		}
	}
	sort.Strings(names)
	return names
}

// start runs a component in the background, detached, and returns when it is on record. It does nothing when the
// component runs. The child shares the caller's lock until it is on record: nobody finds the lab unlocked with a
// process that is not, even if the caller is killed meanwhile.
func (l *Lab) start(s *state, c component, files ...*os.File) error {
	if _, ok := l.process(c.proc); ok {
		return nil
	}
	log, err := os.OpenFile(l.path("logs", c.proc), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	ns := "-"
	if c.netns != "" {
		ns = netnsPath(l.netns(c.netns))
	}
	verb := "nsexec"
	if c.confined {
		verb = "confined"
	}
	cmd := exec.Command(l.cfg.Self, append([]string{verb, l.path("pids", c.proc), ns}, c.argv...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.Env = l.dir, log, log, environment()
	cmd.ExtraFiles = append([]*os.File{s.lock}, files...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", c.proc, err)
	}
	ended := make(chan struct{})
	// Only reaps: the process outlives this one as a rule, and the goroutine ends with it.
	go func() { cmd.Wait(); close(ended) }()
	for {
		if p, ok := l.process(c.proc); ok && p.pid == cmd.Process.Pid {
			return nil
		}
		select {
		case <-ended:
			return l.ended(c.proc)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// environment returns the caller's, without what would point the lab's programs at another cluster or at a proxy.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return strings.HasPrefix(name, "ETCD") || name == "EGRET_ETCD_PREFIX" || name == "KUBECONFIG" || strings.HasSuffix(strings.ToLower(name), "_proxy")
	})
}

// ended is the error that a process has ended which should run.
func (l *Lab) ended(name string) error {
	return fmt.Errorf("%s ended:\n%s", name, l.tail(name))
}

// tail returns the end of a process's log.
func (l *Lab) tail(name string) string {
	const lines = 15
	b, err := os.ReadFile(l.path("logs", name))
	if err != nil {
		return "  (" + err.Error() + ")"
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	all = all[max(0, len(all)-lines):]
	return "  " + name + ": " + strings.Join(all, "\n  "+name+": ")
}

// stop ends a process with SIGTERM, and with SIGKILL when it is still there after grace, and takes it off the record.
// It returns when the process is gone.
func (l *Lab) stop(ctx context.Context, name string, grace time.Duration) error {
	deadline := time.Now().Add(grace)
	sig := syscall.SIGTERM
	for sent := syscall.Signal(0); ; {
		p, ok := l.process(name)
		if !ok {
			break
		}
		if !time.Now().Before(deadline) {
			sig = syscall.SIGKILL
		}
		if sent != sig {
			// SIGCONT, for a frozen process takes no SIGTERM
			err := errors.Join(p.signal(sig), p.signal(syscall.SIGCONT))
			if err != nil && !errors.Is(err, os.ErrProcessDone) {
				return fmt.Errorf("stopping %s: %w", name, err)
			}
			sent = sig
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return fmt.Errorf("stopping %s: %w", name, err)
		}
	}
	if err := os.Remove(l.path("pids", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// wait returns when done says so. It fails when parent or one of the processes ends first, or
// after timeout with the end of their logs.
func (l *Lab) wait(parent context.Context, what string, timeout time.Duration, procs []string, done func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(parent, timeout)
	defer cancel()
	for {
		err := done(ctx)
		if err == nil {
			return nil
		}
		for _, name := range procs {
			if _, ok := l.process(name); !ok {
				return fmt.Errorf("waiting for %s: %w", what, l.ended(name))
			}
		}
		if sleep(ctx, pollInterval) != nil {
			if parent.Err() != nil { // interrupted: nobody asks what the logs say
				return fmt.Errorf("waiting for %s: %w", what, context.Cause(parent))
			}
			var tails strings.Builder
			for _, name := range procs {
				tails.WriteString("\n" + l.tail(name))
			}
			return fmt.Errorf("waiting for %s: %w: %w%s", what, context.Cause(ctx), err, tails.String())
		}
	}
}

// sleep waits for d, or returns why ctx ended.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// lockFD is where start passes the lock to its child; further files follow.
const lockFD = 3

// register puts the calling process on record in a pid file, and lets go of the lock with the next exec.
func register(path string) error {
	syscall.CloseOnExec(lockFD)
	p, err := self()
	if err != nil {
		return err
	}
	if err := writeFile(path, []byte(p.String())); err != nil {
		return fmt.Errorf("registering %s: %w", filepath.Base(path), err)
	}
	return nil
}
