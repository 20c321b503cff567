package ownership

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// tenures are the locks of this node, and what is left of those that it had.
type tenures struct {
	adopted  map[netip.Addr]bool      // permits that the kernel had when this process began: no waiting for those
	waits    map[lock]time.Time       // since when a lock of this node is seen that it may not use yet
	inUse    map[lock]bool            // locks of this node that it acts upon
	released map[lock]bool            // locks of this node that it gives back, whatever comes; true: unused
	handed   map[lock]bool            // locks of this node that it has handed over, or may have
	linger   map[netip.Addr]time.Time // until when this node relays for the IP's next owner
	seen     bool                     // this process has seen all locks of this etcd
	joined   time.Time                // since when etcd has its record under this lease; zero: it has not
	restores int                      // of etcd, as of the last round
}

// lock is one tenure of an egress IP: the revision is the fencing token.
type lock struct {
	ip       netip.Addr
	revision int64
}

func (t *tenures) init() {
	t.adopted, t.linger = map[netip.Addr]bool{}, map[netip.Addr]time.Time{}
	t.released, t.handed = map[lock]bool{}, map[lock]bool{}
}

// roles sets what this node may do for each egress IP, and says which locks it uses from now on, and which IPs come
// back to it.
func (m *Machine) roles(asking []netip.Addr) (news []Effect) {
	p, t := &m.round, &m.tenures
	p.roles = map[netip.Addr]plan.Role{}
	if p.cluster.Restores != t.restores {
		// What this node and others had in the etcd of before is not known any more: all wait for all.
		t.seen, t.restores = false, p.cluster.Restores
		t.waits, t.inUse, t.adopted, m.claims = nil, nil, nil, claims{}
		maps.Copy(t.released, t.handed)
		clear(t.handed)
		for k := range t.released {
			t.released[k] = true
		}
		t.joined = time.Time{}
	}
	first := !t.seen
	t.seen = t.seen || !p.cluster.Partial
	if p.cluster.Agents[m.cfg.Node].Lease != egress.FormatLease(p.lease) {
		t.joined = time.Time{}
	} else if t.joined.IsZero() {
		t.joined = p.now
	}
	p.find()
	for k := range t.handed {
		// The snapshot may be older than the hand-over, and the move be none any more in it.
		if !slices.ContainsFunc(p.departures, func(d plan.Departure) bool { return d.Owner.IP == k.ip }) {
			delete(t.handed, k)
			t.released[k] = false
		}
	}
	over := func(k lock, _ bool) bool {
		o := p.cluster.Owners[k.ip]
		return o.Revision != k.revision || !m.owns(o)
	}
	maps.DeleteFunc(t.released, over)
	maps.DeleteFunc(t.handed, over)
	bound := m.bound()
	longest := max(m.cfg.Permit, p.cluster.Longest)
	if m.cfg.Gossip {
		// By then those who lost etcd before this agent was in it know by the gossip that it is, and the permits that
		// they have without its promise are over.
		joined := t.joined
		if joined.IsZero() {
			joined = p.now
		}
		bound = later(bound, joined.Add(joinGrace+longest))
	}
	waits, inUse := map[lock]time.Time{}, map[lock]bool{}
	for ip, o := range p.cluster.Held(m.cfg.Node) {
		if !m.owns(o) {
			continue
		}
		k := lock{ip, o.Revision}
		if _, released := t.released[k]; released {
			continue
		}
		// The former owner fell silent before it wrote the record, in this etcd, or the kernel of this node was in
		// service all along.
		atOnce := o.From != "" && !first || t.adopted[ip]
		since, waiting := t.waits[k]
		if !waiting && !atOnce && !t.inUse[k] {
			// the former owner got no yes from a suspicion on that stood until its lease ended
			if since, waiting = p.now, true; !first {
				since = m.peers.suspected(o.Suspicion, p.now)
			}
		}
		if usable := later(since.Add(longest), bound); waiting && p.now.Before(usable) {
			waits[k], p.roles[ip] = since, plan.Pending
			p.next = earlier(p.next, usable)
			continue
		}
		if !t.inUse[k] { // else the snapshot may be older than the hand-over
			news = append(append(news, t.returned(ip)...), Used{o})
		}
		p.roles[ip], inUse[k] = plan.Own, true
	}
	t.waits, t.inUse, t.adopted = waits, inUse, nil
	for _, ip := range asking {
		if p.roles[ip] == plan.None {
			p.roles[ip] = plan.Ask
		}
	}
	for _, o := range p.releases {
		delete(p.roles, o.IP) // silent first: the lock goes only when the kernel is done
	}
	for _, move := range p.arrivals {
		news = append(news, t.returned(move.IP)...)
		p.roles[move.IP] = plan.Arrive
	}
	for _, d := range p.departures {
		if p.roles[d.Owner.IP] == plan.Own {
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

// find finds what cluster and facts say of the IPs that this node has to give back, and of those that move to it and
// from it.
func (r *round) find() {
	r.releases, r.departures = r.cluster.Releases(r.facts), r.cluster.Departures(r.facts)
	if !r.cluster.Partial { // else the view does not show how much room the node has
		r.arrivals = r.cluster.Arrivals(r.facts)
	}
}

// returned ends the relaying for the next owner of an IP.
func (t *tenures) returned(ip netip.Addr) []Effect {
	if _, lingers := t.linger[ip]; !lingers {
		return nil
	}
	delete(t.linger, ip)
	return []Effect{Returned{ip}}
}
