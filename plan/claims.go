package plan

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
)

// Facts are what a node knows about itself.
type Facts struct {
	Node string
	// Underlay is the node's overlay endpoint: one of its own addresses.
	Underlay netip.Addr
	// Uplink is the link that carries Underlay.
	Uplink Link
	// Links are the links of the node, and PoolUplink the one that all egress IPs leave by; empty: that follows from the IP. NoVLAN says that
	// the kernel has no VLAN links.
	Links      []Link
	PoolUplink string
	NoVLAN     bool
	// AnswersARP says that the tables can answer ARP requests, whether the kernel would or not.
	AnswersARP bool
	// Local are the unicast addresses on the node's links, those of Egret's own links left out.
	Local map[netip.Addr]bool
	// Hold is for how long a pod that is not known yet waits with its first connection to the outside; 0: not at all.
	Hold time.Duration
	// Taken are the egress IPs that the node does not try for at present, since a host outside the cluster uses them.
	Taken map[netip.Addr]bool
	// RandomPorts is nft.State's.
	RandomPorts bool
	// Except are destinations that are never SNATed, on top of those that the snapshot names.
	Except []netip.Prefix
	// Cluster are the ranges that the operator named of pods and Services, as those of pods/-: what comes from them may be a pod.
	Cluster []netip.Prefix
}

// Claim is an egress IP that a node tries for.
type Claim struct {
	IP  netip.Addr
	Why egress.Reason
	// Rank is 0 for the node that claims at once; each next one waits a step longer.
	Rank int
	// Link is where neighbours will ask for the IP. That of a VLAN may have to be made: see Ask.
	Link string
}

// target is one egress IP, as the egresses that use it describe it.
type target struct {
	egress.Address
	egresses  []string          // sorted
	created   int64             // of the oldest, Unix nanoseconds
	bandwidth *egress.Bandwidth // the one with the lowest rate; nil: none sets a limit
	// partner is the other address of the egress that a pool IP belongs to: both live on one node. The zero Address: there is none.
	partner egress.Address
}

// leads reports whether the partner follows the target, rather than the other way round. A static IP is where it is.
func (t target) leads() bool { return t.partner.Pool != "" && t.IP.Less(t.partner.IP) }

// targets returns the egress IPs of the snapshot, oldest egress first.
func targets(s *egress.Snapshot) []target {
	byIP := map[netip.Addr]*target{}
	for _, name := range slices.Sorted(maps.Keys(s.Egresses)) {
		p := s.Egresses[name]
		for _, a := range p.Addresses {
			t := byIP[a.IP]
			if t == nil {
				t = &target{Address: a, created: p.Created.UnixNano()}
				byIP[a.IP] = t
				if i := slices.IndexFunc(p.Addresses, func(o egress.Address) bool { return o.IP != a.IP }); a.Pool != "" && i >= 0 {
					t.partner = p.Addresses[i]
				}
			}
			t.egresses = append(t.egresses, name)
			t.created = min(t.created, p.Created.UnixNano())
			if b := p.Bandwidth; b != nil && (t.bandwidth == nil || b.Rate < t.bandwidth.Rate) {
				t.bandwidth = b
			}
		}
	}
	out := make([]target, 0, len(byIP))
	for _, t := range byIP {
		out = append(out, *t)
	}
	slices.SortFunc(out, func(a, b target) int {
		return cmp.Or(cmp.Compare(a.created, b.created), a.IP.Compare(b.IP))
	})
	return out
}

// Claims returns the egress IPs that nobody holds and that the node may hold, by IP. Pool IPs are ranked among all candidates; a
// static IP is claimed by whoever has it on a link. There are never more pool IPs than the node has room for: what it is first for
// goes before what it would take in another's place, and older egresses before younger. A node without a record claims nothing.
func Claims(s *egress.Snapshot, f Facts) []Claim {
	if _, known := s.Nodes[f.Node]; !known || !f.Uplink.Up {
		return nil
	}
	var out []Claim
	all, ranked := targets(s), rank(s)
	for _, t := range all {
		if i := slices.Index(ranked[t.IP], f.Node); i >= 0 && f.serves(s.Pools[t.Pool], t.IP) && !f.Taken[t.IP] {
			out = append(out, Claim{IP: t.IP, Why: egress.ReasonClaim, Rank: i, Link: f.link(s.Pools[t.Pool], t.IP)})
		}
	}
	slices.SortStableFunc(out, func(a, b Claim) int { return cmp.Compare(a.Rank, b.Rank) })
	out = out[:min(len(out), Room(s, f.Node))]
	for _, t := range all {
		if _, owned := s.Owners[t.IP]; !owned && t.Pool == "" && f.Local[t.IP] {
			out = append(out, Claim{IP: t.IP, Why: egress.ReasonStatic})
		}
	}
	slices.SortFunc(out, func(a, b Claim) int { return a.IP.Compare(b.IP) })
	return out
}

