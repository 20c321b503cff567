package operator

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// Described are what Describe can describe.
var Described = []string{"egress", "ip", "node", "pod"}

// CheckDescribed returns an error that says what is wrong with a kind or a name.
func CheckDescribed(kind, name string) error {
	switch namespace, pod, both := strings.Cut(name, "/"); {
	case !slices.Contains(Described, kind):
		return fmt.Errorf("kind %q: want one of %s", kind, strings.Join(Described, ", "))
	case kind == "pod" && (!both || namespace == "" || pod == ""):
		return fmt.Errorf("pod %q: want namespace/name", name)
	case kind == "ip":
		_, err := egressIPOf(name)
		return err
	}
	return nil
}

// Describe writes what etcd has about an egress, an egress IP, a node, or a pod (namespace/name), and what is wrong with it. An error says that
// there is no such thing.
func Describe(ctx context.Context, c *store.Client, kind, name string, w io.Writer) error {
	if err := CheckDescribed(kind, name); err != nil {
		return err
	}
	whole, err := c.ReadWhole(ctx)
	if err != nil {
		return err
	}
	var history []egress.Tenure
	if ip, err := netip.ParseAddr(name); kind == "ip" && err == nil {
		var faulty error
		if history, faulty = c.History(ctx, ip.Unmap()); faulty != nil && history == nil {
			return faulty
		}
		explain(history)
	}
	rows, err := describe(whole, kind, name, history, time.Now())
	if err != nil {
		return err
	}
	return writeTable(w, "", rows)
}

// describe returns what there is to say, as rows of a word and a text.
func describe(w store.Whole, kind, name string, history []egress.Tenure, now time.Time) (rows [][]string, err error) {
	last := ""
	add := func(what, format string, a ...any) {
		word := what + ":"
		if what == last { // the word stands once
			word = ""
		}
		rows, last = append(rows, []string{word, fmt.Sprintf(format, a...)}), what
	}
	var about func(Trouble) bool
	switch kind {
	case "egress":
		p, ok := w.Egresses[name]
		if !ok {
			return nil, fmt.Errorf("there is no egress %s: `egret get egresses` lists them", name)
		}
		add("Egress", "%s, %s old", name, age(now, p.Created))
		for _, a := range p.Addresses {
			add("Address", "%s, %s", a.IP, addressText(w, a, now))
		}
		for _, a := range p.Former {
			add("Former", "%s of pool %s: it gets it again when the pool has it", a.IP, a.Pool)
		}
		if b := p.Bandwidth; b != nil {
			add("Bandwidth", "%d bit/s, bursts of %d bits", b.Rate, b.Burst)
		}
		for _, node := range slices.Sorted(maps.Keys(w.ByEgress[name])) {
			m := w.ByEgress[name][node]
			add("Pods", "%s: %s%s", node, podNames(m), portsText(m))
		}
		about = func(t Trouble) bool { return t.What == "egress "+name || aboutIPs(t, p) }
	case "ip":
		ip, err := egressIPOf(name)
		if err != nil {
			return nil, err
		}
		found := false
		for _, e := range slices.Sorted(maps.Keys(w.Egresses)) {
			for _, a := range w.Egresses[e].Addresses {
				if a.IP == ip {
					if !found {
						add("IP", "%s, id %s, %s", ip, a.ID, addressText(w, a, now))
					}
					found = true
					add("Egress", "%s", e)
				}
			}
		}
		if !found && len(history) == 0 {
			return nil, fmt.Errorf("no egress uses %s: `egret get allocations` lists the addresses in use", ip)
		} else if !found {
			add("IP", "%s, which no egress uses", ip)
		}
		if p, ok := w.Pins[ip]; ok {
			add("Pinned", "to %s", p.Node)
		}
		if m, ok := w.Moves[ip]; ok {
			add("Move", "to %s, asked for %s ago", m.To, age(now, m.Since))
		}
		for _, b := range w.Blocks {
			if b.IP == ip {
				state, since := stateOf(b)
				add("Ports", "%d-%d of %s, %s for %s", b.First, b.Last(), b.Node, state, age(now, since))
			}
		}
		for _, t := range slices.Backward(history) {
			add("History", "%s  %s  %s", t.Since.Format("2006-01-02T15:04:05Z07:00"), nobody(t.Node), t.Why)
		}
		about = func(t Trouble) bool { return strings.Contains(t.Why, ip.String()) }
	case "node":
		n, known := w.Nodes[name]
		a, alive := w.Agents[name]
		if !known && !alive {
			return nil, fmt.Errorf("there is no node %s: `egret get nodes` lists them", name)
		}
		add("Node", "%s, index %d", name, n.Index)
		add("Addresses", "%s", join(n.Addresses))
		add("Pod CIDRs", "%s", join(n.PodCIDRs))
		if alive {
			add("Agent", "%s, %s old, lease %s", dash(a.Version), age(now, a.Since), a.Lease)
			if a.Exposed != "" {
				add("Etcd", "spoken to %s, as --insecure allows", a.Exposed)
			}
			add("Kernel", "%s", dash(strings.Join(a.Features, ", ")))
		} else {
			add("Agent", "down")
		}
		if plan.Cordoned(&w.Snapshot, name) {
			by := "in Kubernetes"
			if c, ok := w.Cordons[name]; ok {
				by = "by egret, " + age(now, c.Since) + " ago"
			}
			add("Cordoned", "%s", by)
		}
		held := 0
		for _, ip := range slices.SortedFunc(maps.Keys(w.Owners), netip.Addr.Compare) {
			if o := w.Owners[ip]; o.Node == name {
				held++
				add("Holds", "%s for %s, by %s", ip, age(now, o.Since), o.Why)
			}
		}
		add("Room", "%d of %s", held, limit(n.Capacity))
		for _, e := range slices.Sorted(maps.Keys(w.ByEgress)) {
			if m, ok := w.ByEgress[e][name]; ok {
				add("Pods", "%s: %s%s", e, podNames(m), portsText(m))
			}
		}
		about = func(t Trouble) bool { return t.What == "node "+name }
	case "pod":
		steps, err := trace(w, Question{Pod: name}, now)
		if err != nil {
			return nil, err
		}
		for _, s := range steps {
			add(s.What, "%s", s.Text)
		}
		return rows, nil
	}
	for _, t := range troublesOf(w) {
		if t.Level != Noted && about(t) {
			add("Wrong", "%s: %s", t.Level, t.Why)
		}
	}
	return rows, nil
}

