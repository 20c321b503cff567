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
}

// Machine decides for the agent of one node. The events of a round come one after the other: View, Facts, Programmed, HandedOver, Settled, Unable,
// and Grant. All other events and methods may come meanwhile: a round may look at thousands of IPs, and permits are renewed all the same.
type Machine struct {
	cfg     Config
	tenures tenures
	peers   peers
	claims  claims
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

// Event is what happened. Those that begin a stage of a round come in the order View, Facts, Programmed, Settled.
type Event interface{ event() }

type (
	// Granted: etcd gave a lease, or renewed one that was adopted, at the request sent at Sent. The machine's locks are under it from now on.
	Granted struct {
		Lease int64
		Sent  time.Time
		TTL   time.Duration
	}
	// Renewed: etcd renewed the lease at the request sent at Sent.
	Renewed struct {
		Lease int64
		Sent  time.Time
		TTL   time.Duration
	}
	// Lost: etcd does not know the lease.
	Lost struct{ Lease int64 }
	// Confirmed: agents/<node> was there under the lease, in a linearizable read that was sent at Sent, when this process had seen that many
	// Restores of etcd. An answer which shows another one is none.
	Confirmed struct {
		Lease    int64
		Sent     time.Time
		Restores int
	}
	// View: etcd as it was at one revision. It begins a round.
	View struct{ Cluster *plan.Cluster }
	// Facts: what the node knows of itself, who is dead by the gossip, and the IPs of which the node asks whether another host has them.
	Facts struct {
		Facts  plan.Facts
		Dead   func(node string) bool
		Asking []netip.Addr
	}
	// Programmed: the kernel holds what the roles ask for. Not Applied: its tables do not.
	Programmed struct{ Applied bool }
	// Settled: the effects of Programmed were tried.
	Settled struct{}
	// Unable: the node cannot serve any IP, and its kernel is silent about all of them. It takes the place of Facts and what comes after that.
	Unable struct{}
	// HandedOver: etcd's answer to a HandOver, or none (Err).
	HandedOver struct {
		IP  netip.Addr
		OK  bool
		Err bool
	}
	// Heard: a peer's word.
	Heard struct {
		From    string
		Message Message
	}
	// Question: it is time to ask the peers for promises, every tenth of P. Peers are all other agents that could claim: those of etcd's last
	// snapshot, and those that the gossip knows to be alive. There is none before the first snapshot, nor need there be one while etcd answers, or while
	// the machine does not ask it.
	Question struct{ Peers []string }
	// Adopted: this process goes on with the permits that the kernel had for locks under its lease.
	Adopted struct {
		IPs []netip.Addr
		// As the former agent's record said; an older one says no Permit.
		Revocable bool
		Permit    time.Duration
	}
	// Extended: the locks of the IPs are under a lease that outlives the process, and which nobody revokes: the permits that the kernel has for
	// them may last as long.
	Extended struct {
		Lease int64
		Sent  time.Time
		TTL   time.Duration
		IPs   []netip.Addr
	}
)

func (Granted) event()    {}
func (Renewed) event()    {}
func (Lost) event()       {}
func (Confirmed) event()  {}
func (View) event()       {}
func (Facts) event()      {}
func (Programmed) event() {}
func (Settled) event()    {}
func (Unable) event()     {}
func (HandedOver) event() {}
func (Heard) event()      {}
func (Question) event()   {}
func (Adopted) event()    {}
func (Extended) event()   {}

// Effect is what is to be done, in the order of the list.
type Effect interface{ effect() }

type (
	// Withdraw ends every permit at once.
	Withdraw struct{}
	// Restrict ends at once what May does not allow of a permit.
	Restrict struct{}
	// Renew renews the permits now.
	Renew struct{}
	// Program makes the kernel hold what the roles ask for, its permits included.
	Program struct{ Roles map[netip.Addr]plan.Role }
	// Publish says in agents/<node> what P is, and whether peers may revoke the lease.
	Publish struct{ Revocable bool }
	// Suspect writes a suspicion against an agent, if there is none, and its record is as it was at revision Seen.
	Suspect struct {
		Suspicion egress.Suspicion
		Seen      int64
	}
	// Longest makes P of all agents what etcd says of the longest one: Raise where this node's is longer, else after all agents with a longer one are
	// gone, and only if none has come since the snapshot.
	Longest struct {
		Permit time.Duration
		Raise  bool
	}
	// Release gives a lock back, if it is of that revision still. Unused: this node has not waited yet until the owner before it was
	// certainly silent, so whoever is next has to.
	Release struct {
		Owner  egress.Owner
		Unused bool
	}
	// Ready says that this node, the target of the move, is ready.
	Ready struct{ Move egress.Move }
	// HandOver gives a lock to the target of a move, if all three are of their revisions.
	HandOver struct{ plan.Departure }
	// Revoke ends the lease of an agent, if the suspicion against it still stands, where there is one. Former: it is one of this node's own former life.
	Revoke struct {
		Node      string
		Lease     int64
		Former    bool
		Suspicion egress.Suspicion
	}
	// Claim takes a lock that nobody has. Seen is the revision of the last lock of the IP that this node saw, or 0, and Suspicion the one that
	// stands against its owner, if any.
	Claim struct {
		plan.Claim
		Seen      int64
		Suspicion egress.Suspicion
	}
	// Confirm asks etcd for a yes now, and from then on for as long as the machine Asks.
	Confirm struct{}
	// Say sends a message to a peer, which may get lost.
	Say struct {
		To      string
		Message Message
	}
	// Wake begins a round: something changed that the view does not show.
	Wake struct{}
	// Used says that this node uses a lock from now on.
	Used struct{ Owner egress.Owner }
	// Returned says that an IP that this node still relayed for its next owner comes back: what is left of its last time here has to go.
	Returned struct{ IP netip.Addr }
)

func (Withdraw) effect() {}
func (Restrict) effect() {}
func (Renew) effect()    {}
func (Program) effect()  {}
func (Publish) effect()  {}
func (Longest) effect()  {}
func (Suspect) effect()  {}
func (Release) effect()  {}
func (Ready) effect()    {}
func (HandOver) effect() {}
func (Revoke) effect()   {}
func (Claim) effect()    {}
func (Confirm) effect()  {}
func (Say) effect()      {}
func (Wake) effect()     {}
func (Used) effect()     {}
func (Returned) effect() {}

// Step takes an event in and says what is to be done.
func (m *Machine) Step(now time.Time, e Event) []Effect {
	switch e := e.(type) {
	case View:
		return m.begin(now, e)
	case Facts:
		return m.plan(now, e)
	case Programmed:
		return m.settle(e)
	case Settled:
		return m.act(now)
	case Unable:
		return m.releaseAll()
	case HandedOver:
		if e.OK || e.Err { // an answer may get lost
			m.tenures.linger[e.IP] = now.Add(m.cfg.Linger)
		}
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch e := e.(type) {
	case Granted:
		m.lease = Lease{ID: e.Lease, TTL: e.TTL, Valid: e.Sent.Add(e.TTL)}
		m.permits.length = 0
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
		if m.permits.length = m.cfg.Permit; e.Permit > 0 {
			m.permits.length = min(m.permits.length, e.Permit)
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
	for k := range m.tenures.inUse {
		out = append(out, k.ip)
	}
	return out
}

// Lease returns what is known of the lease.
func (m *Machine) Lease() Lease {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lease
}

// begin begins a round. First, and by the snapshot alone: an IP that is not this node's any more is not answered for, whatever fails later.
func (m *Machine) begin(now time.Time, e View) []Effect {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.round = round{cluster: e.Cluster, lease: m.lease.ID, now: now}
	m.restored(e.Cluster.Restores)
	m.declared(e.Cluster.Snapshot)
	m.promises.see(e.Cluster.Longest)
	return []Effect{Restrict{}}
}

// restored takes in that etcd is another one than before. What the former one said ends, and nobody knows any more who has seen this node's P.
func (m *Machine) restored(restores int) {
	if restores != m.restores {
		m.restores, m.promises.void = restores, false
		m.lease.Confirmed, m.permits.length = time.Time{}, 0
		m.permits.lease = 0 // they were granted by the former one: a yes of this one says nothing about them
	}
}

// declared lets permits be as long as P, once etcd says that to all who come to claim: in the agent's record, which keeps the longest P from being
// shortened, and in that.
func (m *Machine) declared(s *egress.Snapshot) {
	r := s.Agents[m.cfg.Node]
	if p := m.cfg.Permit; m.permits.length != p && r.Permit.Is(p) && r.Lease == egress.FormatLease(m.lease.ID) && s.Longest >= p {
		// What was confirmed before may be of a time when claimers did not know.
		m.permits.former, m.permits.length, m.permits.longer = m.permits.length, p, m.round.now
	}
}

// owns reports whether a lock is this agent's.
func (m *Machine) owns(o egress.Owner) bool { return o.Node == m.cfg.Node && o.Lease == m.round.lease }

// May returns what may stay of the permit of an IP, by the snapshot of the round alone.
func (m *Machine) May(ip netip.Addr) (send, answer bool) {
	s := m.round.cluster
	held := m.owns(s.Owners[ip])
	return held || s.Moves[ip].To == m.cfg.Node || m.round.now.Before(m.tenures.linger[ip]), held
}

// plan sets what this node does for each egress IP.
func (m *Machine) plan(now time.Time, e Facts) []Effect {
	m.round.facts = e.Facts
	if m.cfg.Gossip {
		m.peers.see(&m.round, m.cfg.Node, func(node string) bool { return e.Dead(node) || m.Partitioned(now, node) })
	}
	news := m.roles(e.Asking)
	return append(append([]Effect{Program{Roles: m.round.roles}}, news...), m.need(now)...)
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

// settle does what the kernel is ready for: it gives back and hands over what it has fallen silent about. Without its tables a node claims
// nothing and releases nothing: it might still be answering.
func (m *Machine) settle(e Programmed) []Effect {
	s, f := m.round.cluster, m.round.facts
	out := []Effect{Publish{Revocable: m.revocable()}}
	if s.Longest < m.cfg.Permit {
		out = append(out, Longest{Permit: m.cfg.Permit, Raise: true})
	}
	if !e.Applied || m.outdated() {
		return out
	}
	for _, o := range s.Releases(f) {
		if m.owns(o) { // else it is of a former lease of this node
			out = append(out, m.release(o))
		}
	}
	for _, move := range s.Arrivals(f) {
		if !move.ReadyAt(s.Agents[m.cfg.Node]) && m.round.roles[move.IP] == plan.Arrive {
			out = append(out, Ready{Move: move})
		}
	}
	for _, d := range s.Departures(f) {
		if m.round.roles[d.Owner.IP] == plan.Relay {
			out = append(out, HandOver{Departure: d})
		}
	}
	return out
}

// release gives a lock back.
func (m *Machine) release(o egress.Owner) Release {
	return Release{Owner: o, Unused: !m.tenures.inUse[lock{o.IP, o.Revision}]}
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
	for _, ip := range slices.SortedFunc(maps.Keys(m.round.cluster.Owners), netip.Addr.Compare) {
		if o := m.round.cluster.Owners[ip]; m.owns(o) {
			out = append(out, m.release(o))
		}
	}
	return out
}

// outdated reports whether etcd has answered as another one than that of the view, which is listed anew then. What is decided by that view is not for
// this etcd: a lock may have the same revision there, and what this node did with it be unknown to the list that is still on its way.
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
	if m.Promised(now) {
		m.round.next = earlier(m.round.next, m.bound())
		return nil
	}
	out := m.endFormer()
	out = append(out, m.revoke()...)
	out = append(out, m.shorten(now)...)
	return append(out, m.claim()...)
}

// shorten lets claimers wait less long once the agents with a longer P are gone, and their permits: that is up to the first of the others.
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
