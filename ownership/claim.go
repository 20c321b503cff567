package ownership

import (
	"net/netip"
	"time"

	"github.com/egret-project/egret/plan"
)

// claims is what is known of the IPs that nobody holds.
type claims struct {
	unowned map[netip.Addr]time.Time // since when an IP is seen without an owner
	seen    map[netip.Addr]int64     // the revision of an IP's last lock
	shorter time.Time                // since when the longest P could be shorter
}

// claim tries for the egress IPs whose time has come: the first in rank at once, each next one a step later.
func (m *Machine) claim() []Effect {
	s, now := m.pass.snapshot, m.pass.now
	unowned, seen := map[netip.Addr]time.Time{}, map[netip.Addr]int64{}
	for ip, o := range s.Owners {
		seen[ip] = o.Revision
	}
	lag := 0
	if m.cfg.Gossip {
		living := *s
		living.Agents = plan.Living(s, m.cfg.Node, m.peers.dead)
		if s = &living; len(living.Agents) == 0 {
			s, lag = m.pass.snapshot, 1 // cut off from its peers: they go first
		}
	}
	var out []Effect
	for _, c := range plan.Claims(s, m.pass.facts) {
		if unowned[c.IP] = m.claims.unowned[c.IP]; unowned[c.IP].IsZero() {
			unowned[c.IP] = now
		}
		seen[c.IP] = m.claims.seen[c.IP]
		if due := unowned[c.IP].Add(time.Duration(c.Rank+lag) * m.cfg.ClaimDelay); now.Before(due) {
			m.pass.next = earlier(m.pass.next, due)
			continue
		}
		out = append(out, Claim{Claim: c, Seen: seen[c.IP]})
	}
	m.claims.unowned, m.claims.seen = unowned, seen
	return out
}
