package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/routing"
	"github.com/egret-project/egret/store"
)

// loopState is what the goroutine of loop, to which it belongs, takes from one reconcile to the next.
type loopState struct {
	cluster *plan.Cluster // of the last reconcile
	others  others
	scope   scope
	locks   locks
	moves   moves
	record  record
	logged  logOnce
}

// round is what one reconcile works from.
type round struct {
	*plan.Cluster
	facts plan.Facts
	lease *store.Lease // the same throughout: another one means other locks
	now   time.Time
	roles map[netip.Addr]plan.Role // what this node may do for each egress IP
	all   bool                     // the view has to have the owners of all egress IPs
}

// owned reports whether a lock is this agent's.
func (r round) owned(o egress.Owner) bool { return o.Node == r.facts.Node && o.Lease == r.lease.ID() }

// wake asks loop to reconcile. It never blocks.
func (a *agent) wake() { notify(a.dirty) }

// notify sends to a channel of capacity 1, unless something waits there.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

const (
	// The lower bound keeps a fault that mends itself from being felt, the upper one a fault that stays from filling
	// the log.
	minBackoff, maxBackoff = 50 * time.Millisecond, 5 * time.Second
	// The kernel is looked at, whatever it tells.
	atLeast = 5 * time.Minute
)

// pause returns for how long loop waits after a reconcile that ended with err, and that has more to do at next (zero:
// never). What is due at once may be what failed, so it is not tried again and again without a pause.
func pause(now, next time.Time, err error, backoff *time.Duration) time.Duration {
	wait := next.Sub(now)
	if next.IsZero() || wait > atLeast {
		wait = atLeast
	}
	if err == nil {
		*backoff = minBackoff
		return wait
	}
	wait = min(max(wait, minBackoff), *backoff)
	*backoff = min(2**backoff, maxBackoff)
	return wait
}

// loop reconciles until ctx ends: for each trigger, and again, later and later, after it failed.
func (a *agent) loop(ctx context.Context) error {
	backoff := minBackoff
	var began time.Time // the last one
	timer := time.NewTimer(0)
	defer timer.Stop()
	var processors *processors
	if a.natLog == nil { // which has work with every connection, without a pass
		processors = newProcessors()
		defer processors.end()
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.dirty:
		case <-a.view.Changed():
		case <-timer.C:
		}
		if !a.gather(ctx, began) {
			return nil
		}
		processors.work()
		a.metrics.came(a.view.Arrived())
		began = time.Now()
		next, err := a.reconcile(ctx)
		degraded := faults(err)
		a.metrics.reconciled(time.Since(began), err, degraded, a.machine.InUse())
		err = errors.Join(err, a.publishFaults(ctx, degraded))
		a.logged.fault(ctx, a.Log, err)
		if a.view.Snapshot() != nil && a.record.ready.reconciled(err) { // without a snapshot there was nothing to do
			a.wake() // the record is to say so
		}
		timer.Reset(pause(time.Now(), next, err, &backoff))
	}
}

// gatherTime is how long after the begin of a reconcile the next one begins at the earliest: of events that follow on
// each other, the first is seen to at once, and the others in few reconciles.
const gatherTime = 5 * time.Millisecond

// gather waits until the next reconcile may begin, and takes in what came meanwhile; false: ctx ended.
func (a *agent) gather(ctx context.Context, began time.Time) bool {
	if wait := time.Until(began.Add(gatherTime)); wait > 0 && !sleep(ctx, wait) {
		return false
	}
	for {
		select {
		case <-a.dirty:
		case <-a.view.Changed():
		default:
			return true
		}
	}
}