// rank returns, for every pool IP that nobody holds, its candidates, best first. A node's name is there at most once.
//
// The order is that of rendezvous hashing with bounded load: a node that has its share of the pool already, the mean rounded down, comes
// after those that have not, by how far it is above, so that the IPs of a dead node spread over all survivors. The operator's wish (a pin,
// or a move under way) comes before everything. Of the two IPs of an egress, the second goes where the first is, or is to go, and the
// first where the second is already.
func rank(s *egress.Snapshot) map[netip.Addr][]string {
	all := targets(s)
	size := map[string]int{} // pool -> egress IPs in use
	held := map[string]int{} // node -> egress IPs held, or promised below
	inPool := map[[2]string]int{}
	for _, t := range all {
		size[t.Pool]++
		if o, owned := s.Owners[t.IP]; owned && t.Pool != "" {
			held[o.Node]++
			inPool[[2]string{t.Pool, o.Node}]++
			if m, moving := s.Moves[t.IP]; moving && m.To != o.Node { // both have it for a moment
				held[m.To]++
				inPool[[2]string{t.Pool, m.To}]++
			}
		}
	}
	out := map[netip.Addr][]string{}
	able := map[string][]string{} // pool -> Candidates
	for _, t := range all {
		if _, owned := s.Owners[t.IP]; owned || t.Pool == "" {
			continue
		}
		for _, pool := range []string{t.Pool, t.partner.Pool} {
			if _, known := able[pool]; !known {
				able[pool] = Candidates(s, pool)
			}
		}
		if first := out[t.partner.IP]; len(first) > 0 {
			out[t.IP] = first
			inPool[[2]string{t.Pool, first[0]}]++ // held has it already
			continue
		}
		room := 1
		if _, owned := s.Owners[t.partner.IP]; t.leads() && !owned {
			room = 2
		}
		var nodes []string
		for _, n := range candidates(s, t, able) {
			if limit := s.Nodes[n].Capacity; limit == 0 || held[n]+room <= limit {
				nodes = append(nodes, n)
			}
		}
		if len(nodes) == 0 {
			continue
		}
		share := size[t.Pool] / len(nodes)
		full := func(n string) int { return max(inPool[[2]string{t.Pool, n}]+1-share, 0) }
		wish := cmp.Or(wished(s, t.IP), wished(s, t.partner.IP))
		type place struct {
			wished, full int
			weight       uint64
		}
		places := map[string]place{}
		for _, n := range nodes {
			places[n] = place{btoi(n == wish), full(n), weight(t.IP, n)}
		}
		slices.SortFunc(nodes, func(a, b string) int {
			x, y := places[a], places[b]
			return cmp.Or(cmp.Compare(y.wished, x.wished), cmp.Compare(x.full, y.full), cmp.Compare(y.weight, x.weight), cmp.Compare(a, b))
		})
		out[t.IP] = nodes
		held[nodes[0]] += room
		inPool[[2]string{t.Pool, nodes[0]}]++
	}
	return out
}

// candidates returns the nodes that may hold a pool IP beside its partner, capacity left aside. able has the Candidates of both pools.
func candidates(s *egress.Snapshot, t target, able map[string][]string) []string {
	nodes := able[t.Pool]
	if !t.partner.IP.IsValid() {
		return nodes
	}
	both := nodes
	if t.partner.Pool != "" {
		both = able[t.partner.Pool]
	}
	o, owned := s.Owners[t.partner.IP]
	return slices.DeleteFunc(slices.Clone(nodes), func(n string) bool {
		switch {
		case owned:
			return n != o.Node || !slices.Contains(both, n)
		case t.partner.Pool == "" || !t.leads():
			return true // it waits for the one that it follows
		}
		return !slices.Contains(both, n)
	})
}

// apart reports whether the IP, which the node holds, has to follow its partner to where that may be or is held. While a planned move
// brings them together, neither goes; from a cordoned node, the IP follows by a planned move.
func apart(s *egress.Snapshot, t target, node string) bool {
	if p, known := s.Pools[t.partner.Pool]; known && !selects(s, p, node) {
		return true
	}
	o, owned := s.Owners[t.partner.IP]
	return owned && o.Node != node && !t.leads() && s.Moves[t.IP].To != o.Node && s.Moves[t.partner.IP].To != node && !Cordoned(s, node)
}

