package ownership

import "time"

// Lease is what is known of the lease that the locks are under. The zero Lease is none.
type Lease struct {
	ID  int64
	TTL time.Duration
	// Valid is until when etcd certainly keeps it, unless somebody revokes it.
	Valid time.Time
	// Confirmed is when the last question was sent that etcd answered with yes: nobody had revoked the lease before.
	Confirmed time.Time
}

func (l *Lease) renewed(e Renewed) {
	if e.Lease == l.ID && !l.Valid.IsZero() {
		l.TTL, l.Valid = e.TTL, later(l.Valid, e.Sent.Add(e.TTL))
	}
}

// confirmed takes in etcd's yes. A renewal would not do: a leader of etcd that was cut off and does not know it still
// grants those. Nor does the yes of an etcd that was restored since the view: the lock may be another's there.
func (m *Machine) confirmed(e Confirmed) {
	if e.Restores != m.restores {
		m.promises.void = e.Restores > m.restores // etcd does answer
		return
	}
	if l := &m.lease; e.Lease == l.ID && !l.Valid.IsZero() {
		l.Confirmed = later(l.Confirmed, e.Sent)
		m.promises.known = false // who has to promise the next time is asked then
	}
}

// lost takes in that the lease is gone, and with it every lock. At once: a machine that was paused may have permits
// left, since its clock stood still.
func (m *Machine) lost(e Lost) []Effect {
	if e.Lease != m.lease.ID {
		return nil
	}
	m.lease.Valid, m.lease.Confirmed = time.Time{}, time.Time{}
	return []Effect{Withdraw{}}
}
