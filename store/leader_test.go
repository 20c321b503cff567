package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"
)

type elected struct {
	l   *Leadership
	err error
}

func campaign(ctx context.Context, c *Client, id string, ttl time.Duration) <-chan elected {
	out := make(chan elected, 1)
	go func() {
		l, err := c.Campaign(ctx, CrdsyncElection, id, ttl)
		out <- elected{l, err}
	}()
	return out
}

func lead(t *testing.T, ctx context.Context, c *Client, id string) *Leadership {
	t.Helper()
	e := recv(t, "the election", campaign(ctx, c, id, time.Minute))
	if e.err != nil {
		t.Fatal(e.err)
	}
	return e.l
}

func isLost(l *Leadership) bool {
	select {
	case <-l.Lost():
		return true
	default:
		return false
	}
}

// candidates waits until n candidates have entered the election.
func candidates(t *testing.T, k *Cache, n int) {
	t.Helper()
	until(t, fmt.Sprintf("%d candidates", n), k.Changed(), func() bool {
		found := 0
		for range k.List(string(CrdsyncElection)) {
			found++
		}
		return found == n
	})
}

func TestOneLeadsAndTheNextFollowsWhenItResigns(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	k := tracked(t, c, CrdsyncElection.prefix())
	first := lead(t, t.Context(), c, "a")
	next := campaign(t.Context(), c, "b", time.Minute)
	candidates(t, k, 2)
	if len(next) > 0 || isLost(first) {
		t.Error("two leaders")
	}
	if err := first.Commit(t.Context(), Op{Key: "pools/p", Value: []byte("a")}); err != nil {
		t.Error(err)
	}
	if err := first.Resign(t.Context()); err != nil || !isLost(first) {
		t.Errorf("resigning: %v; lost: %t", err, isLost(first))
	}
	second := recv(t, "the second leader", next)
	if second.err != nil {
		t.Fatal(second.err)
	}
	if err := first.Commit(t.Context(), Op{Key: "pools/p", Value: []byte("a")}); !errors.Is(err, ErrNotLeader) {
		t.Errorf("the one that resigned: %v", err)
	}
	if err := second.l.Commit(t.Context(), Op{Key: "pools/p", Value: []byte("b")}); err != nil {
		t.Error(err)
	}
	if err := second.l.Resign(t.Context()); err != nil {
		t.Error(err)
	}
	if resp, err := s.Client().Leases(t.Context()); err != nil || len(resp.Leases) != 0 {
		t.Errorf("leases left: %v, %v", resp, err)
	}
}

