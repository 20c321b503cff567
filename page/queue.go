package page

import (
	"context"
	"net/netip"
	"sync"
	"time"
)

// queues has the questions of a client wait for each other, so that many cost as much at a time as one. The zero value
// is ready, and its methods are safe for concurrent use.
type queues struct {
	mu sync.Mutex // guards of, and the users of each
	of map[netip.Prefix]*queue
}

type queue struct {
	first chan struct{} // capacity 1: who is answered
	users int           // who are answered or wait; a queue without is deleted
}

// enter waits until no other question of a client is answered, and returns what lets the next one in. Its error is
// that of ctx.
func (q *queues) enter(ctx context.Context, who netip.Prefix) (leave func(), err error) {
	q.mu.Lock()
	if q.of == nil {
		q.of = map[netip.Prefix]*queue{}
	}
	own := q.of[who]
	if own == nil {
		own = &queue{first: make(chan struct{}, 1)}
		q.of[who] = own
	}
	own.users++
	q.mu.Unlock()
	select {
	case own.first <- struct{}{}:
		return func() { <-own.first; q.drop(who, own) }, nil
	case <-ctx.Done():
		q.drop(who, own)
		return nil, ctx.Err()
	}
}

func (q *queues) drop(who netip.Prefix, own *queue) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if own.users--; own.users == 0 {
		delete(q.of, who)
	}
}

// slots bound how many agents are asked at a time, which is their capacity.
type slots chan struct{}

// enter waits for a slot, and returns what leaves it, which is taken for pace at least; false: ctx has ended.
func (s slots) enter(ctx context.Context, pace time.Duration) (leave func(), ok bool) {
	select {
	case s <- struct{}{}:
	case <-ctx.Done():
		return nil, false
	}
	began := time.Now()
	return func() {
		// A timer that is due at once ends the process where tests have their own clock and look for races (Go 1.26).
		left := pace - time.Since(began)
		if left <= 0 {
			<-s
			return
		}
		time.AfterFunc(left, func() { <-s })
	}, true
}
