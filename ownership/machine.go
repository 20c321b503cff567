package ownership

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// Config is what a Machine works with. All durations are by the clock of its node.
type Config struct {
	Node       string
	Permit     time.Duration // P: for how long the kernel goes on when nobody renews
	ClaimDelay time.Duration // how much longer each next candidate of an IP waits
	Linger     time.Duration // for how long a former owner relays after a planned move
	Gossip     bool          // the agents say to each other who is alive; permits are bounded
	Freeze     bool          // keep the IPs while all agents have lost etcd
	Process    uint64        // tells the answers to a former process of the node apart
	Start      time.Time     // of the process
	Late       time.Duration // for how long after it was sent a request may still reach etcd
}

// Machine decides for the agent of one node. The events of a round come one after the other: View, Facts, Programmed,
// HandedOver, Settled, Unable, and Grant. All other events and methods may come meanwhile: a round may look at
// thousands of IPs, and permits are renewed all the same.
type Machine struct {
	cfg     Config
	tenures tenures
	peers   peers
	claims  claims
	sight   sight
	round   round

	mu       sync.Mutex // guards what follows
	lease    Lease
	restores int // as of the view, or of the first Confirmed
	permits  permits
	promises promises
}

// round is one reconcile of the agent: what it began from, and what it is about to do.
type round struct {
	cluster *plan.Cluster
	facts   plan.Facts
	lease   int64 // one for the whole round: another one means other locks
	now     time.Time
	roles   map[netip.Addr]plan.Role
	next    time.Time // when there is more to do by time alone
	// What find has found.
	releases   []egress.Owner
	arrivals   []egress.Move
	departures []plan.Departure
}

// New returns the machine of a process that begins, without a lease.
func New(cfg Config) *Machine {
	m := &Machine{cfg: cfg}
	m.permits.bounded = cfg.Gossip
	m.promises.init(cfg)
	m.tenures.init()
	m.peers.init()
	return m
}

