package agent

import (
	"maps"
	"net/netip"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// takeovers are the egress IPs that come to this node: how long each takes, and why it comes.
type takeovers struct {
	begun map[netip.Addr]time.Time    // since when an IP has no living owner, or is to come here
	last  map[netip.Addr]string       // the living owner that an IP had last, elsewhere
	taken map[netip.Addr]egress.Owner // about to be used, since the last reconcile that programmed everything
	seen  seen
}

func newTakeovers() takeovers {
	return takeovers{begun: map[netip.Addr]time.Time{}, last: map[netip.Addr]string{}, taken: map[netip.Addr]egress.Owner{}}
}

// arrivals notes since when each egress IP has no living owner, or is on its way to this node.
func (m *metrics) arrivals(r *round, node string, dead func(string) bool) {
	if m == nil {
		return
	}
	if r.Partial { // this node takes over nothing
		m.begun, m.last, m.seen = map[netip.Addr]time.Time{}, map[netip.Addr]string{}, seen{}
		return
	}
	if m.seen.still(r.Snapshot, dead) {
		return
	}
	died, begun := map[string]bool{}, map[netip.Addr]time.Time{}
	note := func(ip netip.Addr) {
		if begun[ip] = m.begun[ip]; begun[ip].IsZero() {
			begun[ip] = r.now
		}
	}
	for _, e := range r.Egresses {
		for _, a := range e.Addresses {
			o, owned := r.Owners[a.IP]
			if owned && o.Node == node {
				begun[a.IP] = m.begun[a.IP] // until it is used
				continue
			}
			if !owned {
				note(a.IP)
				continue
			}
			gone, asked := died[o.Node]
			if !asked {
				gone = dead(o.Node)
				died[o.Node] = gone
			}
			m.last[a.IP] = o.Node
			if gone || r.Moves[a.IP].To == node {
				note(a.IP)
			}
		}
	}
	m.begun, m.seen = begun, seen{r.Egresses, r.Owners, r.Moves, died}
	maps.DeleteFunc(m.last, func(ip netip.Addr, _ string) bool {
		_, owned := r.Owners[ip]
		_, begun := begun[ip]
		return !owned && !begun
	})
}

// seen is what arrivals followed from.
type seen struct {
	egresses map[string]egress.Policy
	owners   map[netip.Addr]egress.Owner
	moves    map[netip.Addr]egress.Move
	died     map[string]bool // of the owners, who was dead; nil: nothing was seen
}

// still reports whether nothing of that has changed.
func (w seen) still(s *egress.Snapshot, dead func(string) bool) bool {
	if w.died == nil || !plan.Same(s.Egresses, w.egresses) || !plan.Same(s.Owners, w.owners) || !plan.Same(s.Moves, w.moves) {
		return false
	}
	for node, died := range w.died {
		if dead(node) != died {
			return false
		}
	}
	return true
}

// takes notes that this node is about to use an IP. What it used before this agent began has no beginning.
func (m *metrics) takes(o egress.Owner) {
	if m != nil {
		m.taken[o.IP] = o
	}
}

// cause says why an IP came here, and from which node; "": from none, or that is not known.
func (m *metrics) cause(o egress.Owner) (why, from string) {
	last := ""
	if m != nil {
		last = m.last[o.IP]
	}
	switch {
	case o.Why != egress.ReasonClaim:
		return string(o.Why), o.From
	case o.From != "":
		return string(egress.ReasonRelease), o.From
	case last != "":
		return string(egress.ReasonCrash), last
	}
	return string(egress.ReasonClaim), ""
}
