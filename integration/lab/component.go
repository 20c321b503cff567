package lab

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/store"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
)

// etcdPrefix is egret's default.
const etcdPrefix = "/egret/"

// insecure is the flag that agents and crdsync need where etcd is without TLS, as that of a lab is.
const insecure = "--insecure"

// component is one process of the lab.
type component struct {
	proc  string
	netns string // "node-1"; empty for the machine's own
	argv  []string
	// confined: it has no more rights than the container of the manifests (see confine).
	confined bool
}

func (l *Lab) serve() component {
	return component{proc: serveProc, argv: []string{l.cfg.Self, "serve", l.cfg.Name}}
}

func (l *Lab) apiServer() component {
	return component{proc: apiProc, netns: "control", argv: l.apiServerArgs()}
}

func (l *Lab) crdsync() component {
	argv := []string{l.cfg.Egret, "crdsync", "--kubeconfig", l.path("kubeconfig.control"), "--endpoints", l.AgentEndpoints(), insecure}
	if !l.cfg.NoWebhook {
		argv = append(argv, "--webhook")
	}
	return component{proc: crdsyncProc, netns: "control", argv: append(argv, l.cfg.SyncFlags...)}
}

func (l *Lab) agent(node string) component {
	argv := append([]string{
		l.cfg.Egret, "agent", "--node", node, "--endpoints", l.AgentEndpoints(), "--lease-ttl", l.cfg.LeaseTTL.String(),
		"--gossip-key-file", l.path(gossipKey), insecure, "--sysctl-dir=" + l.path(sysctlDir),
	}, l.cfg.AgentFlags...)
	return component{proc: agentProc(node), netns: node, argv: argv, confined: true}
}

// components returns those that a command names: "etcd" (Egret's, all members; that of the API server is left alone),
// one member, "apiserver", "crdsync" or "agent" with a node.
func (l *Lab) components(what, node string) ([]component, error) {
	if (what == "agent") != (node != "") {
		return nil, fmt.Errorf("%q with node %q: want etcd, apiserver, crdsync, or agent and a node", what, node)
	}
	switch what {
	case "etcd":
		return l.etcds(), nil
	case "apiserver":
		return []component{l.apiServer()}, nil
	case "crdsync":
		return []component{l.crdsync()}, nil
	case "agent":
		_, err := l.NodeNumber(node)
		return []component{l.agent(node)}, err
	}
	for _, m := range l.members() {
		if m.proc == what {
			return []component{l.etcd(m)}, nil
		}
	}
	return nil, fmt.Errorf("%q: want etcd, one of its members %q, apiserver, crdsync or agent", what, l.EtcdMembers())
}

// Stop ends a process with SIGTERM and waits until it is gone; etcd and the API server keep their data. Which one is
// "etcd" (Egret's, all members), one of EtcdMembers, "apiserver", "crdsync", or "agent" with a node. Nil when it does
// not run. A process that takes longer than 10 s gets SIGKILL.
func (l *Lab) Stop(ctx context.Context, what, node string) error {
	return l.end(ctx, what, node, stopGrace)
}

// Kill ends, with SIGKILL, what Stop ends otherwise.
func (l *Lab) Kill(ctx context.Context, what, node string) error { return l.end(ctx, what, node, 0) }

func (l *Lab) end(ctx context.Context, what, node string, grace time.Duration) error {
	all, err := l.components(what, node)
	if err != nil {
		return err
	}
	return l.change(ctx, func(*state) error {
		var g errgroup.Group
		for _, c := range all {
			g.Go(func() error { return l.stop(ctx, c.proc, grace) })
		}
		return g.Wait()
	})
}

// Start starts what Stop stopped, and returns when etcd or the API server answers; crdsync, an agent and a single
// member of etcd only have to run, for they may have nobody to talk to. Nil when it runs already.
func (l *Lab) Start(ctx context.Context, what, node string) error {
	all, err := l.components(what, node)
	if err != nil {
		return err
	}
	return l.change(ctx, func(s *state) error {
		if s.Crashed[node] {
			return fmt.Errorf("%s is powered off: recover it", node)
		}
		for _, c := range all {
			if err := l.start(s, c); err != nil {
				return err
			}
		}
		switch what {
		case "etcd":
			return l.waitEtcd(ctx)
		case "apiserver":
			return l.waitAPI(ctx)
		}
		return nil
	})
}

// Upgrade ends a node's agent as Stop does, and starts the program egret, a path, as its agent, with further flags: one
// of another version, or configuration. Start starts the lab's own again. Options that it does not know it is not
// given, and then it is not confined.
func (l *Lab) Upgrade(ctx context.Context, node, egret string, flags ...string) error {
	if _, err := l.NodeNumber(node); err != nil {
		return err
	}
	c := l.agent(node)
	c.argv = append(c.argv, flags...)
	c.argv[0] = egret
	help, err := exec.CommandContext(ctx, egret, "agent", "--help").CombinedOutput()
	if err != nil {
		return fmt.Errorf("asking %s for the options of an agent: %w: %s", egret, err, help)
	}
	// An older one needs no flag for an etcd without TLS, and wants all rights.
	unknown := func(arg string) bool {
		name, _, _ := strings.Cut(arg, "=")
		return strings.HasPrefix(name, "--") && !slices.Contains(strings.Fields(string(help)), name)
	}
	c.confined = !slices.ContainsFunc(c.argv, unknown)
	c.argv = slices.DeleteFunc(c.argv, unknown)
	return l.change(ctx, func(s *state) error {
		if err := l.stop(ctx, c.proc, stopGrace); err != nil {
			return err
		}
		return l.start(s, c)
	})
}

// waitAgents returns when etcd has the records of the nodes and of their agents.
func (l *Lab) waitAgents(ctx context.Context, nodes ...int) error {
	procs := append([]string{serveProc}, l.EtcdMembers()...)
	for _, n := range nodes {
		procs = append(procs, agentProc(NodeName(n)))
	}
	if _, ok := l.process(crdsyncProc); ok {
		procs = append(procs, crdsyncProc)
	}
	client, err := l.DialEtcd()
	if err != nil {
		return err
	}
	defer client.Close()
	return l.wait(ctx, "the agents", readyTimeout, procs, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		var missing []error
		for _, n := range nodes {
			for _, key := range []string{store.NodeKey(NodeName(n)), store.AgentKey(NodeName(n))} {
				resp, err := client.Get(ctx, etcdPrefix+key, clientv3.WithKeysOnly())
				if err != nil {
					return fmt.Errorf("reading %s: %w", etcdPrefix+key, err)
				}
				if resp.Count == 0 {
					missing = append(missing, fmt.Errorf("no key %s", etcdPrefix+key))
				}
			}
		}
		return errors.Join(missing...)
	})
}
