package store

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/egret-project/egret/egress"
)

// TestALockThatIsHandedToAnAgentOnItsWayOutStaysOnNoLeaseThatEnds: the owner did not see in time that the target
// restarts.
func TestALockThatIsHandedToAnAgentOnItsWayOutStaysOnNoLeaseThatEnds(t *testing.T) {
	for name, answered := range map[string]bool{"it answers for the IP": true, "it does not answer yet": false} {
		t.Run(name, func(t *testing.T) {
			h := prepare(t, dial(t, start(t)))
			next := grant(t, h.c, time.Minute)
			// The worst moment: its keys were listed already.
			listed := func() {
				if ok, err := h.c.HandOver(t.Context(), h.o, h.m, h.to); !ok || err != nil {
					t.Fatal(ok, err)
				}
			}
			a := h.to
			a.Restarting = true
			if err := h.lease.moveTo(t.Context(), next, a, func(netip.Addr) bool { return answered }, listed, nil); err != nil {
				t.Fatal(err)
			}
			if keys, err := h.lease.keys(t.Context()); err != nil || len(keys) > 0 {
				t.Errorf("under the former lease: %v, %v", keys, err)
			}
			r, there := find(t, h.c, OwnerKey(ip1))
			if answered && (!there || r.Lease != next.ID()) {
				t.Errorf("the lock is there: %t, under lease %x, want %x", there, r.Lease, next.ID())
			}
			if !answered {
				if there {
					t.Fatalf("the lock is kept, and nobody answers for the IP: %s", r.Value)
				}
				// What n1 said as it handed over counts in an etcd that was not restored since, and n2 does not say.
				claimSeen(t, h.c, grant(t, h.c, time.Minute), egress.Owner{IP: ip1, Node: "n1"}, h.o.Revision)
				if o := h.owner(t); o.From != "" {
					t.Errorf("the next owner has it from %q, and does not wait", o.From)
				}
			}
		})
	}
}

// faulty is etcd's KV, one transaction of which ends with an error: it is not done, or done, or done later.
type faulty struct {
	clientv3.KV
	fails, n int
	how      string
	later    sync.WaitGroup
	late     chan struct{} // closed: what is to be done later is done; nil: soon
	begun    func()        // it has begun, with late
}

type faultyTxn struct {
	clientv3.Txn
	ctx context.Context
	of  *faulty
}

func (f *faulty) Txn(ctx context.Context) clientv3.Txn {
	return &faultyTxn{f.KV.Txn(context.WithoutCancel(ctx)), ctx, f}
}

func (x *faultyTxn) If(cs ...clientv3.Cmp) clientv3.Txn  { x.Txn = x.Txn.If(cs...); return x }
func (x *faultyTxn) Then(os ...clientv3.Op) clientv3.Txn { x.Txn = x.Txn.Then(os...); return x }
func (x *faultyTxn) Else(os ...clientv3.Op) clientv3.Txn { x.Txn = x.Txn.Else(os...); return x }

func (x *faultyTxn) Commit() (*clientv3.TxnResponse, error) {
	x.of.n++
	if x.of.n != x.of.fails {
		return x.Txn.Commit()
	}
	switch x.of.how {
	case "done", "hangs":
		if _, err := x.Txn.Commit(); err != nil {
			return nil, err
		}
		if x.of.how == "hangs" { // the member stands still
			<-x.ctx.Done()
			return nil, x.ctx.Err()
		}
	case "later": // after the next listing, and the next transaction was begun
		x.of.later.Go(func() {
			if x.of.late != nil {
				<-x.of.late
			} else {
				time.Sleep(insistGap + 10*time.Millisecond)
			}
			_, _ = x.Txn.Commit()
		})
		if x.of.late != nil {
			x.of.begun()
			<-x.ctx.Done()
		}
		return nil, context.DeadlineExceeded
	}
	return nil, status.Error(codes.Unknown, "unexpected HTTP status code received from server: 200 (OK); malformed header: missing HTTP content-type")
}