// Candidates returns the nodes that may hold the IPs of a pool, capacity left aside: those that the pool selects, with a live agent that can
// serve it and is not about to restart, and that are not cordoned. What a node holds while its agent restarts it keeps. Sorted. A pool that is
// not there has none.
func Candidates(s *egress.Snapshot, pool string) []string {
	p, ok := s.Pools[pool]
	if !ok {
		return nil
	}
	var out []string
	for name := range s.Agents {
		if a := s.Agents[name]; mayHold(s, p, name) && a.Refused[pool] == "" && !a.Restarting {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func mayHold(s *egress.Snapshot, p egress.Pool, node string) bool {
	return selects(s, p, node) && !Cordoned(s, node)
}

func selects(s *egress.Snapshot, p egress.Pool, node string) bool {
	n, known := s.Nodes[node]
	return known && p.NodeSelector.Matches(n.Labels)
}

// Gone reports whether a node has no record, not even one that cannot be read: its Node object was deleted, or crdsync has not written the
// record yet. Such a node serves nothing: no other one knows a way to it.
func Gone(s *egress.Snapshot, node string) bool {
	_, known := s.Nodes[node]
	return !known && !slices.ContainsFunc(s.Faults, func(f egress.Fault) bool { return f.Key == "nodes/"+node })
}

// Cordoned reports whether a node gives its IPs away and takes none.
func Cordoned(s *egress.Snapshot, node string) bool {
	_, cordoned := s.Cordons[node]
	return cordoned || s.Nodes[node].Cordoned
}

// Held returns how many pool IPs a node holds, or is about to by a planned move.
func Held(s *egress.Snapshot, node string) int {
	n := 0
	for _, t := range targets(s) {
		o, owned := s.Owners[t.IP]
		if owned && t.Pool != "" && (o.Node == node || s.Moves[t.IP].To == node) {
			n++
		}
	}
	return n
}

// Room returns how many more pool IPs a node may take; math.MaxInt: it has no limit.
func Room(s *egress.Snapshot, node string) int {
	limit := s.Nodes[node].Capacity
	if limit == 0 {
		return math.MaxInt
	}
	return max(limit-Held(s, node), 0)
}

// wished returns the node that the operator wants to hold ip, or "".
func wished(s *egress.Snapshot, ip netip.Addr) string {
	if m, ok := s.Moves[ip]; ok {
		return m.To
	}
	return s.Pins[ip].Node
}

// weight is the rendezvous hash: the node with the largest weight for an IP is its first choice.
func weight(ip netip.Addr, node string) uint64 { return weightOf(ip.String(), node) }

func weightOf(what, node string) uint64 {
	h := sha256.Sum256([]byte(what + "/" + node))
	return binary.BigEndian.Uint64(h[:])
}

// Releases returns the locks of the node that it has to give back: of IPs that no egress uses any more, that their pool keeps from
// this node, that it cannot serve because its uplink has no carrier or no IPv6, whose egress has its other IP elsewhere, and of static IPs
// that left its links. While the record of some egress or pool cannot be read, nothing is given back for want of it. What a cordoned node
// holds leaves by planned moves: see Leaving.
func Releases(s *egress.Snapshot, f Facts) []egress.Owner {
	byIP := map[netip.Addr]target{}
	for _, t := range targets(s) {
		byIP[t.IP] = t
	}
	var out []egress.Owner
	for ip, o := range s.Owners {
		if o.Node != f.Node {
			continue
		}
		t, used := byIP[ip]
		p, known := s.Pools[t.Pool]
		switch {
		case !used || t.Pool != "" && !known:
			if !faulty(s, "egresses/") && !faulty(s, "pools/") {
				out = append(out, o)
			}
		case t.Pool == "" && !f.Local[ip]:
			out = append(out, o)
		case t.Pool != "" && !faulty(s, "nodes/") && !selects(s, p, f.Node):
			out = append(out, o)
		case t.Pool != "" && !f.serves(p, ip):
			out = append(out, o)
		case t.Pool != "" && !faulty(s, "nodes/") && !faulty(s, "egresses/") && apart(s, t, f.Node):
			out = append(out, o)
		}
	}
	slices.SortFunc(out, func(a, b egress.Owner) int { return a.IP.Compare(b.IP) })
	return out
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
