package admission

import (
	"context"
	"sync"
)

// shared is something that is read for who asks, as it is later than his question. Those who ask while it is read share
// the next reading: whoever asks much has it read one after the other, and others wait for two readings at most. The
// zero value is ready for use.
type shared[T any] struct {
	mu      sync.Mutex  // guards what follows
	next    *reading[T] // has not begun
	current *reading[T] // is the last that has begun; nil: none has
}

type reading[T any] struct {
	done  chan struct{} // closed when value and err are there
	value T
	err   error
}

// read returns what do returns, which is called after read was; by somebody else, with his context's values, where
// others ask at the time. What it returns is not to be changed. It gives up when ctx ends.
func (s *shared[T]) read(ctx context.Context, do func(context.Context) (T, error)) (T, error) {
	s.mu.Lock()
	r := s.next
	if r == nil {
		r = &reading[T]{done: make(chan struct{})}
		s.next = r
		before := s.current
		go func() {
			if before != nil {
				<-before.done
			}
			// Whoever else waits for it is not to go without it when this one hangs up.
			of, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
			defer cancel()
			s.mu.Lock()
			s.next, s.current = nil, r // who comes from now on wants what is later
			s.mu.Unlock()
			r.value, r.err = do(of)
			close(r.done)
		}()
	}
	s.mu.Unlock()
	select {
	case <-r.done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}
