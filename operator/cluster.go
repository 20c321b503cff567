package operator

import (
	"cmp"
	"context"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// Cluster is the whole system as records without ages, for who shows it as it changes: the same whole of etcd gives the
// same Cluster at any time.
type Cluster struct {
	Revision int64
	Leader   string // the crdsync that leads; empty: none does
	Troubles []Trouble
	Egresses []EgressRow // by name
	Nodes    []NodeRow   // by name, agents of no node of the cluster among them
	Pools    []PoolRow   // by name
	Moves    []TenureRow // who got an IP when, the newest first
}

// EgressRow is an egress.
type EgressRow struct {
	Name      string       `json:"name"`
	Level     Level        `json:"level,omitempty"` // the worst that is wrong with it; empty: nothing is
	Why       string       `json:"why,omitempty"`   // and why
	Addresses []AddressRow `json:"addresses"`
	Pods      int          `json:"pods"`
	PodNodes  int          `json:"podNodes"`       // how many nodes the pods are on
	Rate      int64        `json:"rate,omitempty"` // its limit in bit/s; 0: none
	Since     time.Time    `json:"since,omitzero"`
}

// AddressRow is an IP of an egress.
type AddressRow struct {
	IP      netip.Addr    `json:"ip"`
	Pool    string        `json:"pool,omitempty"` // empty: it is static
	Gateway string        `json:"gateway,omitempty"`
	Since   time.Time     `json:"since,omitzero"` // the gateway has it
	Why     egress.Reason `json:"why,omitempty"`  // the gateway has it
	To      string        `json:"to,omitempty"`   // where it is moving
	Pin     string        `json:"pin,omitempty"`
	Ports   int           `json:"ports"` // given out to nodes, of all that there are for it
	Of      int           `json:"of"`    // how many there are
}

// NodeRow is a node, or the agent of none.
type NodeRow struct {
	Name      string       `json:"name"`
	Level     Level        `json:"level,omitempty"`
	Why       string       `json:"why,omitempty"`
	Addresses []netip.Addr `json:"addresses"`
	Agent     string       `json:"agent"`          // "down", "restarting", or its version
	Since     time.Time    `json:"since,omitzero"` // the agent runs
	Holds     []netip.Addr `json:"holds"`
	Capacity  int          `json:"capacity,omitempty"` // 0: no limit
	Pods      int          `json:"pods"`               // of egresses
	Cordoned  bool         `json:"cordoned,omitempty"`
	Gone      bool         `json:"gone,omitempty"` // there is no such node
}

// PoolRow is a pool.
type PoolRow struct {
	Name   string   `json:"name"`
	Ranges []string `json:"ranges"`
	Total  int64    `json:"total"`
	Used   int      `json:"used"`
	Nodes  int      `json:"nodes"` // that may hold its IPs
	VLAN   int      `json:"vlan,omitempty"`
}

// TenureRow says that a node got an IP, or that nobody has it.
type TenureRow struct {
	Key      string   `json:"key"` // unique
	Egresses []string `json:"egresses,omitempty"`
	egress.Tenure
}

// maxMoves is how many tenures a Cluster has: what a person looks through. `egret history` has all of an IP.
const maxMoves = 200

// NewCluster returns the system as etcd has it; tenures are those of all IPs, in the order in which etcd took them. The
// zero Space: etcd's members were not asked.
func NewCluster(w store.Whole, tenures []egress.Tenure, space store.Space) Cluster {
	c := Cluster{Revision: w.Revision, Leader: w.Leader, Troubles: troublesOf(w, space)}
	names := byIP(&w.Snapshot)
	worst := map[string]Trouble{}
	for _, t := range c.Troubles {
		if _, worse := worst[t.What]; !worse && t.Level != Noted {
			worst[t.What] = t
		}
	}
	// what a node says of an IP is a trouble of the node, and of who uses the IP
	for _, node := range slices.Sorted(maps.Keys(w.Agents)) {
		a := w.Agents[node]
		for _, said := range []map[netip.Addr]string{a.Dropped, a.Conflicts} {
			for _, ip := range slices.SortedFunc(maps.Keys(said), netip.Addr.Compare) {
				for _, name := range names[ip] {
					if _, worse := worst["egress "+name]; !worse {
						worst["egress "+name] = Trouble{Broken, "egress " + name, node + ": " + ip.String() + ": " + said[ip]}
					}
				}
			}
		}
	}
	ports := map[netip.Addr]int{}
	for _, b := range w.Blocks {
		ports[b.IP] += b.Size
	}
	for _, name := range slices.Sorted(maps.Keys(w.Egresses)) {
		p := w.Egresses[name]
		row := EgressRow{Name: name, Addresses: []AddressRow{}, PodNodes: len(w.ByEgress[name]), Since: p.Created}
		row.Level, row.Why = worst["egress "+name].Level, worst["egress "+name].Why
		for _, m := range w.ByEgress[name] {
			row.Pods += len(m.Pods)
		}
		if p.Bandwidth != nil {
			row.Rate = p.Bandwidth.Rate
		}
		for _, a := range p.Addresses {
			o := w.Owners[a.IP]
			row.Addresses = append(row.Addresses, AddressRow{
				IP: a.IP, Pool: a.Pool, Gateway: o.Node, Since: o.Since, Why: o.Why, To: w.Moves[a.IP].To, Pin: w.Pins[a.IP].Node,
				Ports: ports[a.IP], Of: 1<<16 - egress.FirstBlockPort,
			})
		}
		c.Egresses = append(c.Egresses, row)
	}
	c.Nodes = nodeRows(w, worst)
	used := map[string]int{}
	for _, a := range w.Allocations {
		used[a.Pool]++
	}
	for _, name := range slices.Sorted(maps.Keys(w.Pools)) {
		p := w.Pools[name]
		row := PoolRow{Name: name, Ranges: []string{}, Total: p.Total(), Used: used[name], Nodes: len(selected(&w.Snapshot, p))}
		for _, r := range p.Ranges {
			row.Ranges = append(row.Ranges, r.String())
		}
		if p.Subnet != nil {
			row.VLAN = p.Subnet.VLAN
		}
		c.Pools = append(c.Pools, row)
	}
	for _, t := range timeline(tenures, maxMoves) {
		c.Moves = append(c.Moves, TenureRow{strings.TrimPrefix(store.HistoryKey(t), store.HistoryPrefix), names[t.IP], t})
	}
	return c
}

func nodeRows(w store.Whole, worst map[string]Trouble) (rows []NodeRow) {
	holds, pods := map[string][]netip.Addr{}, map[string]int{}
	for ip, o := range w.Owners {
		holds[o.Node] = append(holds[o.Node], ip)
	}
	for _, nodes := range w.ByEgress {
		for node, m := range nodes {
			pods[node] += len(m.Pods)
		}
	}
	all := maps.Clone(w.Nodes)
	for name := range w.Agents {
		if plan.Gone(&w.Snapshot, name) {
			all[name] = egress.Node{Name: name}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		n, a := all[name], w.Agents[name]
		row := NodeRow{
			Name: name, Addresses: n.Addresses, Agent: "down", Since: a.Since, Holds: holds[name], Capacity: n.Capacity, Pods: pods[name],
			Cordoned: plan.Cordoned(&w.Snapshot, name), Gone: plan.Gone(&w.Snapshot, name),
		}
		row.Level, row.Why = worst["node "+name].Level, worst["node "+name].Why
		slices.SortFunc(row.Holds, netip.Addr.Compare)
		if _, alive := w.Agents[name]; alive {
			if row.Agent = cmp.Or(a.Version, "up"); a.Restarting {
				row.Agent = "restarting"
			}
		}
		rows = append(rows, row)
	}
	return rows
}

// timeline returns the last tenures of all IPs, the newest first.
func timeline(tenures []egress.Tenure, most int) []egress.Tenure {
	ofIP := map[netip.Addr][]egress.Tenure{}
	for _, t := range tenures {
		ofIP[t.IP] = append(ofIP[t.IP], t)
	}
	for _, list := range ofIP {
		explain(list)
	}
	// explain has changed copies: they are taken in the order of all.
	var out []egress.Tenure
	for _, t := range slices.Backward(tenures) {
		if len(out) == most {
			break
		}
		list := ofIP[t.IP]
		out = append(out, list[len(list)-1])
		ofIP[t.IP] = list[:len(list)-1]
	}
	return out
}

// Way is the answer of TraceIn.
type Way struct {
	Steps   []Step `json:"steps"`
	Verdict string `json:"verdict"`
	Status  int    `json:"status"` // 0: the pod leaves as it should; 2: it does not; 3: something may be in its way
}

// Kernels are how agents are asked what their kernels have; the zero Kernels: they are not.
type Kernels struct {
	Ask  Ask
	Page string // where
	// Latest returns the records as they are now, which are looked at again where something is wrong: kernels may have
	// what moved meanwhile. nil: they are not.
	Latest func() store.Whole
}

// TraceIn is Trace in a whole that was read already, for who is to learn of no destination whether something is sent
// there, or whether it answers: agents are asked for the way to anywhere outside. An error: there is no such pod.
func TraceIn(ctx context.Context, w store.Whole, q Question, agents Kernels) (Way, error) {
	if err := CheckDescribed("pod", q.Pod); err != nil {
		return Way{}, err
	}
	ask := askKernels(ctx, agents.Ask, agents.Page)
	if to := ask; to != nil {
		ask = func(w store.Whole, q egress.KernelQuestion, home, gateway string) kernels {
			q.To, q.Protocol, q.Port = netip.Addr{}, 0, 0
			return to(w, q, home, gateway)
		}
	}
	steps, err := trace(w, q, time.Now(), ask)
	if err != nil {
		return Way{}, err
	}
	text, status := conclude(steps)
	if status == 0 || ask == nil || agents.Latest == nil {
		return Way{steps, text, status}, nil
	}
	if now := agents.Latest(); moved(w, now, q.Pod) {
		agents.Latest = nil
		return TraceIn(ctx, now, q, agents)
	}
	return Way{steps, text, status}, nil
}

// DescribeIn is Describe in a whole that was read already, as rows of a word, which is empty where it is that of the
// row before, and a text. tenures are those of all IPs, in the order in which etcd took them.
func DescribeIn(w store.Whole, tenures []egress.Tenure, kind, name string, now time.Time) ([][]string, error) {
	if err := CheckDescribed(kind, name); err != nil {
		return nil, err
	}
	var history []egress.Tenure
	if kind == "ip" {
		ip, err := egressIPOf(name)
		if err != nil {
			return nil, err
		}
		for _, t := range tenures {
			if t.IP == ip {
				history = append(history, t)
			}
		}
		explain(history)
	}
	return describe(w, kind, name, history, now)
}

// PodsOf returns the pods of an egress, of the egresses of an IP, or those on a node that an egress selects, sorted.
func PodsOf(w store.Whole, kind, name string) (pods []Hit) {
	for _, e := range slices.Sorted(maps.Keys(w.ByEgress)) {
		ofIP := slices.ContainsFunc(w.Egresses[e].Addresses, func(a egress.Address) bool { return a.IP.String() == name })
		for _, node := range slices.Sorted(maps.Keys(w.ByEgress[e])) {
			if kind == "egress" && e == name || kind == "ip" && ofIP || kind == "node" && node == name {
				for _, p := range w.ByEgress[e][node].Pods {
					pods = append(pods, Hit{"pod", p.Pod, join(p.IPs) + " of egress " + e + " on " + node})
				}
			}
		}
	}
	return pods
}

// Hit is something that Find has found.
type Hit struct {
	Kind string `json:"kind"` // one of Described
	Name string `json:"name"`
	Note string `json:"note,omitempty"` // what it is, or where
}

// Find returns what has a name, or an IP, that text is, begins with or is in, in this order; at most so many. An IP of
// a pod finds the pod.
func Find(w store.Whole, text string, most int) []Hit {
	text = strings.ToLower(strings.TrimSpace(text))
	if text == "" {
		return nil
	}
	var ranks [3][]Hit
	look := func(kind, name, note string, words ...string) {
		rank := len(ranks)
		for _, word := range append(words, name) {
			switch word = strings.ToLower(word); {
			case word == text:
				rank = 0
			case strings.HasPrefix(word, text):
				rank = min(rank, 1)
			case strings.Contains(word, text):
				rank = min(rank, 2)
			}
		}
		if rank < len(ranks) && len(ranks[rank]) < most {
			ranks[rank] = append(ranks[rank], Hit{kind, name, note})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(w.Egresses)) {
		look("egress", name, join(addresses(w.Egresses[name])))
	}
	for _, name := range slices.Sorted(maps.Keys(w.Egresses)) {
		for _, a := range w.Egresses[name].Addresses {
			look("ip", a.IP.String(), "of egress "+name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(w.Pools)) {
		look("pool", name, "")
	}
	for _, name := range slices.Sorted(maps.Keys(w.Nodes)) {
		look("node", name, join(w.Nodes[name].Addresses), texts(w.Nodes[name].Addresses)...)
	}
	pods := func(m egress.Members, note string) {
		for _, p := range m.Pods {
			_, short, _ := strings.Cut(p.Pod, "/")
			look("pod", p.Pod, note, append(texts(p.IPs), short)...)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(w.ByEgress)) {
		for _, node := range slices.Sorted(maps.Keys(w.ByEgress[name])) {
			pods(w.ByEgress[name][node], "of egress "+name+" on "+node)
		}
	}
	for _, node := range slices.Sorted(maps.Keys(w.Unselected)) {
		pods(w.Unselected[node], "of no egress, on "+node)
	}
	seen := map[[2]string]bool{}
	hits := slices.DeleteFunc(slices.Concat(ranks[:]...), func(h Hit) bool { // a pod may have an egress by one address alone
		again := seen[[2]string{h.Kind, h.Name}]
		seen[[2]string{h.Kind, h.Name}] = true
		return again
	})
	return hits[:min(most, len(hits))]
}

func addresses(p egress.Policy) (ips []netip.Addr) {
	for _, a := range p.Addresses {
		ips = append(ips, a.IP)
	}
	return ips
}

func texts(ips []netip.Addr) (out []string) {
	for _, ip := range ips {
		out = append(out, ip.String())
	}
	return out
}
