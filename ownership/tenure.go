package ownership

import (
	"net/netip"
	"time"

	"github.com/egret-project/egret/plan"
)

// tenures are the locks of this node, and what is left of those that it had.
type tenures struct {
	adopted map[netip.Addr]bool      // permits that the kernel had when this process began: no waiting for those
	seen    map[lock]time.Time       // since when a lock of this node is seen
	inUse   map[lock]bool            // locks of this node that it acts upon
	linger  map[netip.Addr]time.Time // until when this node relays for the IP's next owner
}

// lock is one tenure of an egress IP: the revision is the fencing token.
type lock struct {
	ip       netip.Addr
	revision int64
}

func (t *tenures) init() { t.adopted, t.linger = map[netip.Addr]bool{}, map[netip.Addr]time.Time{} }

// roles sets what this node may do for each egress IP, and says which locks it uses from now on, and which IPs come back to it.
func (m *Machine) roles(asking []netip.Addr) (news []Effect) {
	p, t := &m.pass, &m.tenures
	p.roles = map[netip.Addr]plan.Role{}
	seen, inUse, bound := map[lock]time.Time{}, map[lock]bool{}, m.bound()
	for ip, o := range p.snapshot.Owners {
		if !m.holds(o) {
			continue
		}
		k := lock{ip, o.Revision}
		// The former owner fell silent before it wrote the record, or the kernel of this node was in service all along.
		atOnce := o.From != "" || t.adopted[ip]
		if seen[k] = t.seen[k]; seen[k].IsZero() {
			seen[k] = p.now
			if atOnce {
				seen[k] = p.now.Add(-m.cfg.Permit)
			}
		}
		usable := seen[k].Add(m.cfg.Permit)
		if !atOnce {
			usable = later(usable, bound)
		}
		if !t.inUse[k] && p.now.Before(usable) {
			p.roles[ip] = plan.Pending
			p.next = earlier(p.next, usable)
			continue
		}
		if !t.inUse[k] { // else the snapshot may be older than the hand-over
			news = append(append(news, t.returned(ip)...), Used{o})
		}
		p.roles[ip], inUse[k] = plan.Hold, true
	}
	t.seen, t.inUse, t.adopted = seen, inUse, nil
	for _, ip := range asking {
		if p.roles[ip] == plan.None {
			p.roles[ip] = plan.Ask
		}
	}
	for _, o := range plan.Releases(p.snapshot, p.facts) {
		delete(p.roles, o.IP) // silent first: the lock goes only when the kernel is done
	}
	for _, move := range plan.Arrivals(p.snapshot, p.facts) {
		news = append(news, t.returned(move.IP)...)
		p.roles[move.IP] = plan.Arrive
	}
	for _, d := range plan.Departures(p.snapshot, p.facts) {
		if p.roles[d.Owner.IP] == plan.Hold {
			p.roles[d.Owner.IP] = plan.Relay
		}
	}
	for ip, until := range t.linger {
		if !p.now.Before(until) {
			delete(t.linger, ip)
		} else if p.roles[ip] == plan.None {
			p.roles[ip] = plan.Relay
			p.next = earlier(p.next, until)
		}
	}
	return news
}

// returned ends the relaying for the next owner of an IP.
func (t *tenures) returned(ip netip.Addr) []Effect {
	if _, lingers := t.linger[ip]; !lingers {
		return nil
	}
	delete(t.linger, ip)
	return []Effect{Returned{ip}}
}
