package ownership

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"time"
)

// Permit lets the kernel use an egress IP until the bound of all its permits.
type Permit struct {
	IP netip.Addr
	// Answer: it answers ARP and NDP for the IP. Without it, it only sends with the IP.
	Answer bool
}

// permits are the kernel's copy of the locks. They all end together.
type permits struct {
	list []Permit
	// lease is the one that the locks of list are under. What is known of a later one says nothing about them.
	lease  int64
	length length
	permitEnd
	// bounded: they end within P of a moment at which nobody had revoked the lease, so that peers may revoke it.
	bounded bool
	// known: the kernel acknowledged that it has no permits but bounded ones, or the former agent of the node said so.
	known bool
	// needed: this node has a lock that it acts upon or will, or is about to get one, or somebody suspects its agent.
	needed bool
	last   bool // extended: never renewed again

	gone, silent []netip.Addr // ended, wholly and to answer, and the kernel has not acknowledged it
}

// length is how long permits may be, as claimers know it: P, or what the former agent's was while they may not know of a
// longer one; 0: they know of none. It became P at longer, and counts for what was asked for after that; before, former
// does.
type length struct {
	p, former time.Duration
	longer    time.Time
}

// by returns how long permits may be by a yes that was asked for then.
func (l length) by(confirmed time.Time) time.Duration {
	if confirmed.Before(l.longer) {
		return l.former
	}
	return l.p
}

// permitEnd is when the permits end.
type permitEnd struct {
	limit time.Time // when they must have ended
	until time.Time // when they end, as the kernel acknowledged
	// looked is when they end at the latest, whatever the kernel did of what it was asked for.
	looked time.Time
}

// ErrUnconfirmed says that the lease may be gone: nothing is renewed.
var ErrUnconfirmed = errors.New("lease not confirmed by etcd in time: egress IPs are let go")

// Shortest is the shortest permit: below a tick of the kernel, of 10 ms at the most, there are none.
const Shortest = 20 * time.Millisecond

// MaxPermit is the longest P that an agent may have: the others wait that long for it, and promise for that long.
const MaxPermit = time.Minute

// Grant makes list the permits, of locks under the lease of the round. same says that the kernel has exactly these:
// read, not remembered. Else they have to be written, also where there are none, since those of a former process may be
// there.
func (m *Machine) Grant(list []Permit, same bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(list) == 0 && same {
		m.permits.known = true
	}
	if m.permits.lease != m.round.lease {
		m.permits.limit = time.Time{}
	}
	m.permits.list, m.permits.lease = list, m.round.lease
}

// Narrow ends what may does not allow of each permit, and returns what the kernel has to end: the permits that are
// gone, and those that are silent, also of former calls that were not Acknowledged. Permits that were narrowed are
// never lengthened by a renewal.
func (m *Machine) Narrow(may func(netip.Addr) (send, answer bool)) (gone, silent []netip.Addr) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := &m.permits
	var list []Permit
	for _, have := range p.list {
		send, answer := may(have.IP)
		if !send {
			p.gone = append(p.gone, have.IP)
			continue
		}
		if have.Answer && !answer {
			p.silent = append(p.silent, have.IP)
			have.Answer = false
		}
		list = append(list, have)
	}
	p.list = list
	return p.gone, p.silent
}

// Acknowledged takes in that the kernel has ended all that Narrow said.
func (m *Machine) Acknowledged() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.permits.gone, m.permits.silent = nil, nil
}

// Permits returns the permits that the kernel is to have.
func (m *Machine) Permits() []Permit {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.permits.list)
}

// Length returns how long permits may be at present: P, or what the former agent's was while claimers may not know of a
// longer one.
func (m *Machine) Length() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return cmp.Or(m.permits.length.by(m.lease.Confirmed), m.permits.length.p, m.cfg.Permit)
}

