package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"text/tabwriter"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
)

// Status is the state of a lab.
type Status struct {
	Name       string          `json:"name"`
	Ready      bool            `json:"ready"` // false while Up is at work, and after an Up that was killed
	Kubeconfig string          `json:"kubeconfig"`
	Etcd       string          `json:"etcd"` // endpoint, host:port
	Processes  []ProcessStatus `json:"processes"`
	Nodes      []NodeStatus    `json:"nodes"`
	Pods       []Pod           `json:"pods"` // sorted by name
}

// ProcessStatus is a process of a lab.
type ProcessStatus struct {
	Name  string `json:"name"`
	State string `json:"state"`         // running, frozen, ended, or stopped: by Stop or never started
	PID   int    `json:"pid,omitempty"` // 0 when ended or stopped
}

// NodeStatus is a node of a lab.
type NodeStatus struct {
	Name  string     `json:"name"`
	IP    netip.Addr `json:"ip"`
	State string     `json:"state"` // up, or off: by Crash
	Agent string     `json:"agent"` // as ProcessStatus.State
	// Cuts are those that were not healed.
	Cuts []string `json:"cuts,omitempty"`
}

// ReadStatus returns the state of the lab of that name, complete or not.
func ReadStatus(ctx context.Context, name string) (Status, error) {
	l, s, err := load(name)
	if err != nil {
		return Status{}, err
	}
	st := Status{Name: name, Ready: s.Ready, Kubeconfig: l.Kubeconfig(), Etcd: strings.Join(l.EtcdEndpoints(), ",")}
	procs := append(append([]string{serveProc}, l.EtcdMembers()...), kubeEtcdProc, apiProc)
	if !l.cfg.Bare {
		procs = append(procs, crdsyncProc)
	}
	for _, name := range procs {
		st.Processes = append(st.Processes, l.processStatus(name))
	}
	for _, n := range l.nodes() {
		if ctx.Err() != nil {
			return Status{}, context.Cause(ctx)
		}
		node := NodeStatus{Name: NodeName(n), IP: NodeIP(n), State: "up", Agent: l.processStatus(agentProc(NodeName(n))).State}
		if s.Crashed[node.Name] {
			node.State = "off"
		} else if s.Ready {
			if node.Cuts, err = l.cuts(node.Name); err != nil {
				return Status{}, err
			}
		}
		st.Nodes = append(st.Nodes, node)
	}
	for _, p := range s.Pods {
		st.Pods = append(st.Pods, p)
	}
	sort.Slice(st.Pods, func(i, j int) bool { return st.Pods[i].Name < st.Pods[j].Name })
	return st, nil
}

func (l *Lab) processStatus(name string) ProcessStatus {
	st := ProcessStatus{Name: name, State: "stopped"}
	p, ok := l.process(name)
	switch {
	case ok && p.status() == 'T':
		st.State, st.PID = "frozen", p.pid
	case ok:
		st.State, st.PID = "running", p.pid
	case slices.Contains(l.processes(), name):
		st.State = "ended"
	}
	return st
}

// cuts reads from the kernel what a node is cut off from.
func (l *Lab) cuts(node string) ([]string, error) {
	h, err := l.openHost(node)
	if err != nil {
		return nil, err
	}
	defer h.close()
	lan, err := l.openHost("lan")
	if err != nil {
		return nil, err
	}
	defer lan.close()
	c, err := nftables.New(nftables.WithNetNSFd(int(h.ns)))
	if err != nil {
		return nil, fmt.Errorf("opening nftables: %w", err)
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("listing chains: %w", err)
	}
	dropped := map[string]bool{}
	for _, chain := range chains {
		if chain.Table.Name == "lab" {
			dropped[chain.Name] = true
		}
	}
	var found []string
	for _, what := range Cuts {
		base, _, one := strings.Cut(what, "-")
		both := dropped[base+"-in"] && dropped[base+"-out"]
		if one && dropped[what] && !both || !one && both {
			found = append(found, what)
		}
	}
	port, err := lan.nl.LinkByName(portName(node))
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return found, nil
	} else if err != nil {
		return nil, err
	}
	if port.Attrs().RawFlags&1 == 0 { // IFF_UP
		found = append(found, "uplink")
	}
	sort.Strings(found)
	return found, nil
}

// String prints the status as tables.
func (s Status) String() string {
	var b strings.Builder
	ready := ""
	if !s.Ready {
		ready = " (not complete)"
	}
	fmt.Fprintf(&b, "lab         %s%s\nkubeconfig  %s\netcd        %s\n\n", s.Name, ready, s.Kubeconfig, s.Etcd)
	w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "PROCESS\tSTATE\tPID")
	for _, p := range s.Processes {
		pid := "-"
		if p.PID != 0 {
			pid = fmt.Sprint(p.PID)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", p.Name, p.State, pid)
	}
	fmt.Fprintln(w, "\nNODE\tIP\tSTATE\tAGENT\tCUT FROM")
	for _, n := range s.Nodes {
		cut := "-"
		if len(n.Cuts) > 0 {
			cut = strings.Join(n.Cuts, ",")
		}
		fmt.Fprintf(w, "%s\t%v\t%s\t%s\t%s\n", n.Name, n.IP, n.State, n.Agent, cut)
	}
	fmt.Fprintln(w, "\nPOD\tNODE\tIPS\tLABELS")
	for _, p := range s.Pods {
		var ips, labels []string
		for _, ip := range p.IPs {
			ips = append(ips, ip.String())
		}
		for k, v := range p.Labels {
			labels = append(labels, k+"="+v)
		}
		sort.Strings(labels)
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", p.Name, p.Node, strings.Join(ips, ","), strings.Join(labels, ","))
	}
	w.Flush() // a Builder takes everything
	return b.String()
}
