package monitor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"
)

// checkTimeout is how long a check may take. A kubelet waits for a second by default, and asks again.
const checkTimeout = 800 * time.Millisecond

// checks are those of one page.
type checks struct {
	mu   sync.Mutex // guards list
	list map[string]*check
}

type check struct {
	ask     func() error
	mu      sync.Mutex // guards running
	running *answer    // of the run that has not ended yet; nil: there is none
}

// answer is there when done is closed.
type answer struct {
	done chan struct{}
	err  error
}

func (c *checks) add(name string, ask func() error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.list == nil {
		c.list = map[string]*check{}
	}
	c.list[name] = &check{ask: ask}
}

// ServeHTTP answers 200 and "ok", or 503 and a line for each check that failed.
func (c *checks) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	list := maps.Clone(c.list)
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(r.Context(), checkTimeout)
	defer cancel()
	answers := map[string]*answer{}
	for name, k := range list {
		answers[name] = k.start()
	}
	text := ""
	for _, name := range slices.Sorted(maps.Keys(answers)) {
		if err := answers[name].wait(ctx); err != nil {
			text += fmt.Sprintf("%s: %v\n", name, err)
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if text == "" {
		text = "ok\n"
	} else {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = w.Write([]byte(text)) // who asked has gone
}

// start begins to run the check, or returns the run that has not ended yet.
func (k *check) start() *answer {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.running != nil {
		return k.running
	}
	a := &answer{done: make(chan struct{}), err: errors.New("the check panicked")}
	k.running = a
	go func() {
		defer func() {
			_ = recover() // the answer says it, and a question must not end the daemon
			k.mu.Lock()
			k.running = nil
			k.mu.Unlock()
			close(a.done)
		}()
		a.err = k.ask()
	}()
	return a
}

func (a *answer) wait(ctx context.Context) error {
	select {
	case <-a.done:
	case <-ctx.Done():
		select { // both may be
		case <-a.done:
		default:
			return fmt.Errorf("no answer within %v", checkTimeout)
		}
	}
	return a.err
}
