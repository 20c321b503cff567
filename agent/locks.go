package agent

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// locks are those of this node, to tell which it has lost.
type locks struct {
	own  map[netip.Addr]egress.Owner // in the last snapshot
	gave map[netip.Addr]int64        // the revisions of those that this node gave up, which may still be in own

	claimed map[netip.Addr]bool // by the last reconcile, and not seen yet
}

func (l *locks) give(o egress.Owner) {
	if l.gave == nil {
		l.gave = map[netip.Addr]int64{}
	}
	l.gave[o.IP] = o.Revision
}

// follow takes in which the node has (plan.Cluster.Held), and returns those that it has no more and has not given up: its
// lease was lost, or somebody has deleted them.
func (l *locks) follow(own map[netip.Addr]egress.Owner) (lost []egress.Owner) {
	for ip, o := range l.own {
		if _, still := own[ip]; still {
			continue
		}
		if l.gave[ip] != o.Revision {
			lost = append(lost, o)
		}
		delete(l.gave, ip)
	}
	l.own = own
	slices.SortFunc(lost, func(a, b egress.Owner) int { return a.IP.Compare(b.IP) })
	return lost
}

// logLost logs which locks this node has lost, under which lease they were, and who has them now, where somebody has.
func (a *agent) logLost(c *plan.Cluster) {
	for _, o := range a.locks.follow(c.Held(a.Node)) {
		values := []any{"egress_ip", o.IP, "egress", c.EgressesOf(o.IP), "lease", egress.FormatLease(o.Lease)}
		if now := c.Owners[o.IP].Node; now != "" {
			values = append(values, "node", now)
		}
		a.Log.Warn("egress IP lost", values...)
	}
}

// transact does in etcd what the kernel is ready for and the machine decides, and returns when there is more to do.
// Without its tables a node claims nothing, and releases nothing: it might still be answering. With anything else at
// fault only moves wait, of the IPs that it is about.
func (a *agent) transact(ctx context.Context, r round, d plan.Desired, applied bool, faulty error) (next time.Time, err error) {
	// Milliseconds are usual. While etcd does not answer, the kernel is looked after all the same.
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var errs []error
	for _, effect := range a.machine.step(ownership.Programmed{Applied: applied}) {
		switch f := effect.(type) {
		case ownership.Publish:
			errs = append(errs, a.publish(ctx, r, f.Revocable))
		case ownership.Longest:
			errs = append(errs, a.longest(ctx, r, f))
		case ownership.Release:
			errs = append(errs, a.release(ctx, f))
		case ownership.Ready:
			if !d.NFT.KeepSenders && !hampers(faulty, d, f.Move.IP) {
				_, err := a.Store.Ready(ctx, f.Move, r.lease)
				errs = append(errs, err)
			}
		case ownership.HandOver:
			if !hampers(faulty, d, f.Owner.IP) {
				errs = append(errs, a.handOver(ctx, f))
			}
		}
	}
	if applied {
		var claims []ownership.Claim
		for _, effect := range a.machine.step(ownership.Settled{}) {
			switch f := effect.(type) {
			case ownership.Longest:
				errs = append(errs, a.longest(ctx, r, f))
			case ownership.Suspect:
				errs = append(errs, a.suspect(ctx, f))
			case ownership.Revoke:
				due, err := a.revoke(ctx, f)
				next, errs = earlier(next, due), append(errs, err)
			case ownership.Claim:
				claims = append(claims, f)
			}
		}
		errs = append(errs, a.claimAll(ctx, r, claims))
		if !a.machine.Promised(time.Now()) {
			due, err := a.moves.request(ctx, r)
			next, errs = earlier(next, due), append(errs, err)
		}
	}
	if err = errors.Join(errs...); errors.Is(err, store.ErrLeaseLost) {
		err = errors.Join(err, a.step(ownership.Lost{Lease: r.lease.ID()}))
	}
	return next, err
}

// longest says in etcd for how long a claimer has to wait.
func (a *agent) longest(ctx context.Context, r round, l ownership.Longest) error {
	put := a.Store.LowerPermit
	if l.Raise {
		put = a.Store.RaisePermit
	}
	ok, err := put(ctx, l.Permit, r.Revision)
	if ok {
		a.Log.Info("longest permit changed", "was", r.Longest, "dur", l.Permit)
	}
	return err
}

