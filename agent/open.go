package agent

import (
	"log/slog"
	"sync"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
)

const (
	// openEvery is for how long a count of open connections is good.
	openEvery = 15 * time.Second
	// openShare bounds the time that counts take, as portsShare.
	openShare = 100
)

// openConnections counts the connections that this node's pods have open by each egress IP. The kernel looks at its
// whole table for that, so who asks gets the last count, and has the next one made where that is old.
type openConnections struct {
	log   *slog.Logger
	count func() (map[egress.ID]int, error)

	mu       sync.Mutex // guards what follows
	counting bool
	failed   bool // the last count did
	due      time.Time
	last     map[egress.ID]int // nil: there is none
}

// counts returns how many there are, as they were counted last.
func (o *openConnections) counts() map[egress.ID]int {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.counting && !time.Now().Before(o.due) {
		o.counting = true
		go o.recount()
	}
	return o.last
}

func (o *openConnections) recount() {
	began := time.Now()
	count, err := o.count()
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil && !o.failed {
		o.log.Warn("open connections not counted, will retry", "err", err)
	}
	now := time.Now()
	o.counting, o.failed, o.last, o.due = false, err != nil, count, now.Add(max(openEvery, openShare*now.Sub(began)))
}

// openHere reports whether a connection is open, and of a pod of this node: as a gateway it has those of other nodes'
// pods too, where they have no block.
func openHere(c conntrack.Connection) bool {
	_, other := egress.IndexOfSource(c.Source)
	return !c.Ended && !other
}
