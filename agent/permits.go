package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/store"
)

// permits keeps the kernel's copy of the lease alive, for as long as the lease is.
type permits struct {
	tables *nft.Tables
	length time.Duration
	// bounded: the permits end within length of a moment at which nobody had revoked the lease, so that peers may revoke it.
	bounded bool
	// frozen returns a moment at which every agent that could claim had lost etcd too; nil: there is no such rule.
	frozen func() time.Time
	kick   chan struct{} // capacity 1: renew now

	mu   sync.Mutex // guards what follows, and keeps a renewal from overtaking a withdrawal
	list []nft.Permit
	// lease is the one that the locks of list are bound to. The validity of a later one says nothing about them.
	lease *store.Lease
	until time.Time // when the last renewal ends
	limit time.Time // when the permits must have ended, if they are bounded
	last  bool      // extended: never renewed again

	gone, silent []netip.Addr // withdrawn, wholly and to answer, and the kernel has not confirmed it
}

// errUnconfirmed says that etcd may have dropped the lease: nothing is renewed.
var errUnconfirmed = errors.New("lease not confirmed by etcd in time: egress IPs are let go")

// withdraw ends at once every permit that is not in keep.
func (p *permits) withdraw(keep []nft.Permit) error {
	kept := map[netip.Addr]nft.Permit{}
	for _, k := range keep {
		kept[k.IP] = k
	}
	return p.restrict(func(ip netip.Addr) (send, answer bool) {
		k, ok := kept[ip]
		return ok, k.Answer
	})
}

// restrict asks of each permit what may stay of it, and ends the rest at once.
func (p *permits) restrict(may func(netip.Addr) (send, answer bool)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []nft.Permit
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
	if err := errors.Join(p.tables.Revoke(p.gone...), p.tables.RevokeAnswer(p.silent...)); err != nil {
		return err
	}
	p.gone, p.silent = nil, nil
	return nil
}

// grant makes list the permits, of locks that are bound to the lease, and renews them.
func (p *permits) grant(list []nft.Permit, lease *store.Lease) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lease != lease {
		p.limit = time.Time{}
	}
	p.list, p.lease = list, lease
	return p.renewLocked(p.length)
}

// extend renews the permits to the end of the lease, under which their locks are and which nobody revokes, and returns how long that is.
func (p *permits) extend(lease *store.Lease) (time.Duration, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lease, p.bounded, p.last = lease, false, true
	if len(p.list) == 0 {
		return 0, nil
	}
	left := max(time.Until(p.lease.Valid()), p.length) // a permit may outlive its lease by its length: a claimer waits for it
	return left, p.renewLocked(left)
}

// answers reports whether the permit to answer for ip is alive.
func (p *permits) answers(ip netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, have := range p.list {
		if have.IP == ip {
			return have.Answer && time.Now().Before(p.until)
		}
	}
	return false
}

func (p *permits) renewLocked(d time.Duration) error {
	if len(p.list) == 0 {
		return nil
	}
	if p.bounded {
		return p.renewBoundedLocked()
	}
	now, valid := time.Now(), p.lease.Valid()
	if !now.Before(valid) {
		return errUnconfirmed
	}
	if err := p.tables.Permit(p.list, d); err != nil {
		return err
	}
	// The process may have been frozen between the look at the clock and the write: what was renewed too late is taken back, and what
	// was renewed for too long is cut.
	switch wrote := time.Now(); {
	case wrote.After(valid):
		ips := make([]netip.Addr, len(p.list))
		for i, have := range p.list {
			ips[i] = have.IP
		}
		return errors.Join(errUnconfirmed, p.tables.Revoke(ips...))
	case wrote.Add(d).After(valid.Add(p.length)):
		if err := p.tables.Permit(p.list, valid.Sub(wrote)); err != nil {
			return err
		}
	}
	p.until = now.Add(d)
	return nil
}

// renewBoundedLocked renews the permits to their limit: their length after the lease was confirmed, or after every peer promised to use
// no IP that it claims. A promise carries on what a confirmation began, and never begins anew: a peer may have been free in between. A
// tenth is left for the time that the write takes.
func (p *permits) renewBoundedLocked() error {
	now, since := time.Now(), p.lease.Confirmed()
	if since.IsZero() { // lost, or never confirmed
		return errUnconfirmed
	}
	if p.frozen != nil && now.Before(p.limit) {
		if f := p.frozen(); f.After(since) {
			since = f
		}
	}
	limit, margin := since.Add(p.length), p.length/10
	if p.limit.After(limit) {
		limit = p.limit
	}
	left := limit.Sub(now) - margin
	if left < time.Millisecond {
		return errUnconfirmed
	}
	if err := p.tables.Permit(p.list, left); err != nil {
		return err
	}
	if wrote := time.Now(); wrote.Sub(now) > margin {
		// The process may have been frozen in between: cut what lasts too long. Less than a millisecond revokes.
		left = max(limit.Sub(wrote)-margin, 0)
		if err := p.tables.Permit(p.list, left); err != nil {
			return err
		}
	}
	p.limit, p.until = limit, limit.Add(-margin)
	return nil
}

// soon asks run for a renewal. It never blocks.
func (p *permits) soon() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// run renews the permits every quarter of their length, and when it is asked to, until ctx ends.
func (p *permits) run(ctx context.Context, log *slog.Logger) error {
	tick := time.NewTicker(p.length / 4)
	defer tick.Stop()
	var last error
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-p.kick:
		}
		p.mu.Lock()
		if p.last {
			p.mu.Unlock()
			return nil
		}
		err := p.renewLocked(p.length)
		p.mu.Unlock()
		switch {
		case err != nil && last == nil:
			log.Warn("permits not renewed", "err", err)
		case err == nil && last != nil:
			log.Info("permits renewed again")
		}
		last = err
	}
}
