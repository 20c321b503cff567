package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
)

// Crash powers a node off: its agent is killed and its links go down. Its pods are cut off with it.
func (l *Lab) Crash(ctx context.Context, node string) error {
	if _, err := l.NodeNumber(node); err != nil {
		return err
	}
	if l.cfg.Kubelet {
		return fmt.Errorf("powering %s off: a node with a kubelet cannot be yet", node)
	}
	return l.change(ctx, func(s *state) error {
		if s.Crashed[node] {
			return fmt.Errorf("%s is powered off already", node)
		}
		s.Crashed[node] = true
		if err := l.write(s); err != nil {
			return err
		}
		// the agent first: it must not see its links go down, as it would not in a power cut
		if err := l.stop(ctx, agentProc(node), 0); err != nil {
			return err
		}
		return l.atLAN(node, func(h, lan *host) error {
			links, err := h.nl.LinkList()
			if err != nil {
				return fmt.Errorf("listing the links of %s: %w", node, err)
			}
			err = lan.down(portName(node))
			for _, link := range links {
				err = errors.Join(err, h.nl.LinkSetDown(link))
			}
			return err
		})
	})
}

// Recover boots a node that Crash powered off: its kernel is as new, its pods are connected to it again with the
// addresses they had, its agent is started. It returns when etcd has the agent's record, which may still be that of
// before the crash; without waiting when etcd is stopped.
func (l *Lab) Recover(ctx context.Context, node string) error {
	n, err := l.NodeNumber(node)
	if err != nil {
		return err
	}
	return l.change(ctx, func(s *state) error {
		if !s.Crashed[node] {
			return fmt.Errorf("%s is not powered off: crash it first", node)
		}
		if err := l.rebuildNode(n, s); err != nil {
			return err
		}
		delete(s.Crashed, node)
		if err := l.write(s); err != nil || l.cfg.Bare {
			return err
		}
		if err := l.start(s, l.agent(node)); err != nil {
			return err
		}
		for _, m := range l.members() {
			if _, ok := l.process(m.proc); !ok {
				return nil
			}
		}
		return l.waitAgents(ctx, n)
	})
}

func (l *Lab) rebuildNode(n int, s *state) error {
	lan, err := l.openHost("lan")
	if err != nil {
		return err
	}
	defer lan.close()
	if err := errors.Join(lan.unplug(portName(NodeName(n))), l.removeHost(NodeName(n)), l.buildNode(n)); err != nil {
		return err
	}
	for _, p := range s.Pods {
		if p.Node == NodeName(n) {
			err = errors.Join(err, l.attachPod(p))
		}
	}
	return err
}

// Replug takes a node's link to the LAN out and plugs a new one in, of the same name, MAC address, addresses and
// routes, as when a driver is loaded anew.
func (l *Lab) Replug(ctx context.Context, node string) error {
	n, err := l.NodeNumber(node)
	if err != nil {
		return err
	}
	return l.change(ctx, func(*state) error {
		return l.atLAN(node, func(h, lan *host) error {
			return errors.Join(lan.unplug(portName(node)), l.join(lan, h, nodeHost+n), l.routes(h, n))
		})
	})
}

// Freeze stops the agent of a node, or a member of etcd, where it is (SIGSTOP) and returns when it stands.
func (l *Lab) Freeze(ctx context.Context, what string) error {
	return l.signal(ctx, what, syscall.SIGSTOP, true)
}

// Thaw lets what Freeze stopped go on (SIGCONT).
func (l *Lab) Thaw(ctx context.Context, what string) error {
	return l.signal(ctx, what, syscall.SIGCONT, false)
}

func (l *Lab) signal(ctx context.Context, what string, sig syscall.Signal, stopped bool) error {
	name := what
	if !slices.Contains(l.EtcdMembers(), what) {
		if _, err := l.NodeNumber(what); err != nil {
			return err
		}
		name = agentProc(what)
	}
	return l.change(ctx, func(*state) error {
		p, ok := l.process(name)
		if !ok {
			return fmt.Errorf("%s does not run", name)
		}
		if err := p.signal(sig); err != nil {
			return fmt.Errorf("sending %v to %s: %w", sig, name, err)
		}
		return l.wait(ctx, name+" to take "+sig.String(), readyTimeout, []string{name}, func(context.Context) error {
			if status := p.status(); (status == 'T') != stopped {
				return fmt.Errorf("its state is %c", status)
			}
			return nil
		})
	})
}

