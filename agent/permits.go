package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/store"
)

// permits keeps the kernel's copy of the lease alive, for as long as the lease is.
type permits struct {
	tables  *nft.Tables
	length  time.Duration
	renewal nft.Renewal
	// bounded: the permits end within length of a moment at which nobody had revoked the lease, so that peers may revoke it.
	bounded bool
	// frozen returns a moment at which every agent that could claim had lost etcd too; nil: there is no such rule.
	frozen func() time.Time
	kick   chan struct{} // capacity 1: renew now

	metrics *metrics

	mu   sync.Mutex // guards what follows, and keeps a renewal from overtaking a withdrawal
	list []nft.Permit
	// written: the kernel has the permits of list, and no others. What renews them renews all that it has.
	written bool
	// lease is the one that the locks of list are bound to. The validity of a later one says nothing about them.
	lease *store.Lease
	until time.Time // when the last renewal ends
	limit time.Time // when the permits must have ended
	last  bool      // extended: never renewed again
	slow  error     // why the last renewal took a commit

	// known: the kernel acknowledged that it has no permits but bounded ones, or the record of the former agent said so.
	known bool

	gone, silent []netip.Addr // withdrawn, wholly and to answer, and the kernel has not confirmed it
}

// newPermits returns permits of a length, which end with a lease of ttl where they are not bounded.
func newPermits(tables *nft.Tables, length, ttl time.Duration) *permits {
	return &permits{tables: tables, length: length, renewal: nft.NewRenewal(length, ttl), kick: make(chan struct{}, 1)}
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
		p.written = false
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
	// Read, not remembered: the tables may have been made anew since. What cannot be read is written.
	same, err := p.tables.Permitted(list)
	p.written = same && err == nil
	if len(list) == 0 {
		return p.clearLocked()
	}
	return p.renewLocked()
}

// clearLocked ends all permits that the kernel has, as those of a former agent whose lease is gone.
func (p *permits) clearLocked() error {
	if !p.written {
		if err := p.tables.Permit(nil, 0); err != nil {
			return err
		}
		p.written, p.gone, p.silent = true, nil, nil
	}
	p.known = true
	return nil
}

// revocable reports whether peers may revoke the lease: what follows from what the kernel acknowledged, not from what it was asked for.
func (p *permits) revocable() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.known && p.bounded
}

// extend renews the permits to the end of the lease, under which their locks are and which nobody revokes, and returns how long that is.
func (p *permits) extend(lease *store.Lease) (time.Duration, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lease, p.bounded, p.last, p.written = lease, false, true, false // to the very end of the lease, which no Length reaches
	return time.Until(lease.Valid()), p.renewLocked()
}

// keeps reports whether the kernel was told to answer for ip, or has not confirmed that it ceased to.
func (p *permits) keeps(ip netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Contains(p.gone, ip) || slices.Contains(p.silent, ip) || slices.ContainsFunc(p.list, func(have nft.Permit) bool { return have.IP == ip && have.Answer })
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

// lasts reports whether the permit to send with ip is alive.
func (p *permits) lasts(ip netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Before(p.until) && slices.ContainsFunc(p.list, func(have nft.Permit) bool { return have.IP == ip })
}

// renewLocked renews the permits to their limit, but for a margin, in which that has to be done: without a commit where the kernel has
// exactly those of list, and else with one.
func (p *permits) renewLocked() error {
	if len(p.list) == 0 {
		return nil
	}
	if !p.written || p.renewal.Window == 0 {
		return p.writeLocked()
	}
	for range 2 { // a machine with much to do may take longer than a ticket lives
		var limit time.Time
		ends, err := p.tables.Renew(p.renewal, p.list, func() (time.Duration, error) {
			now := time.Now()
			end, most, err := p.endLocked(now)
			limit = most
			return end.Sub(now), err
		})
		switch {
		case err == nil:
			p.limit, p.until, p.slow = limit, ends, nil
			p.known = p.known || p.bounded
			return nil
		case errors.Is(err, errUnconfirmed):
			return err
		case time.Until(p.until) > p.length/2:
			return nil // there are more to come
		}
		p.slow = err
	}
	return p.writeLocked()
}

// writeLocked is renewLocked with a commit.
func (p *permits) writeLocked() error {
	now := time.Now()
	end, limit, err := p.endLocked(now)
	if err != nil {
		return err
	}
	p.written = false
	if err := p.tables.Permit(p.list, end.Sub(now)); err != nil {
		return err
	}
	wrote := time.Now()
	if wrote.Sub(now) > limit.Sub(end)/2 {
		// The process may have been frozen in between: cut what lasts too long. What is left may be none.
		if err := p.tables.Permit(p.list, end.Sub(wrote)); err != nil {
			return err
		}
	}
	// One transaction made both what they are, and all of it was done.
	p.written, p.gone, p.silent = end.Sub(wrote) >= shortest, nil, nil
	p.known = p.known || p.bounded
	p.limit, p.until = limit, end
	return nil
}

// shortest is the shortest permit: below a tick of the kernel, of 10 ms at the most, there are none.
const shortest = 20 * time.Millisecond

// endLocked returns when permits that are renewed now end, and their limit.
func (p *permits) endLocked(now time.Time) (end, limit time.Time, err error) {
	limit, margin, err := p.limitLocked(now)
	if err != nil {
		return end, limit, err
	}
	if end = limit.Add(-margin); end.Sub(now) < shortest {
		return end, limit, errUnconfirmed
	}
	return end, limit, nil
}

// limitLocked returns when the permits must have ended, and by how much they are to end earlier.
//
// Bounded: their length after the lease was confirmed, or after every peer promised to use no IP that it claims. A promise carries on
// what a confirmation began, and never begins anew: a peer may have been free in between. A tenth is left for the time that the write
// takes.
//
// Not bounded: their length after the lease ends at the earliest, since a claimer waits for that. All of it is left.
func (p *permits) limitLocked(now time.Time) (limit time.Time, margin time.Duration, err error) {
	if !p.bounded {
		return p.lease.Valid().Add(p.length), p.length, nil
	}
	since := p.lease.Confirmed()
	if since.IsZero() { // lost, or never confirmed
		return time.Time{}, 0, errUnconfirmed
	}
	if p.frozen != nil && now.Before(p.limit) {
		if f := p.frozen(); f.After(since) {
			since = f
		}
	}
	limit = since.Add(p.length)
	if p.limit.After(limit) {
		limit = p.limit
	}
	return limit, p.length / 10, nil
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
	var last, slow error
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
		left, any := time.Until(p.until), len(p.list) > 0
		err := p.renewLocked()
		if any {
			p.metrics.renewed(left, err, p.slow)
		}
		if p.slow != nil && slow == nil {
			log.Warn("permits renewed by commits, which make others read the ruleset anew", "err", p.slow)
		}
		slow = p.slow
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
