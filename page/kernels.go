package page

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

// What traces may cost agents: maxTraced of them are asked at a time what their kernels have, for all who look, and
// each counts as asked for tracePace at least. An agent reads all that Egret has in its kernel for it, and asks next
// hops for half a second. As many are asked beside these that were silent for silentFor when they were asked last.
const (
	maxTraced = 4
	tracePace = 250 * time.Millisecond
	silentFor = time.Second
)

var errTracing = errors.New("agents are being asked for other traces: ask again")

// paced returns ask within these bounds. Who finds no turn in his time is refused. Agents that were silent wait for each
// other alone, so that the others answer however many are silent.
func paced(ask operator.Ask) operator.Ask {
	turns, silentTurns := make(slots, maxTraced), make(slots, maxTraced)
	var mu sync.Mutex // guards silent
	silent := map[string]bool{}
	return func(ctx context.Context, node string, addresses []netip.Addr, page string, q url.Values, reply any) error {
		mu.Lock()
		turns := turns
		if silent[node] {
			turns = silentTurns
		}
		mu.Unlock()
		leave, ok := turns.enter(ctx, tracePace)
		if !ok {
			return errTracing
		}
		defer leave()
		began := time.Now()
		err := ask(ctx, node, addresses, page, q, reply)
		mu.Lock()
		defer mu.Unlock()
		if time.Since(began) >= silentFor {
			silent[node] = true
		} else if ctx.Err() == nil { // else nobody has waited for it that long
			delete(silent, node)
		}
		return err
	}
}

// traced is the answer of trace.
type traced struct {
	operator.Way
	Note string `json:"note,omitempty"` // what it does not go by
}

// traceIn answers how a pod leaves.
func (p *Page) traceIn(ctx context.Context, now *shown, q operator.Question) (t traced, err error) {
	agents := p.kernels
	agents.Latest = func() store.Whole {
		select {
		case <-time.After(minPause): // the next records are there
		case <-ctx.Done():
		}
		if next, err := p.current(ctx); err == nil {
			return next.whole
		}
		return now.whole
	}
	t.Way, err = operator.TraceIn(ctx, now.whole, q, agents)
	asked := slices.ContainsFunc(t.Steps, func(s operator.Step) bool { return s.What == "kernel" })
	switch {
	case p.kernels.Ask == nil:
		t.Note = "This goes by the records in etcd alone: no agent is asked here what its kernel has " +
			"(--agents-port says how they are, metrics.enabled in the chart)."
	case asked && q.To.IsValid():
		t.Note = fmt.Sprintf("Kernels are asked for the way to anywhere outside: for that to %s ask egret trace.", q.To)
	}
	return t, err
}