// Cuts are the ways to cut a node off.
var Cuts = []string{"etcd", "etcd-in", "etcd-out", "peers", "peers-in", "peers-out", "uplink"}

// Cut cuts a node off: from "etcd" (packets to and from the control host are dropped), from its "peers" (the other
// nodes; their pods included only as far as packets pass between the nodes' own addresses, as an overlay's do), or from
// everything ("uplink": its link to the LAN has no carrier). With -in only what comes to the node is dropped, with -out
// only what it sends.
func (l *Lab) Cut(ctx context.Context, node, what string) error {
	return l.changeCut(ctx, node, what, func(n int, h, lan *host) error {
		var addrs []netip.Addr
		for _, f := range families() {
			switch from, _, _ := strings.Cut(what, "-"); from {
			case "etcd":
				for _, m := range l.hosts()[1:] {
					addrs = append(addrs, f.host(m.number))
				}
			case "peers":
				for _, peer := range l.nodes() {
					if peer != n {
						addrs = append(addrs, f.node(peer))
					}
				}
			}
		}
		if what == "uplink" {
			return lan.down(portName(node))
		}
		return dropTraffic(h.ns, what, addrs)
	})
}

// Heal undoes Cut; "etcd" and "peers" both directions, whichever were cut. Nil when there is nothing to undo.
func (l *Lab) Heal(ctx context.Context, node, what string) error {
	return l.changeCut(ctx, node, what, func(_ int, h, lan *host) error {
		if what == "uplink" {
			return lan.up(portName(node))
		}
		return passTraffic(h.ns, what)
	})
}

func (l *Lab) changeCut(ctx context.Context, node, what string, f func(n int, h, lan *host) error) error {
	n, err := l.NodeNumber(node)
	if err != nil {
		return err
	}
	if !slices.Contains(Cuts, what) {
		return fmt.Errorf("%q: want one of %q", what, Cuts)
	}
	return l.change(ctx, func(s *state) error {
		if s.Crashed[node] {
			return fmt.Errorf("%s is powered off", node)
		}
		return l.atLAN(node, func(h, lan *host) error { return f(n, h, lan) })
	})
}

// atLAN calls f with a node and the LAN that it is on.
func (l *Lab) atLAN(node string, f func(h, lan *host) error) error {
	return l.at("lan", func(lan *host) error {
		return l.at(node, func(h *host) error { return f(h, lan) })
	})
}

// at calls f with an open namespace.
func (l *Lab) at(name string, f func(*host) error) error {
	h, err := l.openHost(name)
	if err != nil {
		return err
	}
	defer h.close()
	return f(h)
}

// Partition divides the nodes and the members of etcd that it names into sides: no packets pass between two sides. The
// outside host, the control host and whoever is not named are on all of them. Rejoin ends it.
func (l *Lab) Partition(ctx context.Context, sides ...[]string) error {
	return l.change(ctx, func(*state) error {
		for i, side := range sides {
			var addrs []netip.Addr
			for j, other := range sides {
				for _, name := range other {
					number, err := l.lanNumber(name)
					if err != nil {
						return err
					}
					for _, f := range families() {
						if i != j {
							addrs = append(addrs, f.host(number))
						}
					}
				}
			}
			for _, name := range side {
				if err := l.at(name, func(h *host) error { return dropTraffic(h.ns, "partition", addrs) }); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// Rejoin ends a Partition. Nil when there is none.
func (l *Lab) Rejoin(ctx context.Context) error {
	return l.change(ctx, func(*state) error {
		hosts := l.hosts()
		for _, n := range l.nodes() {
			hosts = append(hosts, lanHost{NodeName(n), nodeHost + n})
		}
		var errs []error
		for _, h := range hosts {
			errs = append(errs, l.at(h.name, func(h *host) error { return passTraffic(h.ns, "partition") }))
		}
		return errors.Join(errs...)
	})
}

// lanNumber returns the host number of a node or of a member of etcd.
func (l *Lab) lanNumber(name string) (int, error) {
	for _, h := range l.hosts() {
		if h.name == name {
			return h.number, nil
		}
	}
	n, err := l.NodeNumber(name)
	return nodeHost + n, err
}
