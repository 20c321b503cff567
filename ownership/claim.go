package ownership

import (
	"net/netip"
	"time"

	"github.com/egret-project/egret/egress"
)

// claims is what is known of the IPs that nobody holds.
type claims struct {
	unowned map[netip.Addr]time.Time    // since when an IP is seen without an owner
	last    map[netip.Addr]egress.Owner // the last one of each of them
	owners  map[netip.Addr]egress.Owner // as of the last look at what nobody holds
	shorter time.Time                   // since when the longest P could be shorter
}

// claim tries for the egress IPs whose time has come: the first in rank at once, each next one a step later.
func (m *Machine) claim() []Effect {
	c, now := m.round.cluster, m.round.now
	unowned, last := map[netip.Addr]time.Time{}, map[netip.Addr]egress.Owner{}
	lag := 0
	if living := *c.Snapshot; m.cfg.Gossip && len(m.peers.living) == 0 {
		lag = 1 // cut off from its peers: they go first
	} else if m.cfg.Gossip {
		living.Agents = m.peers.living
		c = c.With(&living)
	}
	var out []Effect
	for _, claim := range c.Claims(m.round.facts) {
		ip := claim.IP
		if unowned[ip] = m.claims.unowned[ip]; unowned[ip].IsZero() {
			unowned[ip] = now
		}
		if last[ip] = m.claims.last[ip]; m.claims.owners[ip].Revision > 0 {
			last[ip] = m.claims.owners[ip]
		}
		if due := unowned[ip].Add(time.Duration(claim.Rank+lag) * m.cfg.ClaimDelay); now.Before(due) {
			m.round.next = earlier(m.round.next, due)
			continue
		}
		out = append(out, Claim{Claim: claim, Seen: last[ip].Revision, Suspicion: m.suspicion(last[ip])})
	}
	m.claims.unowned, m.claims.last, m.claims.owners = unowned, last, m.round.cluster.Owners
	return out
}

// suspicion returns the one that stands against the owner of a lock that has ended. Under another lease the agent may
// have been one that does not end suspicions.
func (m *Machine) suspicion(o egress.Owner) egress.Suspicion {
	s, stands := m.round.cluster.Suspicions[o.Node]
	if stands && s.Lease == egress.FormatLease(o.Lease) && !m.peers.suspicions[o.Node].void {
		return s
	}
	return egress.Suspicion{}
}
