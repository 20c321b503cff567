package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// Name returns the lab's name.
func (l *Lab) Name() string { return l.cfg.Name }

// EgretPath returns the path of the program egret.
func (l *Lab) EgretPath() string { return l.cfg.Egret }

// Kubeconfig returns the path of the kubeconfig of a cluster admin, for programs on this machine.
func (l *Lab) Kubeconfig() string { return l.path("kubeconfig") }

// KubeProgram returns the path of a program that integration/kube/build made.
func (l *Lab) KubeProgram(name string) string { return filepath.Join(l.cfg.KubeBin, name) }

// DialEtcd returns a client of Egret's etcd that is back within half a second of an outage's end, however long that
// was. Who calls it closes it.
func (l *Lab) DialEtcd() (*clientv3.Client, error) {
	c, err := clientv3.New(clientv3.Config{Endpoints: l.EtcdEndpoints(), Logger: zap.NewNop(), DialOptions: []grpc.DialOption{grpc.WithConnectParams(
		grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 400 * time.Millisecond}})}})
	if err != nil {
		return nil, fmt.Errorf("making a client of etcd: %w", err)
	}
	return c, nil
}

// EtcdEndpoints returns the members of Egret's etcd as host:port, for programs on this machine.
func (l *Lab) EtcdEndpoints() []string {
	var all []string
	for _, port := range l.ports.Etcd {
		all = append(all, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port)).String())
	}
	return all
}

// KubeEtcdEndpoint returns the API server's etcd as host:port, for programs on the control host.
func (l *Lab) KubeEtcdEndpoint() string { return fmt.Sprintf("127.0.0.1:%d", kubeEtcdPort) }

// GossipKeyFile returns the path of the key that all agents gossip with.
func (l *Lab) GossipKeyFile() string { return l.path(gossipKey) }

// Command returns a command that runs in a network namespace of the lab (see In), not started.
func (l *Lab) Command(ctx context.Context, kind, name string, argv ...string) (*exec.Cmd, error) {
	args, err := l.execArgs(kind, name, argv)
	if err != nil {
		return nil, err
	}
	return exec.CommandContext(ctx, l.cfg.Self, args...), nil
}

// PID returns the id of a process that runs: one of those of LogFile.
func (l *Lab) PID(process string) (int, error) {
	p, ok := l.process(process)
	if !ok {
		return 0, l.ended(process)
	}
	return p.pid, nil
}

// LogFile returns the path of a process's log: etcd or its members, kube-etcd, kube-apiserver, crdsync, serve,
// agent-<node>.
func (l *Lab) LogFile(process string) string { return l.path("logs", process) }

// Panics returns what the logs of crdsync and the agents say that they must never say: panics, and what the race
// detector found.
func (l *Lab) Panics() error {
	logs := []string{crdsyncProc}
	for _, n := range l.nodes() {
		logs = append(logs, agentProc(NodeName(n)))
	}
	var errs []error
	for _, process := range logs {
		log, err := os.ReadFile(l.LogFile(process))
		if err != nil {
			errs = append(errs, err)
		}
		for _, word := range []string{"panic: ", "fatal error: ", "WARNING: DATA RACE"} {
			if i := bytes.Index(log, []byte(word)); i >= 0 {
				errs = append(errs, fmt.Errorf("%s: %s", process, log[i:min(i+4000, len(log))]))
			}
		}
	}
	return errors.Join(errs...)
}

// Exec runs a command in a network namespace of the lab (see In) and returns its standard output. The error of a
// command that fails is an *exec.ExitError, wrapped with what it wrote to standard error.
func (l *Lab) Exec(ctx context.Context, kind, name string, argv ...string) ([]byte, error) {
	cmd, err := l.execArgs(kind, name, argv)
	if err != nil {
		return nil, err
	}
	if _, err := exec.LookPath(argv[0]); err != nil { // which is no command's failure
		return nil, err
	}
	return run(exec.CommandContext(ctx, l.cfg.Self, cmd...), argv)
}

// ExecReplace makes the calling process the command, in a network namespace of the lab; it returns only when that
// fails. PATH is searched here.
func (l *Lab) ExecReplace(kind, name string, argv ...string) error {
	cmd, err := l.execArgs(kind, name, argv)
	if err != nil {
		return err
	}
	return nsexec(cmd[1:], func([]string) error { return nil })
}

func (l *Lab) execArgs(kind, name string, argv []string) ([]string, error) {
	ns, err := l.target(kind, name)
	if err != nil {
		return nil, err
	}
	if len(argv) == 0 {
		return nil, fmt.Errorf("no command to run in %s %s", kind, name)
	}
	return append([]string{"nsexec", "-", netnsPath(ns)}, argv...), nil
}

// Kubectl runs kubectl on this machine as the lab's cluster admin and returns its standard output; errors are as those
// of Exec.
func (l *Lab) Kubectl(ctx context.Context, args ...string) ([]byte, error) {
	cmd, err := l.KubectlCommand(ctx, args...)
	if err != nil {
		return nil, err
	}
	return run(cmd, append([]string{"kubectl"}, args...))
}

// KubectlCommand returns the command that Kubectl runs, not started.
func (l *Lab) KubectlCommand(ctx context.Context, args ...string) (*exec.Cmd, error) {
	kubectl, err := l.kubectl()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, kubectl, args...)
	cmd.Env = l.kubectlEnv()
	return cmd, nil
}

// KubectlReplace makes the calling process kubectl; it returns only when that fails.
func (l *Lab) KubectlReplace(args ...string) error {
	kubectl, err := l.kubectl()
	if err != nil {
		return err
	}
	return fmt.Errorf("running %s: %w", kubectl, syscall.Exec(kubectl, append([]string{"kubectl"}, args...), l.kubectlEnv()))
}

func (l *Lab) kubectlEnv() []string { return append(environment(), "KUBECONFIG="+l.Kubeconfig()) }

// kubectl returns the one that was built with the API server, else the machine's.
func (l *Lab) kubectl() (string, error) {
	built := filepath.Join(l.cfg.KubeBin, "kubectl")
	if _, err := os.Stat(built); err == nil {
		return built, nil
	}
	path, err := exec.LookPath("kubectl")
	if err != nil {
		return "", fmt.Errorf("looking for kubectl, in %s too: %w", l.cfg.KubeBin, err)
	}
	return path, nil
}

// Egret runs egret on this machine, with --endpoints of the lab's etcd after args, and returns its standard output;
// errors are as those of Exec.
func (l *Lab) Egret(ctx context.Context, args ...string) ([]byte, error) {
	args = append(args[:len(args):len(args)], "--endpoints", strings.Join(l.EtcdEndpoints(), ","))
	cmd := exec.CommandContext(ctx, l.cfg.Egret, args...)
	cmd.Env = environment()
	return run(cmd, append([]string{"egret"}, args...))
}

// run runs cmd and returns its standard output. argv is what an error calls it.
func run(cmd *exec.Cmd, argv []string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.Bytes(), fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}
