package agent

import (
	"context"
	"errors"
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

// What failed may be due since long ago.
func TestAFaultThatStaysCostsNoReconcileAfterTheOther(t *testing.T) {
	now, broken := time.Now(), errors.New("broken")
	for _, tt := range []struct {
		name    string
		next    time.Time
		err     error
		backoff time.Duration
		want    time.Duration
		then    time.Duration // the next backoff
	}{
		{"nothing is due", time.Time{}, nil, time.Second, atLeast, minBackoff},
		{"due long ago", now.Add(-time.Hour), nil, time.Second, -time.Hour, minBackoff}, // at once
		{"due in a while", now.Add(time.Second), nil, minBackoff, time.Second, minBackoff},
		{"failed", time.Time{}, broken, minBackoff, minBackoff, 2 * minBackoff},
		{"failed again", time.Time{}, broken, time.Second, time.Second, 2 * time.Second},
		{"failed for minutes", time.Time{}, broken, maxBackoff, maxBackoff, maxBackoff},
		{"failed, and due long ago", now.Add(-time.Hour), broken, time.Second, minBackoff, 2 * time.Second},
		{"failed, and due in a while", now.Add(300 * time.Millisecond), broken, time.Second, 300 * time.Millisecond, 2 * time.Second},
	} {
		backoff := tt.backoff
		if got := pause(now, tt.next, tt.err, &backoff); got != tt.want || backoff != tt.then {
			t.Errorf("%s: waits for %v, and the next time for %v at most, want %v and %v", tt.name, got, backoff, tt.want, tt.then)
		}
	}
}