// Look returns when permits that are renewed now end, and their limit: they have to be written within half of what is
// between the two. It is asked immediately before they are written.
func (m *Machine) Look(now time.Time) (end, limit time.Time, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	limit, margin, err := m.limit(now)
	if err != nil {
		return end, limit, err
	}
	if end = limit.Add(-margin); end.Sub(now) < Shortest {
		return end, limit, ErrUnconfirmed
	}
	m.permits.looked = later(m.permits.looked, end)
	return end, limit, nil
}

// Written takes in that the kernel has the permits, and no others, until end.
func (m *Machine) Written(end, limit time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := &m.permits
	p.until, p.limit = end, limit
	p.known, p.gone, p.silent = p.known || p.bounded, nil, nil
}

// Lasts reports whether the permit to send with an IP is alive, and whether that to answer for it is.
func (m *Machine) Lasts(now time.Time, ip netip.Addr) (send, answer bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, have := range m.permits.list {
		if have.IP == ip && now.Before(m.permits.until) {
			return true, have.Answer
		}
	}
	return false, false
}

// Until returns when the permits end, as the kernel acknowledged.
func (m *Machine) Until() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.permits.until
}

// Extended reports whether the permits last until the end of a lease that outlives the process: they are never renewed
// again.
func (m *Machine) Extended() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.permits.last
}

// Bounded reports whether the permits need etcd's yes, again and again.
func (m *Machine) Bounded() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.permits.bounded
}

// Asks reports whether the agent has to ask etcd for a yes, every fifth of Length: while it has permits, or is about
// to, and while a peer asks for its promise. All others leave etcd alone.
func (m *Machine) Asks(now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.asks(now)
}

// asks is Asks. The caller holds mu.
func (m *Machine) asks(now time.Time) bool {
	p := &m.promises
	asks := m.permits.bounded && (m.needs() || now.Before(p.wanted))
	if !asks {
		p.asking = time.Time{}
		return false
	}
	p.asked(now)
	return true
}

// Idle reports whether this node has no lock and no permit, nor is about to: the record of its agent alone is under the
// lease, which then may be renewed less often. The next round after a lock came ends that.
func (m *Machine) Idle() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.needs()
}

// needs reports whether the agent asks for itself. The caller holds mu.
func (m *Machine) needs() bool { return m.permits.needed || len(m.permits.list) > 0 }

// limit returns when the permits must have ended, and by how much they are to end earlier. The caller holds mu.
//
// Bounded: P after the lease was confirmed, or after every peer promised to use no IP that it claims. A promise carries
// on what a confirmation began, and never begins anew: a peer may have been free in between. A tenth is left for the
// write.
//
// Not bounded: P after the lease ends at the earliest, since a claimer waits for that. All of it is left.
func (m *Machine) limit(now time.Time) (limit time.Time, margin time.Duration, err error) {
	p := &m.permits
	if p.lease != m.lease.ID || m.lease.Valid.IsZero() {
		return time.Time{}, 0, ErrUnconfirmed
	}
	if !p.bounded {
		return m.lease.Valid.Add(m.cfg.Permit), m.cfg.Permit, nil
	}
	since, length := m.lease.Confirmed, p.length.by(m.lease.Confirmed)
	if since.IsZero() || length == 0 {
		return time.Time{}, 0, ErrUnconfirmed
	}
	if now.Before(p.limit.Add(-length / 10)) { // else the kernel's have ended
		since = later(since, m.promises.all(now))
	}
	limit = later(since.Add(length), p.limit)
	return limit, length / 10, nil
}

// revocable reports whether the record of the agent may say that peers may revoke its lease. It follows from what the
// kernel acknowledged, not from what it was asked for.
func (m *Machine) revocable() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cfg.Gossip && m.permits.known
}

// Keeps reports whether the lock of an IP goes on under the next lease when the agent stops: the kernel answers for it,
// or has not acknowledged that it ceased to. Any other would wait for the next agent, and others can use it at once.
func (m *Machine) Keeps(now time.Time, ip netip.Addr) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := &m.permits
	return slices.Contains(p.gone, ip) || slices.Contains(p.silent, ip) || slices.Contains(p.list, Permit{IP: ip, Answer: true}) && now.Before(p.looked)
}
