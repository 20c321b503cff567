package etcdtest

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// dial returns a client that goes on as the server is stopped and started.
func dial(t *testing.T, s *Server) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestServerKeepsItsDataAndItsEndpoint(t *testing.T) {
	s := New(t)
	c := dial(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	if _, err := c.Put(ctx, "k", "v"); err != nil {
		t.Fatal(err)
	}
	s.Restart()
	want := func() {
		t.Helper()
		if resp, err := c.Get(ctx, "k"); err != nil || len(resp.Kvs) != 1 || string(resp.Kvs[0].Value) != "v" {
			t.Fatalf("got %v, %v", resp, err)
		}
	}
	want()
	for name, disturb := range map[string]func(){"cut": s.Cut, "frozen": s.Freeze, "stopped": s.Stop} {
		disturb()
		short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		if _, err := c.Get(short, "k"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: got %v, want no answer", name, err)
		}
		cancel()
		if name == "stopped" {
			s.Start()
		}
		s.Mend()
		want()
	}
}

func TestStopLetsCallsEndThatReadTheDatabase(t *testing.T) {
	s := New(t)
	c := dial(t, s)
	var asking sync.WaitGroup
	defer asking.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var answers atomic.Int64
	for range 8 {
		asking.Go(func() {
			for ctx.Err() == nil {
				if _, err := c.Status(ctx, s.Endpoint()); err == nil {
					answers.Add(1)
				}
			}
		})
	}
	for range 4 {
		for before := answers.Load(); answers.Load() < before+100; time.Sleep(time.Millisecond) {
		}
		s.Restart() // a call that came too late would end the process
	}
}

func TestCompactDropsHistory(t *testing.T) {
	s := New(t)
	for range 3 {
		if _, err := s.Client().Put(t.Context(), "k", "v"); err != nil {
			t.Fatal(err)
		}
	}
	s.Compact()
	resp := <-s.Client().Watch(t.Context(), "k", clientv3.WithRev(2))
	if resp.CompactRevision == 0 {
		t.Errorf("a watch from revision 2 got %v, want that it is compacted", resp.Err())
	}
}

func TestAClusterOutlivesItsLeaderAndItsMembers(t *testing.T) {
	c := NewCluster(t, 3)
	lead := c.Leader()
	c.Stop(lead)
	if next := c.Leader(); next == lead {
		t.Fatalf("member %d, which is stopped, leads", lead)
	}
	c.Start(lead)
	before := c.Endpoints()
	if _, err := c.Member(0).Client().Put(t.Context(), "k", "v"); err != nil {
		t.Fatal(err)
	}
	for i := range before {
		c.Replace(i)
	}
	for i, endpoint := range c.Endpoints() {
		if endpoint == before[i] {
			t.Errorf("member %d has the address of the one that it replaces, %s", i, endpoint)
		}
		if resp, err := c.Member(i).Client().Get(t.Context(), "k"); err != nil || len(resp.Kvs) != 1 {
			t.Errorf("member %d: got %v, %v", i, resp, err)
		}
	}
}
