package operator

import (
	"bytes"
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
var Described = []string{"egress", "ip", "node", "pod", "pool"}

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

// Describe writes what etcd has about an egress, an egress IP, a node, a pool, or a pod (namespace/name), and what is
// wrong with it. An error says that there is no such thing.
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

// describe returns the description, as rows of a heading and a text.
func describe(w store.Whole, kind, name string, history []egress.Tenure, now time.Time) (rows [][]string, err error) {
	last := ""
	add := func(what, format string, a ...any) {
		word := what + ":"
		if what == last { // the word stands once
			word = ""
		}
		rows, last = append(rows, []string{word, fmt.Sprintf(format, a...)}), what
	}
	// steered adds the pins and moves that say where an IP is to be.
	steered := func(ip netip.Addr) {
		if p, ok := w.Pins[ip]; ok {
			add("Pinned", "%s to %s", ip, p.Node)
		}
		if m, ok := w.Moves[ip]; ok {
			by := ""
			if m.By != "" {
				by = ", by " + m.By
			}
			add("Move", "%s to %s, asked for %s ago%s", ip, m.To, age(now, m.Since), by)
		}
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
			add("Address", "%s, id %s, %s", a.IP, a.ID, addressText(w, a, now))
		}
		for _, a := range p.Addresses {
			steered(a.IP)
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
		for _, a := range p.Addresses {
			if a.Pool != "" {
				add("Ports", "%s", givenOut(w, a.IP))
			}
		}
		about = func(t Trouble) bool {
			return t.What == "egress "+name || slices.ContainsFunc(p.Addresses, func(a egress.Address) bool { return mentions(t.Why, a.IP) })
		}
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
		steered(ip)
		for _, b := range w.Blocks {
			if b.IP == ip {
				state, since := stateOf(b)
				add("Ports", "%d-%d of %s, %s for %s", b.First, b.Last(), b.Node, state, age(now, since))
			}
		}
		for _, node := range slices.Sorted(maps.Keys(w.Agents)) {
			if want := w.Agents[node].Ports[ip].Want; want > 0 {
				add("Wanted", "%s asks for a block of %d ports", node, want)
			}
		}
		for _, t := range slices.Backward(history) {
			by := ""
			if t.By != "" {
				by = "  by " + t.By
			}
			add("History", "%s  %s  %s%s", t.Since.Format("2006-01-02T15:04:05Z07:00"), nobody(t.Node), t.Why, by)
		}
		about = func(t Trouble) bool { return mentions(t.Why, ip) }
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
			state := ""
			if a.Restarting {
				state = ", told to stop: its kernel serves on for --restart-grace"
			}
			add("Agent", "%s, %s old, lease %s, permits of %s%s", dash(a.Version), age(now, a.Since), dash(a.Lease), orDash(a.Permit), state)
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
				by = "by egret"
				if c.By != "" {
					by = "by " + c.By + ", with egret"
				}
				by += ", " + age(now, c.Since) + " ago"
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
		for _, ip := range slices.SortedFunc(maps.Keys(w.Pins), netip.Addr.Compare) {
			if w.Pins[ip].Node == name {
				add("Pinned", "%s to it", ip)
			}
		}
		for _, ip := range slices.SortedFunc(maps.Keys(w.Moves), netip.Addr.Compare) {
			if m := w.Moves[ip]; m.To == name || w.Owners[ip].Node == name {
				add("Move", "%s from %s to %s, asked for %s ago", ip, nobody(w.Owners[ip].Node), m.To, age(now, m.Since))
			}
		}
		for _, e := range slices.Sorted(maps.Keys(w.ByEgress)) {
			if m, ok := w.ByEgress[e][name]; ok {
				add("Pods", "%s: %s%s", e, podNames(m), portsText(m))
			}
		}
		if m := w.Unselected[name]; len(m.Pods) > 0 {
			add("Pods", "of no egress: %s", podNames(m))
		}
		about = func(t Trouble) bool { return t.What == "node "+name }
	case "pool":
		p, ok := w.Pools[name]
		if !ok {
			return nil, fmt.Errorf("there is no pool %s: `egret get pools` lists them", name)
		}
		add("Pool", "%s", name)
		for _, r := range p.Ranges {
			add("Ranges", "%s", r)
		}
		if s := p.Subnet; s != nil && s.VLAN != 0 {
			add("Subnet", "%s, gateway %s, VLAN %d", s.Prefix(), s.Gateway, s.VLAN)
		} else if s != nil {
			add("Subnet", "%s, gateway %s", s.Prefix(), s.Gateway)
		}
		used := slices.DeleteFunc(slices.Clone(w.Allocations), func(a egress.Allocation) bool { return a.Pool != name })
		add("Used", "%d of %d", len(used), p.Total())
		for _, a := range used {
			add("Addresses", "%s of %s, on %s", a.IP, some(a.Egresses), nobody(w.Owners[a.IP].Node))
		}
		can := plan.New(&w.Snapshot).Candidates(name)
		for _, node := range selected(&w.Snapshot, p) {
			state := "can hold its IPs"
			if why := w.Agents[node].Refused[name]; why != "" {
				state = "cannot hold its IPs: " + why
			} else if !slices.Contains(can, node) {
				state = "cannot hold its IPs: cordoned, or without a live agent"
			}
			add("Nodes", "%s %s", node, state)
		}
		if len(selected(&w.Snapshot, p)) == 0 {
			add("Nodes", "none: no node has the labels that its nodeSelector asks for")
		}
		about = func(t Trouble) bool {
			return slices.ContainsFunc(used, func(a egress.Allocation) bool { return mentions(t.Why, a.IP) }) || strings.HasPrefix(t.Why, "it cannot hold IPs of pool "+name+":")
		}
	case "pod":
		steps, err := trace(w, Question{Pod: name}, now, nil)
		if err != nil {
			return nil, err
		}
		for _, s := range steps {
			add(s.What, "%s", s.Text)
		}
		return rows, nil
	}
	for _, t := range troublesOf(w, store.Space{}) {
		if t.Level != Noted && about(t) {
			add("Wrong", "%s: %s", t.Level, t.Why)
		}
	}
	return rows, nil
}

// addressText names the pool and the owner of an address.
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

// mentions reports whether an address is in a text: the whole address, not the beginning of another one.
func mentions(text string, ip netip.Addr) bool {
	part := func(s string, i int) bool {
		return i >= 0 && i < len(s) && strings.IndexByte("0123456789abcdef", s[i]) >= 0
	}
	for word := ip.String(); ; {
		before, after, found := strings.Cut(text, word)
		if !found {
			return false
		}
		joint := strings.HasSuffix(before, ".") || strings.HasSuffix(before, ":")
		if !part(before, len(before)-1) && !(joint && part(before, len(before)-2)) && !part(after, 0) && !(strings.IndexAny(after, ".:") == 0 && part(after, 1)) {
			return true
		}
		text = after
	}
}

// givenOut returns how many ports of an IP nodes have, as text.
func givenOut(w store.Whole, ip netip.Addr) string {
	ports, nodes := 0, map[string]bool{}
	for _, b := range w.Blocks {
		if b.IP == ip {
			ports += b.Size
			nodes[b.Node] = true
		}
	}
	return fmt.Sprintf("%d of %d of %s are given out, to %d nodes", ports, 1<<16-egress.FirstBlockPort, ip, len(nodes))
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

// DescribeWrong describes the egresses and nodes with which something is wrong, as Describe does, the worst first and
// at most so many, and returns how many more there are.
func DescribeWrong(ctx context.Context, c *store.Client, most int, each func(n int, kind, name string, description []byte)) (left int, err error) {
	w, err := c.ReadWhole(ctx)
	if err != nil {
		return 0, err
	}
	seen := map[string]bool{}
	for _, t := range troublesOf(w, store.Space{}) {
		kind, name, _ := strings.Cut(t.What, " ")
		if seen[t.What] || kind != "egress" && kind != "node" {
			continue
		}
		if seen[t.What] = true; len(seen) > most {
			left++
			continue
		}
		var out bytes.Buffer
		rows, err := describe(w, kind, name, nil, time.Now())
		if err == nil {
			err = writeTable(&out, "", rows)
		}
		if err != nil {
			return left, err
		}
		each(len(seen), kind, name, out.Bytes())
	}
	return left, nil
}
