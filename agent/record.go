package agent

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"net/netip"
	"sync"
	"time"

	"github.com/egret-project/egret/announce"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// record is what agents/<node> says of the agent beside its locks.
type record struct {
	features    []string  // what the kernel can do
	since       time.Time // when the agent of this node came alive
	faultySince time.Time // since when reconcile cannot program everything; zero: it can
	ready       readiness
}

// publish keeps agents/<node> up to date.
func (a *agent) publish(ctx context.Context, r round, revocable bool) error {
	if a.record.since.IsZero() {
		a.record.since = time.Now().UTC().Truncate(time.Second)
	}
	now := egress.Agent{
		Node: a.Node, Address: r.facts.Underlay, MAC: egress.OverlayMAC(r.facts.Underlay).String(), Lease: egress.FormatLease(r.lease.ID()),
		Version: a.Version, Features: a.record.features, Since: a.record.since, Refused: plan.Refused(r.Snapshot, r.facts), Exposed: a.Exposed,
	}
	have := r.Agents[a.Node]
	now.Faults = have.Faults // publishFaults changes them
	for ip, c := range a.conflicts() {
		if now.Conflicts == nil {
			now.Conflicts = map[netip.Addr]string{}
		}
		now.Conflicts[ip] = c.String()
	}
	now.Dropped, now.Ports = a.drops.why(), a.ports.use()
	now.Promises, now.Permit = a.Gossip.Key != nil, egress.Duration(a.Permit)
	now.Revocable, now.Suspectable = revocable, revocable
	now.Ready = have.Ready && !have.Restarting || a.record.ready.check() == nil
	if sameRecord(have, now) {
		return nil
	}
	return a.putRecord(ctx, r.lease, now, r.Revision)
}

// conflicts returns which egress IPs other hosts use, and who, of those that this node has or would claim.
func (a *agent) conflicts() map[netip.Addr]announce.Conflict {
	out := a.announcer.Conflicts()
	maps.Copy(out, a.probes.conflicts())
	return out
}

// putRecord writes agents/<node>, if the record is as it was at a revision. If not, what changed it brings another
// round: this agent's request whose answer was lost, or its next process, which this one says nothing against.
func (a *agent) putRecord(ctx context.Context, lease *store.Lease, r egress.Agent, seen int64) error {
	err := a.Store.PutAgent(ctx, lease, r, seen)
	if errors.Is(err, store.ErrChanged) {
		return nil
	}
	return err
}

// sameRecord reports whether two records are written alike: to write the second would change nothing.
func sameRecord(a, b egress.Agent) bool {
	x, errX := store.Encode(a)
	y, errY := store.Encode(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// publishFaults writes into agents/<node> what reconcile could not program, where it has been so for a while, and that
// it could program everything, at once.
func (a *agent) publishFaults(ctx context.Context, now map[string]string) error {
	if len(now) == 0 {
		a.record.faultySince = time.Time{}
	} else if a.record.faultySince.IsZero() {
		a.record.faultySince = time.Now()
	}
	s, lease := a.view.Snapshot(), a.machine.current()
	if s == nil || len(now) > 0 && time.Since(a.record.faultySince) < faultAge {
		return nil
	}
	r, ok := s.Agents[a.Node]
	if !ok || maps.Equal(r.Faults, now) || r.Lease != egress.FormatLease(lease.ID()) {
		return nil // without a record of this agent there is nothing to add to: publish writes it first
	}
	r.Faults = now
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return a.putRecord(ctx, lease, r, s.Revision)
}

// readiness is what the node's kubelet is told: an agent is ready once a reconcile has left nothing undone, tables and
// all. A later fault does not take that back: it is in the metrics and in the conditions of the egresses, and a restart
// of the others would mend nothing.
type readiness struct {
	mu   sync.Mutex // guards what follows
	done bool
	err  error // of the last reconcile, until one is done
}

// reconciled notes the end of a reconcile, and reports whether the agent is ready by it, and was not before.
func (r *readiness) reconciled(err error) (first bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first = !r.done && err == nil
	r.done, r.err = r.done || err == nil, err
	return first
}

func (r *readiness) check() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.done:
		return nil
	case r.err != nil:
		return r.err
	}
	return errors.New("the kernel has not been programmed yet")
}
