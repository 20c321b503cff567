package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"time"

	"github.com/egret-project/egret/announce"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

const (
	// A foreign host that has an IP is asked again after minRecheck, then less and less often.
	minRecheck, maxRecheck = 2 * time.Second, 30 * time.Second
	// clearance is for how long it holds that nobody answered.
	clearance = 5 * time.Second
	// making is how long it takes to make a link, and more.
	making = 50 * time.Millisecond
)

// probes keeps the node from taking an egress IP that a host outside the cluster uses. It asks on the link before the
// first claim of an allocation, and only then: what has had an owner once is taken over without delay.
type probes struct {
	log    *slog.Logger
	unused func(context.Context, netip.Addr) (bool, error) // by the IP's history, whether nobody ever held it
	probe  func(context.Context, map[netip.Addr]string) (map[netip.Addr]announce.Conflict, error)
	there  func(link string) bool // whether it is there: the one of a VLAN is made for the question
	wake   func()
	kick   chan struct{} // capacity 1: there is something to ask

	mu    sync.Mutex // guards what follows
	found map[netip.Addr]finding
	open  []netip.Addr          // those of found that had no owner when it was made
	ask   map[netip.Addr]string // what is to be found out, with the link
	// What found was made of.
	egresses map[string]egress.Policy
	owners   map[netip.Addr]egress.Owner
}

// finding is what is known of an allocation.
type finding struct {
	id    egress.ID // of the allocation
	used  bool      // it had an owner
	until time.Time // until when it holds that nobody answered
	// taken is who answered; the zero Conflict: nobody. wait is the time from then to again, when it is asked anew.
	taken announce.Conflict
	wait  time.Duration
	again time.Time
}

func newProbes(p *probes) *probes {
	p.kick, p.found, p.ask = make(chan struct{}, 1), map[netip.Addr]finding{}, map[netip.Addr]string{}
	return p
}

// follow takes in which allocations there are, and which have an owner. It returns the IPs that are not to be claimed
// now, and when one of them is to be asked for again.
func (p *probes) follow(s *egress.Snapshot, now time.Time) (taken map[netip.Addr]bool, next time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !plan.Same(s.Egresses, p.egresses) || !plan.Same(s.Owners, p.owners) {
		p.take(s)
	}
	taken = map[netip.Addr]bool{}
	for _, ip := range p.open {
		if f := p.found[ip]; now.Before(f.again) {
			next = earlier(next, f.again)
			taken[ip] = f.taken != announce.Conflict{}
		}
	}
	return taken, next
}

// take makes found that of a snapshot. The caller holds mu.
func (p *probes) take(s *egress.Snapshot) {
	found := make(map[netip.Addr]finding, len(p.found))
	p.egresses, p.owners, p.open = s.Egresses, s.Owners, nil
	for _, e := range s.Egresses {
		for _, a := range e.Addresses {
			f := p.found[a.IP]
			if f.id != a.ID {
				f = finding{id: a.ID}
			}
			if _, owned := s.Owners[a.IP]; owned {
				f = finding{id: a.ID, used: true}
			} else {
				p.open = append(p.open, a.IP)
			}
			found[a.IP] = f
		}
	}
	p.found = found
	maps.DeleteFunc(p.ask, func(ip netip.Addr, _ string) bool { _, there := found[ip]; return !there })
}

// clear reports whether the IP may be claimed. When that is not known yet, it is found out, and the loop is woken then.
func (p *probes) clear(c plan.Claim, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.found[c.IP]
	if f.used || now.Before(f.until) {
		return true
	}
	if now.Before(f.again) {
		return false
	}
	p.ask[c.IP] = c.Link
	notify(p.kick)
	return false
}

// asking returns the IPs that are asked for, are about to be, or are about to be claimed for that.
func (p *probes) asking(now time.Time) (ips []netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, ip := range p.open {
		if f := p.found[ip]; !f.used && (p.ask[ip] != "" || !f.again.IsZero() || now.Before(f.until)) {
			ips = append(ips, ip)
		}
	}
	return ips
}

// conflicts returns the IPs that were not claimed, and who has them.
func (p *probes) conflicts() map[netip.Addr]announce.Conflict {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[netip.Addr]announce.Conflict{}
	for _, ip := range p.open {
		if f := p.found[ip]; f.taken != (announce.Conflict{}) {
			out[ip] = f.taken
		}
	}
	return out
}

// run finds out what is asked, until ctx ends.
func (p *probes) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.kick:
		}
		p.mu.Lock()
		ask := maps.Clone(p.ask)
		ids := map[netip.Addr]egress.ID{}
		for ip := range ask {
			ids[ip] = p.found[ip].id
		}
		p.mu.Unlock()
		var errs []error
		for ip := range ask {
			first, err := p.unused(ctx, ip)
			if errs = append(errs, err); !first || err != nil {
				delete(ask, ip)
				p.note(ip, ids[ip], func(f *finding) {
					if f.used = err == nil; err != nil {
						f.again = time.Now().Add(time.Second)
					}
				})
			}
		}
		there := map[string]bool{}
		for _, link := range ask {
			if _, looked := there[link]; !looked {
				there[link] = p.there(link)
			}
		}
		for ip, link := range ask {
			if !there[link] {
				delete(ask, ip)
				p.note(ip, ids[ip], func(f *finding) { f.again = time.Now().Add(making) })
			}
		}
		p.wake() // what had an owner does not wait for the others, and links are made
		if len(ask) == 0 {
			p.report(ctx, errors.Join(errs...))
			continue
		}
		taken, err := p.probe(ctx, ask)
		for ip := range ask {
			p.note(ip, ids[ip], func(f *finding) { f.learn(taken[ip], err, time.Now()) })
			if c := taken[ip]; c != (announce.Conflict{}) {
				p.log.Warn("egress IP not claimed: another host uses it", "egress_ip", ip, "iface", c.Link, "mac", c.MAC)
			}
		}
		p.report(ctx, errors.Join(append(errs, err)...))
		p.wake()
	}
}

// note changes what is known of an allocation, unless it is another by now.
func (p *probes) note(ip netip.Addr, id egress.ID, change func(*finding)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.ask, ip)
	if f := p.found[ip]; f.id == id && !f.used {
		change(&f)
		p.found[ip] = f
	}
}

// learn notes what a probe brought.
func (f *finding) learn(taken announce.Conflict, err error, now time.Time) {
	switch {
	case taken != announce.Conflict{}:
		f.taken, f.wait = taken, min(max(2*f.wait, minRecheck), maxRecheck)
		f.again = now.Add(f.wait)
	case err != nil: // nothing is known
		f.again = now.Add(time.Second)
	default:
		f.taken, f.wait, f.again, f.until = announce.Conflict{}, 0, time.Time{}, now.Add(clearance)
	}
}

func (p *probes) report(ctx context.Context, err error) {
	if err != nil && ctx.Err() == nil {
		p.log.Warn("not known whether another host uses an egress IP, will retry", "err", err)
	}
}
