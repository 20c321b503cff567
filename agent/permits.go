package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/fastpath"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/store"
)

// permits keeps the kernel's copy of the locks alive, for as long as the machine says.
type permits struct {
	tables  *nft.Tables
	machine *machine
	length  time.Duration
	renewal nft.Renewal
	kick    chan struct{} // capacity 1: renew now

	metrics *metrics
	// fast has the same permits, as far as it can use them; nil: there is no fast path. It loses them before the tables
	// do, and gets them after, with an end that is no later.
	fast *fastpath.Path

	mu sync.Mutex // guards what follows, and keeps a renewal from overtaking a withdrawal
	// written: the kernel has the machine's permits, and no others. What renews them renews all that it has.
	written bool
	commits int   // of this agent to the permits, so far
	slow    error // why the last renewal took a commit
	resting bool  // run waits for a kick: there is nothing to renew
}

// newPermits returns permits of a length, which end with a lease of ttl where they are not bounded.
func newPermits(tables *nft.Tables, m *machine, length, ttl time.Duration) *permits {
	return &permits{tables: tables, machine: m, length: length, renewal: nft.NewRenewal(length, ttl), kick: make(chan struct{}, 1)}
}

// withdraw ends at once every permit that is not in keep.
func (p *permits) withdraw(keep []nft.Permit) error {
	kept := map[netip.Addr]nft.Permit{}
	for _, k := range keep {
		kept[k.IP] = k
	}
	return p.narrow(func(ip netip.Addr) (send, answer bool) {
		k, ok := kept[ip]
		return ok, k.Answer
	})
}

// keeps reports whether the lock of an IP goes on when the agent stops. If not, its permit has ended, and a late answer
// of etcd does not renew it with all others, beside the next owner's.
func (p *permits) keeps(ip netip.Addr) (bool, error) {
	if p.machine.keeps(ip) {
		return true, nil
	}
	return false, p.narrow(func(o netip.Addr) (send, answer bool) { return o != ip, o != ip })
}

// restrict ends at once what the snapshot that the round began with does not allow.
func (p *permits) restrict() error {
	return p.narrow(p.machine.May)
}

// narrow ends at once what may does not let stay of a permit.
func (p *permits) narrow(may func(netip.Addr) (send, answer bool)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	gone, silent := p.machine.Narrow(may)
	p.commits++
	if err := errors.Join(p.fast.Revoke(gone...), p.tables.Revoke(gone...), p.tables.RevokeAnswer(silent...)); err != nil {
		p.written = false
		return err
	}
	p.machine.Acknowledged()
	return nil
}

// grant makes list the permits, of locks under the lease of the round, and renews them.
func (p *permits) grant(list []nft.Permit) error {
	permits := make([]ownership.Permit, len(list))
	for i, l := range list {
		permits[i] = ownership.Permit(l)
	}
	p.mu.Lock()
	commits := p.commits
	p.mu.Unlock()
	// Read, not remembered: the tables may have been made anew since. What cannot be read is written. The read waits
	// for the commits of others, which renewals do not.
	same, err := p.tables.Permitted(list)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.written = same && err == nil && p.commits == commits
	p.machine.Grant(permits, p.written)
	if len(list) > 0 {
		if p.resting {
			p.resting = false
			p.soon()
		}
		return p.renewLocked()
	}
	if !p.written { // those of a former agent whose lease is gone
		p.commits++
		if err := p.tables.Permit(nil, 0); err != nil {
			return err
		}
		p.written = true
		p.machine.Written(time.Now(), time.Time{})
	}
	return nil
}

// extend renews the permits of ips to the end of the lease, under which their locks are and which nobody revokes, and
// returns how long that is.
func (p *permits) extend(lease *store.Lease, ips []netip.Addr) (time.Duration, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.machine.step(ownership.Extended{Lease: lease.ID(), Sent: lease.Valid().Add(-lease.TTL()), TTL: lease.TTL(), IPs: ips})
	if len(ips) > 0 && !slices.ContainsFunc(p.machine.Permits(), func(p ownership.Permit) bool { return slices.Contains(ips, p.IP) }) {
		return 0, errors.New("the permits had ended before all locks were moved")
	}
	p.written = false // to the very end of the lease, which no Length reaches
	return time.Until(lease.Valid()), p.renewLocked()
}

// renewLocked renews the permits to their limit, but for a margin, in which that has to be done: without a commit where
// the kernel has exactly those, and else with one.
func (p *permits) renewLocked() error {
	var list []nft.Permit
	for _, have := range p.machine.Permits() {
		list = append(list, nft.Permit(have))
	}
	if len(list) == 0 {
		return nil
	}
	// its frames are as exact as its own length bears
	if !p.written || p.renewal.Window == 0 || p.machine.Length() < p.length {
		return p.writeLocked(list)
	}
	for range 2 { // a machine with much to do may take longer than a ticket lives
		var limit time.Time
		ends, err := p.tables.Renew(p.renewal, list, func() (time.Duration, error) {
			now := time.Now()
			end, most, err := p.machine.Look(now)
			limit = most
			return end.Sub(now), err
		})
		switch {
		case err == nil:
			p.slow = nil
			p.machine.Written(ends, limit)
			return p.hasten(list, ends)
		case errors.Is(err, ownership.ErrUnconfirmed):
			return err
		case time.Until(p.machine.Until()) > p.length/2:
			return nil // there are more to come
		}
		p.slow = err
	}
	return p.writeLocked(list)
}

// writeLocked is renewLocked with a commit.
func (p *permits) writeLocked(list []nft.Permit) error {
	now := time.Now()
	end, limit, err := p.machine.Look(now)
	if err != nil {
		return err
	}
	p.written = false
	p.commits++
	if err := p.tables.Permit(list, end.Sub(now)); err != nil {
		return err
	}
	wrote := time.Now()
	if wrote.Sub(now) > limit.Sub(end)/2 {
		// The process may have been frozen in between: cut what lasts too long. What is left may be none.
		if err := p.tables.Permit(list, end.Sub(wrote)); err != nil {
			return err
		}
	}
	// One transaction made all of them what they are.
	p.written = end.Sub(wrote) >= ownership.Shortest
	p.machine.Written(end, limit)
	return p.hasten(list, end)
}

// hasten gives the fast path the permits that the tables have until end, give or take two of the kernel's ticks.
func (p *permits) hasten(list []nft.Permit, end time.Time) error {
	ips := make([]netip.Addr, len(list))
	for i, l := range list {
		ips[i] = l.IP
	}
	return p.fast.Permit(ips, end.Add(-ownership.Shortest))
}

// soon asks run for a renewal. It never blocks.
func (p *permits) soon() {
	notify(p.kick)
}

// run renews the permits, if there are any, every quarter of their length, and when it is asked to, until ctx ends.
func (p *permits) run(ctx context.Context, log *slog.Logger) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last, slow error
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-p.kick:
		}
		p.mu.Lock()
		if p.machine.Extended() {
			p.mu.Unlock()
			return nil
		}
		left, any := time.Until(p.machine.Until()), len(p.machine.Permits()) > 0
		if p.resting = !any; any {
			timer.Reset(p.machine.Length() / 4)
		}
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
