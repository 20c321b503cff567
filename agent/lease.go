package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/store"
)

// newLease takes a lease that no lock is under yet.
func (a *agent) newLease(ctx context.Context) error {
	l, err := a.Store.Grant(ctx, a.LeaseTTL)
	if err != nil {
		return fmt.Errorf("taking a lease: %w", err)
	}
	a.machine.grant(l)
	a.Log.Info("lease taken", "lease", egress.FormatLease(l.ID()), "dur", l.TTL())
	return nil
}

// keepLease renews the lease, and takes a new one when etcd has dropped it: every lock is gone then, and so are the
// permits.
func (a *agent) keepLease(ctx context.Context) error {
	for {
		lease := a.machine.current()
		err := lease.Run(ctx, store.Keep{
			Idle: a.machine.Idle,
			Renewed: func(sent time.Time, ttl time.Duration) {
				a.machine.step(ownership.Renewed{Lease: lease.ID(), Sent: sent, TTL: ttl})
			},
			Changed: a.wake,
		})
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, store.ErrLeaseLost) {
			return fmt.Errorf("keeping the lease: %w", err)
		}
		a.metrics.add(metricLost, 1)
		a.Log.Warn("lease lost", "lease", egress.FormatLease(lease.ID()))
		if err := a.step(ownership.Lost{Lease: lease.ID()}); err != nil {
			a.Log.Warn("permits not withdrawn; they end by themselves", "err", err)
		}
		for wait := 100 * time.Millisecond; ; wait = min(2*wait, time.Second) {
			if err := a.newLease(ctx); err == nil {
				break
			}
			if !sleep(ctx, wait) {
				return nil
			}
		}
		a.wake()
	}
}

// confirm asks etcd again and again whether the lease is still there, for permits that are bounded by the answer: while
// the machine says so, and once when it begins to.
func (a *agent) confirm(ctx context.Context) error {
	// Nobody waits for a question that hangs, as with a member of etcd that is stuck: the next one goes to another
	// member.
	var questions errgroup.Group
	questions.SetLimit(5)
	defer func() { _ = questions.Wait() }() // what failed is seen by the permits that end
	for {
		var next <-chan time.Time
		if a.machine.Asks(time.Now()) {
			questions.TryGo(func() error { return a.question(ctx) })
			next = time.After(a.machine.Length() / 5)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-a.asks:
		case <-next:
		}
	}
}

// question asks etcd once whether the lease is still there.
func (a *agent) question(ctx context.Context) error {
	try, cancel := context.WithTimeout(ctx, a.Permit)
	defer cancel()
	lease := a.machine.current()
	yes, err := lease.Confirm(try, a.Node)
	switch {
	case err == nil:
		a.machine.step(ownership.Confirmed{Lease: lease.ID(), Sent: yes.Sent, Restores: yes.Restores})
		a.metrics.took(metricQuestion, time.Since(yes.Sent))
		return nil
	case ctx.Err() == nil:
		a.metrics.add(metricNoAnswer, 1)
	}
	if errors.Is(err, store.ErrLeaseLost) {
		return a.step(ownership.Lost{Lease: lease.ID()})
	}
	return nil // not known: the permits say when they are not renewed, keepLease when the lease is lost
}

// sleep waits for d; false: ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
