package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/egret-project/egret/ownership"
)

// A thousand events and more in half a second, each of which is seen to by itself in less time than the next one takes
// to come.
func TestEventsThatFollowOnEachOtherAreSeenToInFewReconciles(t *testing.T) {
	client := newEtcd(t)
	a := &agent{
		Config: Config{Node: "node-1", Store: client, Log: slog.New(slog.DiscardHandler)}, driver: driver{machine: newMachine(ownership.Config{})},
		view: client.NewView("node-1"), metrics: newMetrics(), dirty: make(chan struct{}, 1), observers: observers{natLog: new(natLogger)},
	}
	const long = 500 * time.Millisecond
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	var coming sync.WaitGroup
	events := 0
	coming.Go(func() {
		for ; ctx.Err() == nil; events++ {
			a.wake()
			time.Sleep(200 * time.Microsecond)
		}
	})
	if err := a.loop(ctx); err != nil {
		t.Fatal(err)
	}
	coming.Wait()
	n := 0
	if _, err := fmt.Sscanf(histogram(t, a.metrics, metricPass)[""], "%d in", &n); err != nil {
		t.Fatal(err)
	}
	most := int(long/gatherTime) + 1
	t.Logf("%d events in %v were seen to in %d reconciles", events, long, n)
	if n == 0 || n > most {
		t.Errorf("%d reconciles in %v, want %d at most", n, long, most)
	}
}