// claimAll takes locks that nobody has, once no other host answers for their IPs: a gateway that dies may leave
// hundreds.
func (a *agent) claimAll(ctx context.Context, r round, claims []ownership.Claim) error {
	var list []store.Want
	for _, c := range claims {
		if c.Why == egress.ReasonStatic || a.probes.clear(c.Claim, r.now) {
			list = append(list, store.Want{
				Owner:  egress.Owner{IP: c.IP, Node: a.Node, Since: time.Now().UTC().Truncate(time.Millisecond), Why: c.Why},
				Former: store.Former{Revision: c.Seen, Suspicion: c.Suspicion},
			})
		}
	}
	ok, err := a.Store.ClaimAll(ctx, r.lease, list)
	claimed := map[netip.Addr]bool{}
	for i, w := range list {
		if o := w.Owner; ok[i] {
			claimed[o.IP] = true
			if !a.locks.claimed[o.IP] { // else the view has not seen it yet
				a.history.trim(o.IP)
				a.logClaim(o, r.EgressesOf(o.IP))
			}
		}
	}
	a.locks.claimed = claimed
	return err
}

// logClaim logs that this node has taken a lock, why, and from which node.
func (a *agent) logClaim(o egress.Owner, egresses []string) {
	why, from := a.metrics.cause(o)
	values := []any{"egress_ip", o.IP, "egress", egresses, "why", why}
	if from != "" {
		values = append(values, "from", from)
	}
	a.Log.Info("egress IP claimed", values...)
}

// handOver gives a lock to the target of a move.
func (a *agent) handOver(ctx context.Context, h ownership.HandOver) error {
	ok, err := a.Store.HandOver(ctx, h.Owner, h.Move, h.To)
	a.machine.step(ownership.HandedOver{IP: h.Owner.IP, OK: ok, Err: err != nil})
	if ok {
		why := cmp.Or(h.Move.Why, egress.ReasonMove)
		a.history.trim(h.Owner.IP)
		a.locks.give(h.Owner)
		a.metrics.add(metricReleases, 1, string(why))
		log := a.Log
		if h.Move.By != "" {
			log = log.With("by", h.Move.By)
		}
		log.Info("egress IP handed over", "egress_ip", h.Owner.IP, "node", h.To.Node, "why", why)
	}
	return err
}

// release gives a lock back. An IP that this node has not used yet may be another's still, for which whoever is next
// has to wait.
func (a *agent) release(ctx context.Context, r ownership.Release) error {
	release := a.Store.Release
	if r.Unused {
		release = a.Store.ReleaseUnused
	}
	ok, err := release(ctx, r.Owner)
	if ok {
		a.locks.give(r.Owner)
		a.metrics.add(metricReleases, 1, string(egress.ReasonRelease))
		a.Log.Info("egress IP given back", "egress_ip", r.Owner.IP)
	}
	return err
}

// suspect writes a suspicion against an agent.
func (a *agent) suspect(ctx context.Context, s ownership.Suspect) error {
	s.Suspicion.Since = time.Now().UTC().Truncate(time.Millisecond)
	ok, err := a.Store.Suspect(ctx, s.Suspicion, s.Seen)
	if ok {
		a.Log.Info("agent suspected", "node", s.Suspicion.Node, "lease", s.Suspicion.Lease)
	}
	return err
}

// revoke ends the lease of an agent. While etcd is full nobody could claim what that frees, nor the agent, should it
// live, get another lease: then it returns when to look again.
func (a *agent) revoke(ctx context.Context, r ownership.Revoke) (next time.Time, err error) {
	if !r.Former && a.Store.AskNoSpace(ctx) {
		return time.Now().Add(time.Second), nil
	}
	if r.Suspicion.Revision > 0 {
		if stands, err := a.Store.Suspected(ctx, r.Suspicion); err != nil || !stands {
			return next, err
		}
	}
	if err := a.Store.Revoke(ctx, r.Lease); err != nil {
		return next, err
	}
	what := "lease of an agent that is dead or whose node is gone revoked"
	if r.Former {
		what = "former lease revoked"
	} else {
		a.metrics.add(metricRevoked, 1)
	}
	a.Log.Warn(what, "node", r.Node, "lease", egress.FormatLease(r.Lease))
	return next, nil
}
