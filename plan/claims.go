package plan

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
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
	// Links are the links of the node, and PoolUplink the one that all egress IPs leave by; empty: that follows from
	// the IP. NoVLAN says that the kernel has no VLAN links.
	Links      []Link
	PoolUplink string
	NoVLAN     bool
	// AnswersARP says that the tables can answer ARP requests, whether the kernel would or not.
	AnswersARP bool
	// Local are the unicast addresses on the node's links, those of Egret's own links left out.
	Local map[netip.Addr]bool
	// FirstPacketDelay is for how long a pod that is not known yet waits with its first connection to the outside; 0:
	// not at all.
	FirstPacketDelay time.Duration
	// Taken are the egress IPs that the node does not try for at present, since a host outside the cluster uses them.
	Taken map[netip.Addr]bool
	// RandomPorts is nft.State's.
	RandomPorts bool
	// Except are destinations that are never SNATed, on top of those that the snapshot names.
	Except []netip.Prefix
	// Cluster are the ranges that the operator named of pods and Services, as those of pods/-: what comes from them may
	// be a pod.
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

// Claims returns the egress IPs that nobody owns and that the node may own, by IP. Pool IPs are ranked among all
// candidates; a static IP is claimed by the node that has it on a link. There are never more pool IPs than the node has
// free capacity: IPs for which it is first in rank go before others, and older egresses before younger. A node without
// a record claims nothing.
func (c *Cluster) Claims(f Facts) []Claim {
	s := c.Snapshot
	if _, known := s.Nodes[f.Node]; !known || !f.Uplink.Up {
		return nil
	}
	var out []Claim
	ranked := c.rank()
	for _, t := range c.free() {
		if i := slices.Index(ranked[t.IP], f.Node); i >= 0 && f.serves(s.Pools[t.Pool], t.IP) && !f.Taken[t.IP] {
			out = append(out, Claim{IP: t.IP, Why: egress.ReasonClaim, Rank: i, Link: f.link(s.Pools[t.Pool], t.IP)})
		}
	}
	if len(out) > 0 {
		slices.SortStableFunc(out, func(a, b Claim) int { return cmp.Compare(a.Rank, b.Rank) })
		out = out[:min(len(out), c.FreeCapacity(f.Node))]
	}
	for _, t := range c.free() {
		if t.Pool == "" && f.Local[t.IP] {
			out = append(out, Claim{IP: t.IP, Why: egress.ReasonStatic})
		}
	}
	slices.SortFunc(out, func(a, b Claim) int { return a.IP.Compare(b.IP) })
	return out
}

// rank returns, for every pool IP without an owner, its candidates, best first. A node's name is there at most once.
//
// The order is that of rendezvous hashing with bounded load: a node that has its share of the pool already, the mean
// rounded down, comes after those that have not, by how far it is above, so that the IPs of a dead node spread over all
// survivors. The operator's preference (a pin, or a move under way) comes before everything. Of the two IPs of an
// egress, the second goes where the first is, or is to go, and the first where the second is already.
func (c *Cluster) rank() map[netip.Addr][]string {
	s := c.Snapshot
	if !slices.ContainsFunc(c.free(), func(t target) bool { return t.Pool != "" }) {
		return nil
	}
	size := map[string]int{} // pool -> egress IPs in use
	load := map[string]int{} // node -> egress IPs that it owns, or is first for below
	inPool := map[[2]string]int{}
	for _, t := range c.targets {
		size[t.Pool]++
		if o, owned := s.Owners[t.IP]; owned && t.Pool != "" {
			load[o.Node]++
			inPool[[2]string{t.Pool, o.Node}]++
			if m, moving := s.Moves[t.IP]; moving && m.To != o.Node { // both have it for a moment
				load[m.To]++
				inPool[[2]string{t.Pool, m.To}]++
			}
		}
	}
	type place struct {
		node              string
		preferred, inPool int
		weight            uint64
	}
	var places []place
	out := map[netip.Addr][]string{}
	for _, t := range c.free() {
		if t.Pool == "" {
			continue
		}
		if first := out[t.partner.IP]; len(first) > 0 {
			out[t.IP] = first
			inPool[[2]string{t.Pool, first[0]}]++ // load has it already
			continue
		}
		room := 1
		if _, owned := s.Owners[t.partner.IP]; t.leads() && !owned {
			room = 2
		}
		places = places[:0]
		preference, weight := cmp.Or(preferred(s, t.IP), preferred(s, t.partner.IP)), weights(t.IP.String())
		for _, n := range c.candidates(t) {
			if limit := s.Nodes[n].Capacity; limit == 0 || load[n]+room <= limit {
				places = append(places, place{n, btoi(n == preference), inPool[[2]string{t.Pool, n}], weight(n)})
			}
		}
		if len(places) == 0 {
			continue
		}
		share := size[t.Pool] / len(places)
		slices.SortFunc(places, func(a, b place) int {
			full := func(p place) int { return max(p.inPool+1-share, 0) }
			return cmp.Or(cmp.Compare(b.preferred, a.preferred), cmp.Compare(full(a), full(b)), cmp.Compare(b.weight, a.weight), cmp.Compare(a.node, b.node))
		})
		nodes := make([]string, len(places))
		for i, p := range places {
			nodes[i] = p.node
		}
		out[t.IP] = nodes
		load[nodes[0]] += room
		inPool[[2]string{t.Pool, nodes[0]}]++
	}
	return out
}

