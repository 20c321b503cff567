package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// start adopts the lease of the node's former agent, with the permits that the kernel still holds, or takes a new one.
func (a *agent) start(ctx context.Context) error {
	former, err := a.Store.Agent(ctx, a.Node)
	if err != nil {
		return fmt.Errorf("reading the node's former agent: %w", err)
	}
	id, err := egress.ParseLease(former.Lease)
	if err != nil {
		return a.newLease(ctx) // there was none
	}
	l, err := a.Store.Adopt(ctx, id)
	switch {
	case errors.Is(err, store.ErrLeaseLost):
		return a.newLease(ctx)
	case err != nil:
		return fmt.Errorf("adopting lease %s: %w", former.Lease, err)
	}
	return a.adopt(ctx, l, former)
}

// adopt takes over the lease of the former agent, its locks, and the permits that the kernel still has for them.
func (a *agent) adopt(ctx context.Context, l *store.Lease, former egress.Agent) error {
	left, err := a.tables.Permits()
	if err != nil {
		return fmt.Errorf("reading the permits of the former agent: %w", err)
	}
	held, err := l.Owned(ctx)
	if err != nil {
		return err
	}
	answers, err := a.endRelays(ctx, held, left)
	if err != nil {
		return err
	}
	if former.Restarting {
		l, err = a.toShortLease(ctx, l, former, remaining(held, answers, left), left)
	} else {
		held, err = renumber(ctx, l, a.Node, held)
	}
	if err != nil {
		return err
	}
	a.machine.grant(l)
	a.record.since = former.Since
	yes, err := l.Confirm(ctx, a.Node)
	if err != nil {
		return err
	}
	a.machine.step(ownership.Confirmed{Lease: l.ID(), Sent: yes.Sent, Restores: yes.Restores})
	n := a.resume(remaining(held, answers, left), left, former)
	a.Log.Info("lease adopted", "lease", former.Lease, "dur", l.TTL(), "egress_ips", n)
	return nil
}

// endRelays ends the permits that are not to answer, and takes them out of left: what the former agent only relayed it
// may have given away. But for static IPs that this node holds: the kernel answers for those without a permit. It returns
// for which of the rest the kernel answers by a permit.
func (a *agent) endRelays(ctx context.Context, held []netip.Addr, left map[netip.Addr]time.Duration) (answers map[netip.Addr]bool, err error) {
	answers, err = a.tables.Answering()
	if err != nil {
		return nil, fmt.Errorf("reading the permits of the former agent: %w", err)
	}
	var relayed []netip.Addr
	for ip := range left {
		if answers[ip] {
			continue
		}
		if slices.Contains(held, ip) {
			o, err := a.Store.Owner(ctx, ip)
			if err != nil {
				return nil, err
			}
			if o.Why == egress.ReasonStatic {
				continue
			}
		}
		relayed = append(relayed, ip)
		delete(left, ip)
	}
	return answers, a.tables.Revoke(relayed...)
}

// remaining returns the permits that are left of those that are held.
func remaining(held []netip.Addr, answers map[netip.Addr]bool, left map[netip.Addr]time.Duration) (out []nft.Permit) {
	for _, ip := range held {
		if left[ip] > 0 {
			out = append(out, nft.Permit{IP: ip, Answer: answers[ip]})
		}
	}
	return out
}

// renumber gives the record and the locks new revisions: what the former agent has sent, a hand-over, a release or a
// move to another lease, may arrive yet. Some may arrive meanwhile.
func renumber(ctx context.Context, l *store.Lease, node string, held []netip.Addr) ([]netip.Addr, error) {
	for again := 3; ; again-- {
		err := l.Renumber(ctx, node, held)
		if !errors.Is(err, store.ErrChanged) || again == 0 {
			return held, err
		}
		if held, err = l.Owned(ctx); err != nil {
			return nil, err
		}
	}
}

// resume renews the permits that the kernel still has for what this node holds, at once: the former agent may have been
// killed. What it was the relay for it is not any more. It returns how many those are.
func (a *agent) resume(list []nft.Permit, left map[netip.Addr]time.Duration, former egress.Agent) int {
	var ips []netip.Addr
	for _, p := range list {
		ips = append(ips, p.IP)
		delete(left, p.IP)
	}
	a.machine.step(ownership.Adopted{IPs: ips, Revocable: former.Revocable, Permit: time.Duration(former.Permit)})
	err := a.tables.Revoke(slices.Collect(maps.Keys(left))...)
	if len(list) > 0 {
		err = errors.Join(err, a.permits.grant(list))
	}
	if err != nil {
		// the tables may be damaged
		a.Log.Warn("permits of the former agent not renewed; the first round does that", "err", err)
	}
	return len(ips)
}

