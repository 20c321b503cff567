package agent

import (
	"errors"
	"sync"
)

// readiness is what the node's kubelet is told: an agent is ready from its first pass that left nothing undone, tables and all. A later fault does
// not take that back: it is in the metrics and in the conditions of the egresses, and a restart of the others would mend nothing.
type readiness struct {
	mu   sync.Mutex // guards what follows
	done bool
	err  error // of the last pass, until one is done
}

// passed notes the end of a pass, and reports whether the agent is ready by it, and was not before.
func (r *readiness) passed(err error) (first bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first = !r.done && err == nil
	r.done, r.err = r.done || err == nil, err
	return first
}

func (r *readiness) check() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.done:
		return nil
	case r.err != nil:
		return r.err
	}
	return errors.New("the kernel has not been programmed yet")
}
