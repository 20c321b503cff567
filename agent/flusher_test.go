package agent

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
)

// Each flush looks at the whole table of connections.
func TestPodsThatComeAndGoAllTheTimeShareFlushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFlusher(func() {})
		f.kick, f.urgent = make(chan struct{}, 1), make(chan struct{}, 1)
		f.toFlush = newFlush()
		const took, gap = 15 * time.Millisecond, 200 * time.Millisecond
		var mu sync.Mutex // guards asked
		asked, flushed := map[netip.Addr]time.Time{}, 0
		var slowest, first time.Duration
		f.delete = func(_ func(conntrack.Connection) bool, filters ...conntrack.Filter) error {
			flushed++
			mu.Lock()
			for _, filter := range filters {
				waited := time.Since(asked[filter.Source])
				slowest = max(slowest, waited)
				if delete(asked, filter.Source); flushed <= 3 {
					first = max(first, waited)
				}
			}
			mu.Unlock()
			time.Sleep(took)
			return nil
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { _ = f.run(ctx); close(done) }()
		const pods = 150
		for i := range pods {
			ip := netip.AddrFrom4([4]byte{10, 244, 1, byte(i)})
			mu.Lock()
			asked[ip] = time.Now()
			mu.Unlock()
			_ = f.follow(nft.Changes{Reselected: []netip.Addr{ip}}, plan.Desired{}) // no flush has failed
			time.Sleep(gap)
		}
		time.Sleep(flushRest + took)
		stop()
		<-done
		if len(asked) > 0 {
			t.Errorf("%d pods were not flushed", len(asked))
		}
		if first > took {
			t.Errorf("one of the first flushes waited for %v", first)
		}
		if slowest > flushRest+took {
			t.Errorf("a pod waited for its flush for %v, want %v at most", slowest, flushRest+took)
		}
		if most := pods * 7 / 10; flushed > most {
			t.Errorf("%d flushes for %d pods, want %d at most", flushed, pods, most)
		}
	})
}

// Until the connections of an egress IP that left are flushed the tables drop their packets.
func TestAGatewayThatChangedIsFlushedAtOnceBesidePodsThatComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFlusher(func() {})
		f.kick, f.urgent = make(chan struct{}, 1), make(chan struct{}, 1)
		f.toFlush = newFlush()
		ip := netip.MustParseAddr("192.0.2.11")
		var asked, flushed time.Time
		f.delete = func(_ func(conntrack.Connection) bool, filters ...conntrack.Filter) error {
			for _, filter := range filters {
				if filter.Translated == ip {
					flushed = time.Now()
				}
			}
			time.Sleep(200 * time.Millisecond) // a table of many entries
			return nil
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { _ = f.run(ctx); close(done) }()
		pod := func(i int) { // no flush has failed
			_ = f.follow(nft.Changes{Reselected: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 1, byte(i)})}}, plan.Desired{})
		}
		for i := range 5 {
			pod(i)
			time.Sleep(100 * time.Millisecond)
		}
		asked = time.Now() // it rests
		_ = f.follow(nft.Changes{Unhosted: []netip.Addr{ip}}, plan.Desired{})
		time.Sleep(3 * time.Second)
		stop()
		<-done
		if waited := flushed.Sub(asked); flushed.IsZero() || waited > 250*time.Millisecond {
			t.Errorf("an egress IP that left was flushed after %v (%t), want that it waits for no rest", waited, !flushed.IsZero())
		}
	})
}