// toShortLease moves the locks from a lease that was to outlive the restart to one of the usual length. No permit may
// outlive that, even if this process ends on the way: so the permits, of which left is how long they last, are cut
// first.
func (a *agent) toShortLease(ctx context.Context, l *store.Lease, former egress.Agent, list []nft.Permit, left map[netip.Addr]time.Duration) (*store.Lease, error) {
	next, err := a.Store.Grant(ctx, a.LeaseTTL)
	if err != nil {
		return nil, err
	}
	most := time.Until(next.Valid())
	cut := slices.DeleteFunc(list, func(p nft.Permit) bool { return left[p.IP] <= most })
	if len(cut) > 0 {
		if err := a.tables.Permit(cut, most); err != nil {
			return nil, fmt.Errorf("cutting the permits of the former agent: %w", err)
		}
	}
	ctx, cancel := context.WithDeadline(ctx, next.Valid()) // after which nothing can be moved there
	defer cancel()
	return next, l.MoveTo(ctx, next, former, func(netip.Addr) bool { return true }, nil)
}

// stopTime bounds for how long an agent that stops tries to keep its locks for the next one. Its permits go on meanwhile.
const stopTime = 2 * time.Second

// shutDown moves the locks to a lease that outlives a restart, which peers may not revoke, and extends the permits to
// its end: nobody can claim before that, so the kernel may serve on alone until the next agent adopts both.
func (a *agent) shutDown(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
	defer cancel()
	if s := a.view.Snapshot(); s != nil && plan.Gone(s, a.Node) {
		// No agent comes back to a node that is gone.
		a.machine.begin(a.cluster.With(s))
		if err := a.releaseAll(ctx); err != nil {
			a.Log.Warn("egress IPs of a node that is gone not let go", "err", err)
		}
	}
	left, err := a.toLongLease(ctx)
	if err != nil {
		a.Log.Warn("locks not kept for the next agent: traffic stops until it runs, or another node has them", "err", err)
		return
	}
	a.Log.Info("stopped; kernel and lease stay for the next agent", "dur", left)
}

// toLongLease moves the locks to a lease that outlives a restart, lengthens their permits, and returns how long these
// last. After an error nothing waits for the next agent.
func (a *agent) toLongLease(ctx context.Context) (left time.Duration, err error) {
	var r egress.Agent
	err = store.Insist(ctx, func(ctx context.Context) error { r, err = a.Store.Agent(ctx, a.Node); return err })
	if err != nil {
		return 0, err
	}
	grace := max(a.LeaseTTL, a.RestartGrace)
	var cluster *plan.Cluster
	if s := a.view.Snapshot(); s != nil {
		cluster = a.cluster.With(s)
		if plan.Cordoned(s, a.Node) {
			grace = a.LeaseTTL // the node is about to go, and others can take what it still holds
		}
	}
	var next *store.Lease
	// of one more, whose answer was lost, nothing is under
	err = store.Insist(ctx, func(ctx context.Context) error { next, err = a.Store.Grant(ctx, grace); return err })
	if err != nil {
		return 0, err
	}
	r.Node, r.Restarting, r.Revocable, r.Suspectable = a.Node, true, false, false
	var kept []netip.Addr
	keep := func(ip netip.Addr) bool {
		static := cluster != nil && cluster.PoolOf(ip) == ""
		if static && a.machine.lasts(ip) && !a.machine.answers(ip) {
			return true // its permit, by which the kernel only sends, goes on with those of relays
		}
		kept = slices.DeleteFunc(kept, func(o netip.Addr) bool { return o == ip }) // it may be asked again
		keeps, err := a.permits.keeps(ip)
		if err != nil {
			a.Log.Warn("a lock without a permit is not given back", "egress_ip", ip, "err", err)
			return true
		}
		if keeps {
			kept = append(kept, ip)
			return true
		}
		// One that came just now would wait for the next agent: others can use it at once.
		return static || cluster == nil
	}
	extended := false
	err = a.machine.current().MoveTo(ctx, next, r, keep, func() error {
		// Permits that go on without an agent are for what etcd shows to be this node's. Etcd confirms none any more.
		var held []netip.Addr
		err := store.Insist(ctx, func(ctx context.Context) error { held, err = next.Holds(ctx, kept); return err })
		if err == nil {
			left, err = a.permits.extend(next, held)
		}
		extended = err == nil
		return err
	})
	if err != nil && !extended {
		if a.machine.Bounded() { // else they go on until the lease ends that they are by
			err = errors.Join(err, a.giveBack(ctx, next))
		}
		return 0, err
	}
	if err != nil {
		a.Log.Warn("locks that came while the agent stopped wait for the end of its lease", "err", err)
	}
	return left, nil
}

// giveBack ends a lease, once the kernel is silent about what is under it: nobody may take that from a node that
// restarts before it ends.
func (a *agent) giveBack(ctx context.Context, l *store.Lease) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := a.permits.withdraw(nil); err != nil {
		return err
	}
	return store.Insist(ctx, l.Revoke)
}