// As while a member of etcd stops, as in a rollout of etcd and of the agents at once: then the locks have to be moved all
// the same, or the node's IPs are cut off until the next agent.
func TestLocksAreMovedWhereARequestFailsOrItsAnswerIsLost(t *testing.T) {
	failed := 0
	for _, how := range []string{"lost", "done", "hangs", "later"} {
		for fails := 1; fails <= 4; fails++ {
			c := dial(t, start(t))
			l, next := grant(t, c, time.Minute), grant(t, c, time.Minute)
			a := egress.Agent{Node: "n1", Lease: egress.FormatLease(l.ID())}
			if err := c.PutAgent(t.Context(), l, a, whatever); err != nil {
				t.Fatal(err)
			}
			claim(t, c, l, egress.Owner{IP: ip1, Node: "n1"})
			claim(t, c, l, egress.Owner{IP: ip2, Node: "n1"}) // to be given back
			kv := &faulty{KV: c.etcd.KV, fails: fails, how: how}
			c.etcd.KV = kv
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			err := l.MoveTo(ctx, next, a, func(ip netip.Addr) bool { return ip == ip1 }, nil)
			cancel()
			kv.later.Wait()
			c.etcd.KV = kv.KV
			if kv.n >= fails {
				failed++
			}
			left, leftErr := l.keys(t.Context())
			if err = errors.Join(err, leftErr); err != nil || len(left) > 0 {
				t.Errorf("transaction %d, %s: %v; left under the former lease: %v", fails, how, err, left)
			}
			lock, there := find(t, c, OwnerKey(ip1))
			record, _ := find(t, c, AgentKey("n1"))
			if _, kept := find(t, c, OwnerKey(ip2)); kept || !there || lock.Lease != next.ID() || record.Lease != next.ID() {
				t.Errorf("transaction %d, %s: the lock %t under %x, the record under %x, want both under %x; the other lock is kept: %t",
					fails, how, there, lock.Lease, record.Lease, next.ID(), kept)
			}
		}
	}
	if failed < 4 {
		t.Errorf("%d transactions failed, want those of all kinds", failed)
	}
}

// The next process has adopted the lease, and answers for what is under it. What its former one has sent moves none of
// that, or it would lose all of it in the middle of its work.
func TestAMoveOfAFormerProcessDoesNothingToALeaseThatIsRenumbered(t *testing.T) {
	c := dial(t, start(t))
	l, next := grant(t, c, time.Minute), grant(t, c, time.Minute)
	a := egress.Agent{Node: "n1", Lease: egress.FormatLease(l.ID())}
	if err := c.PutAgent(t.Context(), l, a, whatever); err != nil {
		t.Fatal(err)
	}
	claim(t, c, l, egress.Owner{IP: ip1, Node: "n1"})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	kv := &faulty{KV: c.etcd.KV, fails: 1, how: "later", late: make(chan struct{}), begun: cancel} // its time to stop is over then
	c.etcd.KV = kv
	err := l.MoveTo(ctx, next, a, func(netip.Addr) bool { return true }, nil)
	c.etcd.KV = kv.KV
	if err == nil || kv.n == 0 {
		t.Fatalf("%v, %d transactions; want that the one that moves is under way", err, kv.n)
	}
	adopted, err := c.Adopt(t.Context(), l.ID())
	if err == nil {
		err = adopted.Renumber(t.Context(), "n1", []netip.Addr{ip1})
	}
	if err != nil {
		t.Fatal(err)
	}
	close(kv.late)
	kv.later.Wait()
	lock, _ := find(t, c, OwnerKey(ip1))
	record, _ := find(t, c, AgentKey("n1"))
	if lock.Lease != l.ID() || record.Lease != l.ID() {
		t.Errorf("the lock is under %x, the record under %x, want %x", lock.Lease, record.Lease, l.ID())
	}
}

func TestInsistEndsWhereTheNextCallWouldFailTheSame(t *testing.T) {
	for name, tt := range map[string]struct {
		errs []error
		want error
	}{
		"success at last":      {[]error{status.Error(codes.Unavailable, "x"), status.Error(codes.Unknown, "raft proposal dropped"), nil}, nil},
		"a changed lock":       {[]error{ErrChanged}, ErrChanged},
		"a lease that is lost": {[]error{ErrLeaseLost}, ErrLeaseLost},
		"not allowed":          {[]error{rpctypes.ErrPermissionDenied}, rpctypes.ErrPermissionDenied},
		"a lease that ended":   {[]error{rpctypes.ErrLeaseNotFound}, rpctypes.ErrLeaseNotFound},
		"roles just turned on": {[]error{rpctypes.ErrUserEmpty, nil}, nil},
		"a full etcd":          {[]error{rpctypes.ErrNoSpace}, rpctypes.ErrNoSpace},
	} {
		n := 0
		err := Insist(t.Context(), func(context.Context) error { n++; return tt.errs[n-1] })
		if !errors.Is(err, tt.want) || n != len(tt.errs) {
			t.Errorf("%s: %v after %d calls", name, err, n)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := Insist(ctx, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }); err == nil {
		t.Error("it succeeded when its time was over")
	}
}

func find(t *testing.T, c *Client, key string) (Record, bool) {
	t.Helper()
	records, err := c.List(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	r, ok := records[key]
	return r, ok
}