// addressText says of which pool an address is, and who holds it.
func addressText(w store.Whole, a egress.Address, now time.Time) string {
	from := "static"
	if a.Pool != "" {
		from = "of pool " + a.Pool
	}
	if o, held := w.Owners[a.IP]; held {
		return fmt.Sprintf("%s, on %s for %s (%s)", from, o.Node, age(now, o.Since), o.Why)
	}
	return from + ", on no node"
}

// aboutIPs reports whether a trouble is about an address of an egress.
func aboutIPs(t Trouble, p egress.Policy) bool {
	return slices.ContainsFunc(p.Addresses, func(a egress.Address) bool {
		return strings.HasPrefix(t.Why, a.IP.String()+":") || strings.HasPrefix(t.Why, a.IP.String()+" ")
	})
}

func podNames(m egress.Members) string {
	names := make([]string, len(m.Pods))
	for i, p := range m.Pods {
		names[i] = p.Pod
	}
	return few(names)
}

// few names some of many.
func few(names []string) string {
	const most = 3
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

func portsText(m egress.Members) string {
	var out []string
	for _, b := range m.Blocks {
		state := ""
		if b.Retired {
			state = " (retired)"
		}
		out = append(out, fmt.Sprintf("%d-%d of %s%s", b.First, b.Last(), b.IP, state))
	}
	if len(out) == 0 {
		return ", no ports of their own"
	}
	return ", ports " + strings.Join(out, ", ")
}

func egressIPOf(text string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(text)
	if err != nil {
		return ip, fmt.Errorf("%q: want an egress IP, an IPv4 or IPv6 address", text)
	}
	return ip.Unmap(), nil
}