// candidates returns the nodes that may own a pool IP beside its partner, capacity left aside.
func (c *Cluster) candidates(t target) []string {
	s, nodes := c.Snapshot, c.Candidates(t.Pool)
	if !t.partner.IP.IsValid() {
		return nodes
	}
	both := nodes
	if t.partner.Pool != "" {
		both = c.Candidates(t.partner.Pool)
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

// apart reports whether the IP, which the node holds, has to follow its partner to where that may be or is held. While
// a planned move brings them together, neither goes; from a cordoned node, the IP follows by a planned move.
func apart(s *egress.Snapshot, t target, node string) bool {
	if p, known := s.Pools[t.partner.Pool]; known && !selects(s, p, node) {
		return true
	}
	o, owned := s.Owners[t.partner.IP]
	return owned && o.Node != node && !t.leads() && s.Moves[t.IP].To != o.Node && s.Moves[t.partner.IP].To != node && !Cordoned(s, node)
}

func mayOwn(s *egress.Snapshot, p egress.Pool, node string) bool {
	return selects(s, p, node) && !Cordoned(s, node)
}

func selects(s *egress.Snapshot, p egress.Pool, node string) bool {
	n, known := s.Nodes[node]
	return known && p.NodeSelector.Matches(n.Labels)
}

// Gone reports whether a node has no record, not even one that cannot be read: its Node object was deleted, or crdsync
// has not written the record yet. Such a node serves nothing: no other one knows a way to it.
func Gone(s *egress.Snapshot, node string) bool {
	_, known := s.Nodes[node]
	return !known && !slices.ContainsFunc(s.Faults, func(f egress.Fault) bool { return f.Key == "nodes/"+node })
}

// Cordoned reports whether a node gives its IPs away and takes none.
func Cordoned(s *egress.Snapshot, node string) bool {
	_, cordoned := s.Cordons[node]
	return cordoned || s.Nodes[node].Cordoned
}

// preferred returns the node that the operator wants to own ip, or "".
func preferred(s *egress.Snapshot, ip netip.Addr) string {
	if m, ok := s.Moves[ip]; ok {
		return m.To
	}
	return s.Pins[ip].Node
}

// weights returns the rendezvous hash of what is to be given to a node, an IP or a task: the node with the largest
// weight is its first choice.
func weights(what string) func(node string) uint64 {
	key := []byte(what + "/")
	length := len(key)
	return func(node string) uint64 {
		key = append(key[:length], node...)
		h := sha256.Sum256(key)
		return binary.BigEndian.Uint64(h[:])
	}
}

// Releases returns the locks of the node that it has to give back: of IPs that no egress uses any more, that their pool
// keeps from this node, that it cannot serve because its uplink has no carrier or no IPv6, whose egress has its other
// IP elsewhere, and of static IPs that left its links. While the record of some egress or pool cannot be read, nothing
// is given back for want of it. What a cordoned node holds leaves by planned moves: see Leaving.
func (c *Cluster) Releases(f Facts) []egress.Owner {
	s := c.Snapshot
	var out []egress.Owner
	for ip, o := range c.Held(f.Node) {
		t, used := c.target(ip)
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