// Step takes an event in and says what is to be done.
func (m *Machine) Step(now time.Time, e Event) []Effect {
	switch e := e.(type) {
	case View:
		return m.begin(now, e)
	case Facts:
		return m.plan(now, e)
	case Programmed:
		return m.settle(now, e)
	case Settled:
		return m.act(now)
	case Unable:
		return m.releaseAll()
	case HandedOver:
		if e.OK || e.Err { // an answer may get lost
			m.tenures.linger[e.IP] = now.Add(m.cfg.Linger)
			k := lock{e.IP, m.round.cluster.Owners[e.IP].Revision}
			is := m.tenures.locks[k]
			is.handed = true
			m.tenures.locks[k] = is
		}
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch e := e.(type) {
	case Granted:
		m.lease = Lease{ID: e.Lease, TTL: e.TTL, Valid: e.Sent.Add(e.TTL)}
		m.permits.length.p = 0
	case Renewed:
		m.lease.renewed(e)
	case Lost:
		return m.lost(e)
	case Confirmed:
		m.promises.asked(e.Sent)
		if m.lease.Confirmed.Before(m.promises.asking) {
			m.promises.missing(now, m.lease.Confirmed) // the first yes may have come late: then etcd was lost
		}
		m.confirmed(e)
	case Heard:
		m.asks(now)
		return m.promises.heard(now, e, m.lease.Confirmed)
	case Question:
		if !m.needs() || !m.asks(now) {
			return nil
		}
		return m.promises.ask(now, m.lease.Confirmed, e.Peers)
	case Adopted:
		for _, ip := range e.IPs {
			m.tenures.adopted[ip] = true
		}
		m.round.lease = m.lease.ID
		m.permits.bounded, m.permits.known = m.permits.bounded || e.Revocable, e.Revocable
		// Claimers know of the former one's P.
		if m.permits.length.p = m.cfg.Permit; e.Permit > 0 {
			m.permits.length.p = min(m.cfg.Permit, e.Permit)
		}
	case Extended:
		m.lease = Lease{ID: e.Lease, TTL: e.TTL, Valid: e.Sent.Add(e.TTL)}
		m.permits.list = slices.DeleteFunc(slices.Clone(m.permits.list), func(p Permit) bool {
			return p.Answer && !(now.Before(m.permits.looked) && slices.Contains(e.IPs, p.IP))
		})
		m.permits.bounded, m.permits.lease, m.permits.last = false, e.Lease, true
	}
	return nil
}

// Next returns when the machine has more to do by time alone, as of its last round; zero: never.
func (m *Machine) Next() time.Time { return m.round.next }

// Promised reports whether this node has promised to take nothing.
func (m *Machine) Promised(now time.Time) bool { return now.Before(m.bound()) }

// bound returns until when the promises of this node bind it. Without gossip it makes none.
func (m *Machine) bound() time.Time {
	if !m.cfg.Gossip {
		return time.Time{}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.promises.until
}

// Partitioned reports whether an agent is known to be cut off from an etcd that others have.
func (m *Machine) Partitioned(now time.Time, node string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.promises.partitioned(now, node)
}

// InUse returns the IPs whose locks this node acts upon, as of its last round.
func (m *Machine) InUse() []netip.Addr {
	var out []netip.Addr
	for k, is := range m.tenures.locks {
		if is.inUse {
			out = append(out, k.ip)
		}
	}
	return out
}

// Lease returns what is known of the lease.
func (m *Machine) Lease() Lease {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lease
}

// begin begins a round. First, and by the snapshot alone: an IP that is not this node's any more is not answered for,
// whatever fails later.
func (m *Machine) begin(now time.Time, e View) []Effect {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.round = round{cluster: e.Cluster, lease: m.lease.ID, now: now}
	m.restored(e.Cluster.Restores)
	m.declared(e.Cluster.Snapshot)
	m.promises.see(e.Cluster.Longest)
	m.promises.meet(e.Cluster.Snapshot, m.cfg.Node, egress.FormatLease(m.lease.ID))
	return []Effect{Restrict{}}
}

// restored takes in that etcd is another one than before. What the former one said ends, and nobody knows any more who
// has seen this node's P.
func (m *Machine) restored(restores int) {
	if restores != m.restores {
		m.restores, m.promises.void = restores, false
		m.lease.Confirmed, m.permits.length.p = time.Time{}, 0
		m.permits.lease = 0 // they were granted by the former one: a yes of this one says nothing about them
	}
}

// declared lets permits be as long as P, once etcd says that to all who come to claim: in the agent's record, which
// keeps the longest P from being shortened, and in that.
func (m *Machine) declared(s *egress.Snapshot) {
	r, l := s.Agents[m.cfg.Node], &m.permits.length
	if p := m.cfg.Permit; l.p != p && r.Permit.Is(p) && r.Lease == egress.FormatLease(m.lease.ID) && s.Longest >= p {
		// What was confirmed before may be of a time when claimers did not know.
		*l = length{p: p, former: l.p, longer: m.round.now}
	}
}

// owns reports whether a lock is this agent's.
func (m *Machine) owns(o egress.Owner) bool { return o.Node == m.cfg.Node && o.Lease == m.round.lease }

// May returns what may stay of the permit of an IP, by the snapshot of the round alone.
func (m *Machine) May(ip netip.Addr) (send, answer bool) {
	s := m.round.cluster
	o := s.Owners[ip]
	held := m.owns(o) && !m.tenures.locks[lock{ip, o.Revision}].released
	return held || s.Moves[ip].To == m.cfg.Node || m.round.now.Before(m.tenures.linger[ip]), held
}

// plan sets what this node does for each egress IP.
func (m *Machine) plan(now time.Time, e Facts) []Effect {
	m.round.facts = e.Facts
	if m.cfg.Gossip {
		m.peers.see(&m.round, m.cfg.Node, func(node string) bool { return e.Dead(node) || m.Partitioned(now, node) })
	}
	news := m.roles(e.Asking)
	out := append([]Effect{Program{Roles: m.round.roles}, m.look(now)}, news...)
	return append(out, m.need(now)...)
}

// need says whether this node needs etcd's yes, and asks for the first one at once.
func (m *Machine) need(now time.Time) []Effect {
	needed := m.round.cluster.Suspicions[m.cfg.Node].Lease == egress.FormatLease(m.round.lease)
	for _, role := range m.round.roles {
		needed = needed || role == plan.Pending || role == plan.Own || role == plan.Arrive || role == plan.Relay
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	idle := !m.asks(now)
	if m.permits.needed = needed; idle && m.asks(now) {
		return []Effect{Confirm{}}
	}
	return nil
}

// settle does what the kernel is ready for: it gives back and hands over what it has fallen silent about. Without its
// tables a node claims nothing and releases nothing: it might still be answering.
func (m *Machine) settle(now time.Time, e Programmed) []Effect {
	s := m.round.cluster
	out := []Effect{Publish{Revocable: m.revocable()}}
	if s.Longest < m.cfg.Permit {
		out = append(out, Longest{Permit: m.cfg.Permit, Raise: true})
	}
	if !e.Applied || m.outdated() {
		return out
	}
	for _, k := range slices.SortedFunc(maps.Keys(m.tenures.locks), func(a, b lock) int { return a.ip.Compare(b.ip) }) {
		if m.tenures.locks[k].released {
			out = append(out, m.release(s.Owners[k.ip]))
		}
	}
	for _, o := range m.round.releases {
		again := m.tenures.locks[lock{o.IP, o.Revision}].released
		if m.owns(o) && !again { // else it is of a former lease of this node
			out = append(out, m.release(o))
		}
	}
	for _, move := range m.round.arrivals {
		if !move.ReadyAt(s.Agents[m.cfg.Node]) && m.round.roles[move.IP] == plan.Arrive {
			out = append(out, Ready{Move: move})
			m.sight.active = now
		}
	}
	for _, d := range m.round.departures {
		if m.round.roles[d.Owner.IP] == plan.Relay {
			out = append(out, HandOver{Departure: d})
		}
	}
	return out
}

// release gives a lock back, for good: the next snapshot may be older than that, and want the IP here again, and a
// release that etcd has not answered may be on its way.
func (m *Machine) release(o egress.Owner) Release {
	k := lock{o.IP, o.Revision}
	is := m.tenures.locks[k]
	if !is.released {
		is.released, is.unused = true, !is.inUse
		m.tenures.locks[k] = is
	}
	return Release{Owner: o, Unused: is.unused}
}

// releaseAll gives every lock back, but not before the kernel has acknowledged that it is silent.
func (m *Machine) releaseAll() []Effect {
	m.mu.Lock()
	left := len(m.permits.list) + len(m.permits.gone) + len(m.permits.silent)
	m.mu.Unlock()
	if left > 0 {
		return nil
	}
	var out []Effect
	held := m.round.cluster.Held(m.cfg.Node)
	for _, ip := range slices.SortedFunc(maps.Keys(held), netip.Addr.Compare) {
		if o := held[ip]; m.owns(o) {
			out = append(out, m.release(o))
		}
	}
	return out
}

// outdated reports whether etcd has answered as another one than that of the view, which is listed anew then. What is
// decided by that view is not for this etcd: a lock may have the same revision there, and what this node did with it be
// unknown to the list that is still on its way.
func (m *Machine) outdated() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.promises.void
}

// act takes what others have lost, unless this node has promised not to.
func (m *Machine) act(now time.Time) []Effect {
	if m.outdated() {
		return nil
	}
	if m.round.cluster.Partial {
		m.forget()
	}
	if m.Promised(now) {
		m.round.next = earlier(m.round.next, m.bound())
		return nil
	}
	if m.round.cluster.Partial {
		return m.shorten(now)
	}
	out := m.endFormer()
	out = append(out, m.revoke()...)
	out = append(out, m.shorten(now)...)
	claims := m.claim()
	if len(claims) > 0 {
		m.sight.active = now
	}
	return append(out, claims...)
}

// shorten lets claimers wait less long once the agents with a longer P are gone, and their permits: that is up to the
// first of the others.
func (m *Machine) shorten(now time.Time) []Effect {
	s, most, first := m.round.cluster, time.Duration(0), m.cfg.Node
	for name, a := range s.Agents {
		if most = max(most, time.Duration(a.Permit)); a.Permit == 0 {
			most = s.Longest // of an older version, which does not say
		}
		first = min(first, name)
	}
	if most == 0 || most >= s.Longest || first != m.cfg.Node {
		m.claims.shorter = time.Time{}
		return nil
	}
	if m.claims.shorter.IsZero() {
		m.claims.shorter = now
	}
	if due := m.claims.shorter.Add(10 * s.Longest); now.Before(due) {
		m.round.next = earlier(m.round.next, due)
		return nil
	}
	return []Effect{Longest{Permit: most}}
}

// earlier returns the earlier of two times; the zero time is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// later returns the later of two times.
func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
