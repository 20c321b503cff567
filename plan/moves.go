package plan

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/egret-project/egret/egress"
)

// Arrivals returns the planned moves toward the node of IPs that another node holds: the node prepares itself and says so. By IP.
// There are never more than it has room for, but for what the operator forces on it: whoever asked does not know what others ask.
func Arrivals(s *egress.Snapshot, f Facts) []egress.Move {
	var out []egress.Move
	for ip, m := range s.Moves {
		o, owned := s.Owners[ip]
		if m.To != f.Node || !owned || o.Node == f.Node || !f.serves(s.Pools[PoolOf(s, ip)], ip) {
			continue
		}
		if slices.Contains(Candidates(s, PoolOf(s, ip)), f.Node) {
			out = append(out, m)
		}
	}
	if limit := s.Nodes[f.Node].Capacity; limit > 0 {
		slices.SortFunc(out, func(a, b egress.Move) int {
			return cmp.Or(cmp.Compare(btoi(b.Ready), btoi(a.Ready)), a.Since.Compare(b.Since), a.IP.Compare(b.IP))
		})
		room := limit - (Held(s, f.Node) - promised(s, f.Node))
		out = slices.DeleteFunc(out, func(m egress.Move) bool {
			room--
			return room < 0 && !m.Force
		})
	}
	slices.SortFunc(out, func(a, b egress.Move) int { return a.IP.Compare(b.IP) })
	return out
}

// promised returns how many of what Held counts the node does not hold yet.
func promised(s *egress.Snapshot, node string) int {
	n := 0
	for ip, m := range s.Moves {
		if o, owned := s.Owners[ip]; owned && m.To == node && o.Node != node && PoolOf(s, ip) != "" {
			n++
		}
	}
	return n
}

// Departure is a planned move whose target is ready: the owner stops answering for the IP and hands it over. A target that begins to restart
// is not.
type Departure struct {
	Owner egress.Owner
	Move  egress.Move
	To    egress.Agent
}

// Departures returns the planned moves, ready at their target, of IPs that the node holds. By IP.
func Departures(s *egress.Snapshot, f Facts) []Departure {
	var out []Departure
	for ip, m := range s.Moves {
		o, to := s.Owners[ip], s.Agents[m.To]
		if m.ReadyAt(to) && o.Node == f.Node && m.To != f.Node && slices.Contains(Candidates(s, PoolOf(s, ip)), m.To) {
			out = append(out, Departure{Owner: o, Move: m, To: to})
		}
	}
	slices.SortFunc(out, func(a, b Departure) int { return a.Owner.IP.Compare(b.Owner.IP) })
	return out
}

// Leaving returns the IP that a cordoned node gives away next, that of the oldest egress first, and who may take it, best first. None
// while one is on its way: one at a time. An IP that nobody can take stays where it is, in service, until somebody can. Of the two IPs of
// an egress the first goes where there is room for both, and then the second.
func Leaving(s *egress.Snapshot, f Facts) (next egress.Owner, to []string) {
	if !Cordoned(s, f.Node) {
		return next, nil
	}
	for ip := range s.Moves {
		if s.Owners[ip].Node == f.Node {
			return next, nil
		}
	}
	for _, t := range targets(s) {
		if o := s.Owners[t.IP]; o.Node == f.Node && t.Pool != "" {
			gone := []netip.Addr{t.IP}
			if s.Owners[t.partner.IP].Node == f.Node {
				gone = append(gone, t.partner.IP)
			}
			if to := rank(without(s, gone...))[t.IP]; len(to) > 0 {
				return o, to
			}
		}
	}
	return next, nil
}

// Misplaced is an IP whose owner is not the node that it would have if all were placed anew.
type Misplaced struct {
	Owner egress.Owner
	To    string
	Both  bool // the other IP of its egress goes with it
}

// Misplacements returns the IPs that are not where they would be if all were placed anew, oldest egress first: those that are pinned
// there, and those whose owner holds more IPs of the pool than that node by two or more. Without that bound one more egress, by which
// the share of each node grows, would move a fifth of the others. Those of cordoned and dead nodes are left out: they move for other
// reasons. So is an IP that follows the other one of its egress: it goes where that goes.
func Misplacements(s *egress.Snapshot) []Misplaced {
	anew := *s
	anew.Owners, anew.Moves = nil, nil
	first, all := rank(&anew), targets(s)
	load := map[[2]string]int{} // pool, node
	for _, t := range all {
		load[[2]string{t.Pool, s.Owners[t.IP].Node}]++
	}
	var out []Misplaced
	for _, t := range all {
		o, owned := s.Owners[t.IP]
		nodes := first[t.IP]
		paired := t.partner.IP.IsValid()
		if !owned || len(nodes) == 0 || nodes[0] == o.Node || !mayHold(s, s.Pools[t.Pool], o.Node) || paired && !t.leads() {
			continue
		}
		to := nodes[0]
		pinned := s.Pins[t.IP].Node == to || s.Pins[t.partner.IP].Node == to
		if pinned || load[[2]string{t.Pool, o.Node}] > load[[2]string{t.Pool, to}]+1 {
			out = append(out, Misplaced{Owner: o, To: to, Both: paired && s.Owners[t.partner.IP].Node != to})
		}
	}
	return out
}

// Rebalance returns which of the misplaced IPs is the next to move; ok is false while the cluster is not at rest (an IP is on the move,
// or without an owner although somebody could take it), or none has room where it belongs. All nodes agree, so the owner can ask for it.
func Rebalance(s *egress.Snapshot, misplaced []Misplaced) (next Misplaced, ok bool) {
	if len(s.Moves) > 0 || len(misplaced) == 0 || len(rank(s)) > 0 {
		return next, false
	}
	i := slices.IndexFunc(misplaced, func(m Misplaced) bool { return Room(s, m.To) > btoi(m.Both) })
	if i < 0 {
		return next, false
	}
	return misplaced[i], true
}

// without returns the snapshot as it were if nobody held the IPs.
func without(s *egress.Snapshot, ips ...netip.Addr) *egress.Snapshot {
	out := *s
	out.Owners = maps.Clone(s.Owners)
	for _, ip := range ips {
		delete(out.Owners, ip)
	}
	return &out
}

// Together returns ip and, if there is one, the other pool IP of its egress: they live on one node.
func Together(s *egress.Snapshot, ip netip.Addr) []netip.Addr {
	out := []netip.Addr{ip}
	for _, t := range targets(s) {
		if t.IP == ip && t.partner.Pool != "" {
			out = append(out, t.partner.IP)
		}
	}
	return out
}

// PoolOf returns the pool of an egress IP; empty: it is static, or unused.
func PoolOf(s *egress.Snapshot, ip netip.Addr) string {
	for _, p := range s.Egresses {
		for _, a := range p.Addresses {
			if a.IP == ip {
				return a.Pool
			}
		}
	}
	return ""
}