func TestCommitOfALeaderWhoseSessionWasRevokedIsRefused(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	old := lead(t, t.Context(), c, "a")
	if _, err := s.Client().Revoke(t.Context(), old.session.Lease()); err != nil {
		t.Fatal(err)
	}
	now := lead(t, t.Context(), dial(t, s), "b")
	err := old.Commit(t.Context(), Op{Key: "pools/p", Value: []byte("a"), Absent: true})
	if !errors.Is(err, ErrNotLeader) || errors.Is(err, ErrConflict) {
		t.Errorf("got %v, want ErrNotLeader", err)
	}
	recv(t, "word that the leadership is lost", old.Lost())
	if r := get(t, s.Client(), "pools/p"); r.Value != nil {
		t.Errorf("the old leader wrote %s", r.Value)
	}
	if isLost(now) {
		t.Error("the new leader is lost")
	}
	if err := now.Resign(t.Context()); err != nil {
		t.Error(err)
	}
	if err := old.Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestALeaderThatIsCutOffLosesItsLeadership(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	e := recv(t, "the election", campaign(t.Context(), c, "a", 2*time.Second))
	if e.err != nil {
		t.Fatal(e.err)
	}
	s.Cut()
	recv(t, "word that the leadership is lost", e.l.Lost())
	s.Mend()
	if err := e.l.Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestCommitMakesAllChangesOrNone(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := lead(t, t.Context(), c, "a")
	defer func() {
		if err := l.Resign(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	commit := func(ops ...Op) error { return l.Commit(t.Context(), ops...) }
	if err := commit(Op{Key: "ids/1", Value: []byte("x"), Absent: true}, Op{Key: "ids/2", Value: []byte("y")}); err != nil {
		t.Fatal(err)
	}
	rev := get(t, s.Client(), "ids/1").Revision
	for name, tt := range map[string]struct {
		ops      []Op
		conflict string // keys; empty: none
	}{
		"a key that must not exist": {[]Op{{Key: "ids/3", Value: []byte("z")}, {Key: "ids/2", Value: []byte("z"), Absent: true}}, "ids/2"},
		"a stale revision":          {[]Op{{Key: "ids/3", Value: []byte("z")}, {Key: "ids/1", Revision: rev - 1}}, "ids/1"},
		"a revision of nothing":     {[]Op{{Key: "ids/9", Revision: rev}}, "ids/9"},
		"two conflicts":             {[]Op{{Key: "ids/1", Revision: 1}, {Key: "ids/2", Absent: true}}, "ids/1 ids/2"},
	} {
		err := commit(tt.ops...)
		if !errors.Is(err, ErrConflict) || errors.Is(err, ErrNotLeader) {
			t.Errorf("%s: %v, want ErrConflict", name, err)
			continue
		}
		for _, op := range tt.ops {
			if named := strings.Contains(err.Error(), op.Key); named != strings.Contains(tt.conflict, op.Key) {
				t.Errorf("%s: %s named: %t, in %q", name, op.Key, named, err)
			}
		}
		if r := get(t, s.Client(), "ids/3"); r.Value != nil {
			t.Errorf("%s: half of it was written", name)
		}
	}
	if err := commit(Op{Key: "ids/1", Revision: rev}, Op{Key: "ids/2", Value: []byte{}}); err != nil {
		t.Error(err)
	}
	if gone, empty := get(t, s.Client(), "ids/1"), get(t, s.Client(), "ids/2"); gone.Revision != 0 || empty.Revision == 0 || len(empty.Value) != 0 {
		t.Errorf("deleted: %+v, empty: %+v", gone, empty)
	}
	ops := make([]Op, maxTxnOps+1)
	for i := range ops {
		ops[i] = Op{Key: fmt.Sprintf("ids/%d", i), Value: []byte("x"), Absent: i > 2}
	}
	if err := commit(ops[:maxTxnOps]...); err != nil {
		t.Errorf("as many as fit: %v", err)
	}
	if err := commit(ops...); err == nil || errors.Is(err, ErrConflict) {
		t.Errorf("more than fit: %v", err)
	}
}

func TestACandidateThatStopsLeavesNothingBehind(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	k := tracked(t, c, CrdsyncElection.prefix())
	first := lead(t, t.Context(), c, "a")
	ctx, cancel := context.WithCancel(t.Context())
	next := campaign(ctx, c, "b", time.Minute)
	candidates(t, k, 2)
	cancel()
	if e := recv(t, "the candidate", next); !errors.Is(e.err, context.Canceled) {
		t.Errorf("got %v, %v", e.l, e.err)
	}
	candidates(t, k, 1)
	if err := first.Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestACandidateStopsAlsoWhileEtcdIsAway(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	k := tracked(t, c, CrdsyncElection.prefix())
	first := lead(t, t.Context(), c, "a")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	next := campaign(ctx, c, "b", time.Minute)
	candidates(t, k, 2)
	s.Cut()
	// From then on a request does not fail: it waits for a connection.
	if conn := c.etcd.ActiveConnection(); !conn.WaitForStateChange(t.Context(), connectivity.Ready) {
		t.Fatal("the connection stays")
	}
	cancel()
	if e := recv(t, "the candidate", next); !errors.Is(e.err, context.Canceled) {
		t.Errorf("got %v, %v", e.l, e.err)
	}
	s.Mend()
	if err := first.Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestACandidateWhoseLeaseEndsWhileItWaitsStandsAgain(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	k := tracked(t, c, CrdsyncElection.prefix())
	first := lead(t, t.Context(), c, "a")
	next := campaign(t.Context(), c, "b", 2*time.Second)
	candidates(t, k, 2)
	var own Record
	for _, r := range k.List(string(CrdsyncElection)) {
		if string(r.Value) == "b" {
			own = r
		}
	}
	if _, err := s.Client().Revoke(t.Context(), clientv3.LeaseID(own.Lease)); err != nil {
		t.Fatal(err)
	}
	candidates(t, k, 1)
	candidates(t, k, 2)
	if err := first.Resign(t.Context()); err != nil {
		t.Error(err)
	}
	second := recv(t, "the second leader", next)
	if second.err != nil {
		t.Fatal(second.err)
	}
	if err := second.l.Commit(t.Context(), Op{Key: "pools/p", Value: []byte("b")}); err != nil {
		t.Error(err)
	}
	if err := second.l.Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestLeadershipEndsWithItsContextAndResignsAfterIt(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	l := lead(t, ctx, c, "a")
	cancel()
	recv(t, "the end of the leadership", l.Lost())
	end, stop := context.WithTimeout(context.WithoutCancel(ctx), deadline)
	defer stop()
	if err := l.Resign(end); err != nil {
		t.Error(err)
	}
	if resp, err := s.Client().Leases(t.Context()); err != nil || len(resp.Leases) != 0 {
		t.Errorf("leases left: %v, %v", resp, err)
	}
}
