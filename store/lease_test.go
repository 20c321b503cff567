package store

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
)

// gone returns a channel that delivers when a key is deleted, and at what time that was seen.
func gone(t *testing.T, c *clientv3.Client, key string) <-chan time.Time {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	watch := c.Watch(ctx, DefaultPrefix+key, clientv3.WithFilterPut(), clientv3.WithCreatedNotify())
	if resp := recv(t, "a watch", watch); !resp.Created {
		t.Fatalf("watching: %v", resp.Err())
	}
	out := make(chan time.Time, 1)
	go func() {
		for resp := range watch {
			if len(resp.Events) > 0 {
				out <- time.Now()
				return
			}
		}
	}()
	return out
}

func claim(t *testing.T, c *Client, l *Lease, o egress.Owner) {
	t.Helper()
	claimSeen(t, c, l, o, 0)
}

// claimSeen claims for a node that saw the lock of that revision last.
func claimSeen(t *testing.T, c *Client, l *Lease, o egress.Owner, seen int64) {
	t.Helper()
	if ok, err := c.Claim(t.Context(), l, o, Former{Revision: seen}); !ok || err != nil {
		t.Fatalf("claiming: %t, %v", ok, err)
	}
}

func TestEtcdKeepsALeaseAsLongAsValidSaysAndDropsItsClaimsThen(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, time.Second) // below etcd's floor
	if l.TTL() != 2*time.Second {
		t.Errorf("TTL %v, want etcd's floor", l.TTL())
	}
	claim(t, c, l, owner)
	end := gone(t, s.Client(), OwnerKey(ip1))
	granted := l.Valid()
	if err := l.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !l.Valid().After(granted) {
		t.Error("renewing did not make it valid for longer")
	}

	// A renewal that was sent and not answered confirms nothing, even when etcd heard it.
	before := l.Valid()
	s.Freeze()
	try, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := l.Renew(try); !errors.Is(err, context.DeadlineExceeded) || !l.Valid().Equal(before) {
		t.Errorf("renewing without an answer: %v, valid for %v more", err, l.Valid().Sub(before))
	}
	s.Mend()
	if seen := recv(t, "the end of the claim", end); seen.Before(l.Valid()) {
		t.Errorf("etcd dropped the claim %v before the time that Valid said", l.Valid().Sub(seen))
	}
	if err := l.Renew(t.Context()); !errors.Is(err, ErrLeaseLost) || !l.Valid().IsZero() {
		t.Errorf("after the end: %v, valid until %v", err, l.Valid())
	}
}

func TestARenewalCountsFromWhenItWasSent(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, 10*time.Second)
	s.Freeze()
	done := make(chan error, 1)
	sent := make(chan time.Time, 1)
	go func() {
		sent <- time.Now()
		done <- l.Renew(t.Context())
	}()
	at := <-sent
	<-time.After(4 * time.Second) // how long the answer takes
	s.Mend()
	if err := recv(t, "the answer", done); err != nil {
		t.Fatal(err)
	}
	if late := l.Valid().Sub(at.Add(l.TTL())); late > 2*time.Second {
		t.Errorf("valid for %v longer than the TTL after it was sent", late)
	}
}

func TestAConfirmationCountsFromWhenItWasAskedFor(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, time.Minute)
	if err := c.PutAgent(t.Context(), l, egress.Agent{Node: "a"}, whatever); err != nil {
		t.Fatal(err)
	}
	const late = 2 * time.Second
	s.Freeze()
	began := time.Now()
	time.AfterFunc(late, s.Mend)
	yes, err := l.Confirm(t.Context(), "a")
	if err != nil || yes.Restores != 0 {
		t.Fatal(yes, err)
	}
	if took, counts := time.Since(began), yes.Sent.Sub(began); took < late || counts > late/2 {
		t.Errorf("the answer came after %v and counts from %v, want from the question", took, counts)
	}
	if _, err := l.Confirm(t.Context(), "b"); err == nil || errors.Is(err, ErrLeaseLost) {
		t.Errorf("asked for a record that is not there, under a lease that is: %v, want that it is not known", err)
	}
	if err := c.Revoke(t.Context(), l.ID()); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Confirm(t.Context(), "a"); !errors.Is(err, ErrLeaseLost) {
		t.Errorf("after the revocation: %v, want %v", err, ErrLeaseLost)
	}
}

func TestALostLeaseIsLostForEverythingAndForGood(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	for name, use := range map[string]func(*Lease) error{
		"renew": func(l *Lease) error { return l.Renew(t.Context()) },
		"claim": func(l *Lease) error { _, err := c.Claim(t.Context(), l, owner, Former{}); return err },
		"agent": func(l *Lease) error { return c.PutAgent(t.Context(), l, agent, whatever) },
		"adopt": func(l *Lease) error { _, err := c.Adopt(t.Context(), l.ID()); l.lose(); return err },
		"run":   func(l *Lease) error { return l.Run(t.Context(), Keep{}) },
	} {
		l := grant(t, c, 10*time.Second)
		if _, err := s.Client().Revoke(t.Context(), l.id); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := use(l); !errors.Is(err, ErrLeaseLost) {
				t.Errorf("%s: %v, want ErrLeaseLost", name, err)
			}
			if !l.Valid().IsZero() {
				t.Errorf("%s: valid until %v", name, l.Valid())
			}
		}
	}
}

