package ownership

import (
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// tenures are the locks of this node, and what is left of those that it had.
type tenures struct {
	adopted  map[netip.Addr]bool      // permits that the kernel had when this process began: no waiting for those
	locks    map[lock]tenure          // of this node
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

// tenure is what this node does with a lock.
type tenure struct {
	waits    time.Time // since when it is seen, and may not be used yet; zero: it does not wait
	inUse    bool      // it is acted upon
	handed   bool      // it was handed over, or may have been
	released bool      // it is given back, whatever comes
	unused   bool      // and was not used before
}

// over reports whether nothing is done with the lock any more, also where a snapshot wants it here.
func (t tenure) over() bool { return t.handed || t.released }

func (t *tenures) init() {
	t.adopted, t.locks, t.linger = map[netip.Addr]bool{}, map[lock]tenure{}, map[netip.Addr]time.Time{}
}

// roles sets what this node may do for each egress IP, and says which locks it uses from now on, and which IPs come
// back to it.
func (m *Machine) roles(asking []netip.Addr) (news []Effect) {
	p, t := &m.round, &m.tenures
	p.roles = map[netip.Addr]plan.Role{}
	if p.cluster.Restores != t.restores {
		// What this node and others had in the etcd of before is not known any more: all wait for all.
		t.seen, t.restores = false, p.cluster.Restores
		t.adopted, m.claims = nil, claims{}
		for k, is := range t.locks {
			if !is.over() {
				delete(t.locks, k)
				continue
			}
			t.locks[k] = tenure{released: true, unused: true}
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
	locks := map[lock]tenure{}
	for k, is := range t.locks {
		if o := p.cluster.Owners[k.ip]; !is.over() || o.Revision != k.revision || !m.owns(o) {
			continue
		}
		// The snapshot may be older than the hand-over, and the move be none any more in it.
		if is.handed && !slices.ContainsFunc(p.departures, func(d plan.Departure) bool { return d.Owner.IP == k.ip }) {
			is.handed, is.released, is.unused = false, true, false
		}
		locks[k] = tenure{handed: is.handed, released: is.released, unused: is.unused}
	}
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
	for ip, o := range p.cluster.Held(m.cfg.Node) {
		if !m.owns(o) {
			continue
		}
		k := lock{ip, o.Revision}
		was, is := t.locks[k], locks[k]
		if is.released {
			continue
		}
		// The former owner fell silent before it wrote the record, in this etcd, or the kernel of this node was in
		// service all along.
		atOnce := o.From != "" && !first || t.adopted[ip]
		since, waiting := was.waits, !was.waits.IsZero()
		if !waiting && !atOnce && !was.inUse {
			// the former owner got no yes from a suspicion on that stood until its lease ended
			if since, waiting = p.now, true; !first {
				since = m.peers.suspected(o.Suspicion, p.now)
			}
		}
		if usable := later(since.Add(longest), bound); waiting && p.now.Before(usable) {
			is.waits, p.roles[ip] = since, plan.Pending
			locks[k], p.next = is, earlier(p.next, usable)
			continue
		}
		if !was.inUse { // else the snapshot may be older than the hand-over
			news = append(append(news, t.returned(ip)...), Used{o})
		}
		is.inUse, p.roles[ip] = true, plan.Own
		locks[k] = is
	}
	t.locks, t.adopted = locks, nil
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
