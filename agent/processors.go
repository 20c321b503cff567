package agent

import (
	"runtime"
	"sync"
	"time"
)

// restAfter is how long after the last pass the agent is at rest.
const restAfter = 2 * time.Second

// processors has the Go runtime use one processor while the agent is at rest, and as many as before while there are
// passes to make. At rest it has some microseconds' work tens of times a second, and with more than one processor the
// runtime wakes a thread at each of them that looks for more to do, in vain: a fifth to a third of all that an agent at
// rest takes.
type processors struct {
	most int
	rest *time.Timer

	mu     sync.Mutex // guards what follows
	worked time.Time
	ended  bool
}

func newProcessors() *processors {
	p := &processors{most: runtime.GOMAXPROCS(0), worked: time.Now()}
	p.rest = time.AfterFunc(restAfter, p.idle)
	return p
}

// work says that there is work now. A nil *processors leaves all as it is.
func (p *processors) work() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.worked = time.Now()
	p.rest.Reset(restAfter)
	runtime.GOMAXPROCS(p.most) // which does nothing where it is so
}

func (p *processors) idle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ended && time.Since(p.worked) >= restAfter { // else it is called again
		runtime.GOMAXPROCS(1)
	}
}

// end undoes what it did.
func (p *processors) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	p.rest.Stop()
	runtime.GOMAXPROCS(p.most)
}