func TestRevokedLeaseIsNotValidEvenWhenEtcdDoesNotAnswer(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, 10*time.Second)
	s.Cut()
	try, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := l.Revoke(try); !errors.Is(err, context.DeadlineExceeded) || !l.Valid().IsZero() {
		t.Errorf("got %v, valid until %v", err, l.Valid())
	}
	s.Mend()
	for range 2 { // revoking what is gone is no error
		if err := l.Revoke(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestManyAdoptOneLeaseAndAllLoseIt(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, 10*time.Second)
	adopted := make([]*Lease, 8)
	var wg sync.WaitGroup
	for i := range adopted {
		wg.Go(func() {
			began := time.Now()
			a, err := c.Adopt(t.Context(), l.ID())
			if err != nil {
				t.Error(err)
				return
			}
			if a.ID() != l.ID() || a.TTL() != l.TTL() || a.Valid().Before(began.Add(a.TTL())) {
				t.Errorf("adopted %x for %v, valid for %v", a.ID(), a.TTL(), a.Valid().Sub(began))
			}
			adopted[i] = a
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	if err := adopted[0].Revoke(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, a := range append(adopted, l) {
		if err := a.Renew(t.Context()); !errors.Is(err, ErrLeaseLost) {
			t.Errorf("after another has revoked it: %v", err)
		}
	}
}

func TestRunKeepsALeaseThroughAnOutageAndReportsOnlyChanges(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, 8*time.Second)
	changed := make(chan struct{}, 100)
	background(t, func(ctx context.Context) error { return l.Run(ctx, Keep{Changed: func() { changed <- struct{}{} }}) })
	granted := l.Valid()
	<-time.After(time.Until(granted)) // it would have ended by now
	if !l.Valid().After(granted) || len(changed) > 0 {
		t.Fatalf("valid for %v more, %d changes", l.Valid().Sub(granted), len(changed))
	}
	s.Cut()
	recv(t, "word that renewals fail", changed)
	if valid := l.Valid(); valid.IsZero() {
		t.Error("not valid at once")
	}
	s.Mend()
	recv(t, "word that they succeed", changed)
	if !l.Valid().After(time.Now()) || len(changed) > 0 {
		t.Errorf("valid until %v, %d more changes", l.Valid(), len(changed))
	}
}

func TestRunReportsWhenALeaseIsNoLongerValidAndWhenItIsLost(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, 2*time.Second)
	end := gone(t, s.Client(), OwnerKey(ip1))
	claim(t, c, l, owner)
	changed := make(chan struct{}, 100)
	done := make(chan error, 1)
	go func() { done <- l.Run(t.Context(), Keep{Changed: func() { changed <- struct{}{} }}) }()
	s.Cut()
	recv(t, "word that renewals fail", changed)
	recv(t, "word that it is no longer valid", changed)
	if time.Now().Before(l.Valid()) {
		t.Errorf("told %v too early", time.Until(l.Valid()))
	}
	recv(t, "the end of the claim", end)
	s.Mend()
	if err := recv(t, "Run", done); !errors.Is(err, ErrLeaseLost) {
		t.Errorf("got %v", err)
	}
	recv(t, "word that it is lost", changed)
}

// Of thousands of agents most hold nothing: etcd has their renewals to bear. How often is counted by the ticks of Run,
// for a busy machine makes them late.
func TestAnIdleLeaseIsRenewedAThirdAsOften(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, 4*time.Second)
	var asked, idle atomic.Int64
	idle.Store(1)
	type renewal struct{ asked, idle int64 }
	renewed, changed := make(chan renewal, 100), make(chan struct{}, 100)
	background(t, func(ctx context.Context) error {
		return l.Run(ctx, Keep{
			Idle:    func() bool { asked.Add(1); return idle.Load() == 1 },
			Renewed: func(time.Time, time.Duration) { renewed <- renewal{asked.Swap(0), idle.Load()} },
			Changed: func() { changed <- struct{}{} },
		})
	})
	for i := range 4 {
		if r := recv(t, "a renewal", renewed); r.asked != idleRenewals-1 {
			t.Errorf("renewal %d came after %d ticks, want %d", i, r.asked+1, idleRenewals)
		}
	}
	idle.Store(0)
	for recv(t, "a renewal", renewed).idle == 1 {
	}
	recv(t, "a renewal", renewed) // the one before may have begun while it was idle
	if r := recv(t, "a renewal", renewed); r.asked != 1 {
		t.Errorf("a lease that is not idle any more was renewed after %d ticks, want each", r.asked)
	}
	// Once one fails there is none left out, so that a lease is not lost to an outage that ends before it does.
	idle.Store(1)
	s.Cut()
	recv(t, "word that renewals fail", changed)
	for len(renewed) > 0 {
		<-renewed
	}
	asked.Store(0)
	s.Mend()
	if r := recv(t, "a renewal", renewed); r.asked > 0 {
		t.Errorf("%d renewals were left out while they failed", r.asked)
	}
	recv(t, "word that they succeed", changed)
	if !l.Valid().After(time.Now()) {
		t.Error("the lease was lost")
	}
}