// reconcile brings kernel and etcd one step closer to what the snapshot asks for, and returns when it is to be called
// again by time alone (zero: never). It can be repeated at will.
func (a *agent) reconcile(ctx context.Context) (next time.Time, err error) {
	s := a.view.Snapshot()
	if s == nil {
		return time.Time{}, nil
	}
	a.logged.skipped(a.Log, s)
	a.cluster = a.cluster.With(s)
	r := round{Cluster: a.cluster}
	r.lease, r.now = a.machine.begin(r.Cluster)
	// First, and by the snapshot alone: an IP that is not this node's any more is not answered for, whatever else fails
	// below.
	if err := a.permits.restrict(); err != nil {
		return time.Time{}, err
	}
	a.logLost(r.Cluster)
	if plan.Gone(s, a.Node) {
		// The rest of the kernel stays as it is: pods that are there still leave with no other address, and no other
		// node lets them.
		return time.Time{}, errors.Join(in("node", errGone), a.releaseAll(ctx))
	}
	if r.facts, err = a.facts(s); err != nil {
		err = in("uplink", err)
		if errors.Is(err, routing.ErrNoLink) {
			err = errors.Join(err, a.releaseAll(ctx))
		}
		return time.Time{}, err
	}
	dead := a.updatePeers(r)
	r.facts.Taken, next = a.probes.follow(s, r.now)
	a.metrics.arrivals(&r, a.Node, func(node string) bool { return dead(node) || a.machine.Partitioned(r.now, node) })
	a.roles(ctx, &r, dead)
	d := plan.Build(r.Cluster, r.facts, r.roles)
	scope, again := a.scopeOf(ctx, r, d.Follow, d.Owners)
	a.view.Watch(scope)
	applied, err := a.kernel.program(ctx, d)
	if applied {
		a.ports.follow(d.Blocks)
	}
	a.metrics.programmed(applied && err == nil, time.Now())
	due, err2 := a.transact(ctx, r, d, applied, err)
	return earlier(earlier(earlier(next, again), due), earlier(a.machine.Next(), a.kernel.read.due())), errors.Join(err, err2, in("pods", unknown(d.Unknown)))
}

// roles sets what this node may do for each egress IP.
func (a *agent) roles(ctx context.Context, r *round, dead func(node string) bool) {
	for _, effect := range a.machine.step(ownership.Facts{Facts: r.facts, Dead: dead, Asking: a.probes.asking(r.now)}) {
		switch f := effect.(type) {
		case ownership.Program:
			r.roles = f.Roles
		case ownership.Watch:
			r.all = f.All
		case ownership.Used:
			a.metrics.takes(f.Owner)
		case ownership.Returned:
			a.flusher.returns(f.IP)
		case ownership.Confirm:
			// Before permits are written, which need a yes. What comes of it is seen then; at a member of etcd that
			// hangs it is the next question's.
			a.ask()
			try, cancel := context.WithTimeout(ctx, min(a.Permit, time.Second)/2)
			_ = a.question(try)
			cancel()
		}
	}
}

// unknown says that no further pod gets its egress IP, since the addresses of the pods of these nodes are not known.
func unknown(nodes []string) error {
	if len(nodes) == 0 {
		return nil
	}
	return fmt.Errorf("no further pod gets its egress IP: the addresses of pods on %s (%d nodes) are not known: it has no spec.podCIDRs, and no "+
		"record of crdsync: upgrade crdsync, or set --cluster-cidrs", nodes[0], len(nodes))
}

// errGone says that the agent serves nothing: its node is none of the cluster's.
var errGone = errors.New("the node has no record in etcd, and serves no egress IP: its Node object is gone, or crdsync has not written " +
	"the record yet")

// releaseAll withdraws everything and gives every lock back: this node has lost the address that its overlay is made
// of, or is gone, and can serve none.
func (a *agent) releaseAll(ctx context.Context) error {
	a.announcer.Set(nil)
	a.announced = nil
	if err := a.permits.withdraw(nil); err != nil {
		return err // not silent yet: the locks stay
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var errs []error
	for _, effect := range a.machine.step(ownership.Unable{}) {
		errs = append(errs, a.release(ctx, effect.(ownership.Release)))
	}
	return errors.Join(errs...)
}

// earlier returns the earlier of two times; the zero time is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// logOnce is what was logged last of what stays for a while: it is logged when it comes, changes, and goes.
type logOnce struct {
	lastFault   string
	lastSkipped string
}

// fault logs why reconcile could not do everything.
func (l *logOnce) fault(ctx context.Context, log *slog.Logger, err error) {
	fault := ""
	if err != nil && ctx.Err() == nil {
		fault = err.Error()
	}
	if fault == l.lastFault {
		return
	}
	if l.lastFault = fault; fault != "" {
		log.Warn("reconcile incomplete, will retry", "err", err)
	} else {
		log.Info("reconcile complete again")
	}
}

// skipped logs the records that could not be read: they are served as they last were, the others as they are.
func (l *logOnce) skipped(log *slog.Logger, s *egress.Snapshot) {
	var errs []error
	for _, f := range s.Faults {
		errs = append(errs, fmt.Errorf("%s: %w", f.Key, f.Err))
	}
	err := errors.Join(errs...)
	if text := fmt.Sprint(err); text != l.lastSkipped && (err != nil || l.lastSkipped != "") {
		l.lastSkipped = text
		log.Error("records skipped", "err", err)
	}
}
