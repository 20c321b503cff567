package plan

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/egret-project/egret/egress"
)

// Arrivals returns the planned moves toward the node of IPs that another node holds: the node prepares itself and says
// so. By IP. There are never more than it has capacity for, but for what the operator forces on it: whoever asked does
// not know what others ask.
func (c *Cluster) Arrivals(f Facts) []egress.Move {
	s := c.Snapshot
	var out []egress.Move
	for ip, m := range s.Moves {
		o, owned := s.Owners[ip]
		if m.To != f.Node || !owned || o.Node == f.Node || !f.serves(s.Pools[c.PoolOf(ip)], ip) {
			continue
		}
		if slices.Contains(c.Candidates(c.PoolOf(ip)), f.Node) {
			out = append(out, m)
		}
	}
	if limit := s.Nodes[f.Node].Capacity; limit > 0 {
		slices.SortFunc(out, func(a, b egress.Move) int {
			return cmp.Or(cmp.Compare(btoi(b.Ready), btoi(a.Ready)), a.Since.Compare(b.Since), a.IP.Compare(b.IP))
		})
		room := limit - (c.Owned(f.Node) - c.promised(f.Node))
		out = slices.DeleteFunc(out, func(m egress.Move) bool {
			room--
			return room < 0 && !m.Force
		})
	}
	slices.SortFunc(out, func(a, b egress.Move) int { return a.IP.Compare(b.IP) })
	return out
}

// promised returns how many of the IPs that Owned counts the node does not own yet.
func (c *Cluster) promised(node string) int {
	n := 0
	for ip, m := range c.Moves {
		if o, owned := c.Owners[ip]; owned && m.To == node && o.Node != node && c.PoolOf(ip) != "" {
			n++
		}
	}
	return n
}

// Departure is a planned move whose target is ready: the owner stops answering for the IP and hands it over. A target
// that begins to restart is not.
type Departure struct {
	Owner egress.Owner
	Move  egress.Move
	To    egress.Agent
}

// Departures returns the planned moves, ready at their target, of IPs that the node holds. By IP.
func (c *Cluster) Departures(f Facts) []Departure {
	s := c.Snapshot
	var out []Departure
	for ip, m := range s.Moves {
		o, to := s.Owners[ip], s.Agents[m.To]
		if m.ReadyAt(to) && o.Node == f.Node && m.To != f.Node && slices.Contains(c.Candidates(c.PoolOf(ip)), m.To) {
			out = append(out, Departure{Owner: o, Move: m, To: to})
		}
	}
	slices.SortFunc(out, func(a, b Departure) int { return a.Owner.IP.Compare(b.Owner.IP) })
	return out
}

// Leaving returns the IP that a cordoned node gives away next, that of the oldest egress first, and the nodes that may
// take it, best first. None while another is moving: one at a time. An IP that no node can take stays where it is, in
// service, until one can. Of the two IPs of an egress the first goes where there is room for both, and then the second.
func (c *Cluster) Leaving(f Facts) (next egress.Owner, to []string) {
	s := c.Snapshot
	if !Cordoned(s, f.Node) {
		return next, nil
	}
	for ip := range s.Moves {
		if s.Owners[ip].Node == f.Node {
			return next, nil
		}
	}
	for _, t := range c.targets {
		if o := s.Owners[t.IP]; o.Node == f.Node && t.Pool != "" {
			gone := []netip.Addr{t.IP}
			if s.Owners[t.partner.IP].Node == f.Node {
				gone = append(gone, t.partner.IP)
			}
			if to := c.without(gone...).rank()[t.IP]; len(to) > 0 {
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

// Misplacements returns the IPs that are not where they would be if all were placed anew, oldest egress first: those
// that are pinned there, and those whose owner holds more IPs of the pool than that node by two or more. Without that
// bound one more egress, by which the share of each node grows, would move a fifth of the others. Those of cordoned and
// dead nodes are left out: they move for other reasons. So is an IP that follows the other one of its egress: it goes
// where that goes.
func (c *Cluster) Misplacements() []Misplaced {
	s, anew := c.Snapshot, *c.Snapshot
	anew.Owners, anew.Moves = nil, nil
	first := c.With(&anew).rank()
	load := map[[2]string]int{} // pool, node
	for _, t := range c.targets {
		load[[2]string{t.Pool, s.Owners[t.IP].Node}]++
	}
	var out []Misplaced
	for _, t := range c.targets {
		o, owned := s.Owners[t.IP]
		nodes := first[t.IP]
		paired := t.partner.IP.IsValid()
		if !owned || len(nodes) == 0 || nodes[0] == o.Node || !mayOwn(s, s.Pools[t.Pool], o.Node) || paired && !t.leads() {
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

// Rebalance returns which of the misplaced IPs is the next to move; ok is false while the cluster is not at rest (an IP
// is on the move, or without an owner although a node could take it), or none fits the capacity of the node to which it
// belongs. All nodes get the same result, so the owner can ask for the move.
func (c *Cluster) Rebalance(misplaced []Misplaced) (next Misplaced, ok bool) {
	if len(c.Moves) > 0 || len(misplaced) == 0 || len(c.rank()) > 0 {
		return next, false
	}
	i := slices.IndexFunc(misplaced, func(m Misplaced) bool { return c.FreeCapacity(m.To) > btoi(m.Both) })
	if i < 0 {
		return next, false
	}
	return misplaced[i], true
}

// without returns the cluster as it were if nobody owned the IPs.
func (c *Cluster) without(ips ...netip.Addr) *Cluster {
	s := *c.Snapshot
	s.Owners = maps.Clone(s.Owners)
	for _, ip := range ips {
		delete(s.Owners, ip)
	}
	return c.With(&s)
}
