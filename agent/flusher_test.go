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
		f.kick = make(chan struct{}, 1)
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
