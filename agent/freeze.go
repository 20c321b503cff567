package agent

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"sync"
	"time"
)

// freeze is the rule for the case that all agents lose etcd: then nobody can claim, and each keeps its IPs. An agent without etcd asks
// every other. One that has lost etcd too, or has only just got it back, promises: for one permit length from now it claims nothing,
// revokes nothing, and uses no IP that it has claimed and does not use yet. With the promise of all that could claim the agent goes on as
// if etcd had confirmed its lease when it asked. All, not most: of the rest any could claim once the lease has ended.
//
// Who asks without a permit left, and gets no promise, is astray: cut off from an etcd that others have. It need not be waited for.
type freeze struct {
	length    time.Duration // of a permit
	keep      bool          // ask; without it the agent only promises
	send      func(node string, message []byte)
	renew     func()           // the permits, now; must not block
	confirmed func() time.Time // when the lease was last confirmed
	// peers returns all other agents, as etcd last had them; known is false while this process has not seen it.
	peers func() (names []string, known bool)
	wake  func() // the agent: somebody is astray; must not block

	process uint64 // tells the answers to a former process of the node apart
	start   time.Time

	mu       sync.Mutex           // guards what follows
	asked    map[string]time.Time // when what a peer last promised to was sent
	promised time.Time            // when this agent last promised; at its start it does not know
	lost     time.Time            // when etcd was last missed
	refused  map[string]refusal   // by who asked for a promise and got none
}

// refusal is a time in which an agent without permits asked again and again, while this one had etcd. After a permit's length it is astray:
// until then it may be on its way to another member of etcd.
type refusal struct{ first, last time.Time }

// message is what agents say to each other.
type message struct {
	Process uint64        `json:"process"` // of the agent that asks
	Sent    time.Duration `json:"sent"`    // when it asked, by its own clock
	Promise bool          `json:"promise,omitempty"`
	Silent  bool          `json:"silent,omitempty"` // who asks has no permit any more
}

// returning is for how long an agent goes on promising when etcd is back: the others' connections may come back later, for they wait
// up to a second between two attempts.
const returning = 3 * time.Second

func newFreeze(f *freeze) *freeze {
	f.process, f.start, f.asked, f.refused = rand.Uint64(), time.Now(), map[string]time.Time{}, map[string]refusal{}
	f.promised = f.start
	return f
}

// run asks while etcd is missing.
func (f *freeze) run(ctx context.Context) error {
	tick := time.NewTicker(f.length / 10)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if !f.missing() || !f.keep {
			continue
		}
		peers, _ := f.peers()
		for _, peer := range peers {
			f.say(peer, message{Process: f.process, Sent: time.Since(f.start), Silent: time.Since(f.confirmed()) > f.length})
		}
	}
}

func (f *freeze) say(to string, m message) {
	b, err := json.Marshal(m)
	if err == nil { // it cannot fail
		f.send(to, b)
	}
}

// missing reports whether etcd has been silent for so long that the permits are in danger. It is asked every fifth of a permit, and all
// have to miss it before the first permit ends.
func (f *freeze) missing() bool {
	if time.Since(f.confirmed()) < f.length*3/10 {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lost = time.Now()
	return true
}

// receive answers a question, or notes a promise.
func (f *freeze) receive(from string, b []byte) {
	var m message
	if json.Unmarshal(b, &m) != nil {
		return // of a version to come
	}
	if m.Promise {
		if m.Process == f.process {
			f.mu.Lock()
			if sent := f.start.Add(m.Sent); sent.After(f.asked[from]) {
				f.asked[from] = sent
			}
			f.mu.Unlock()
			f.renew()
		}
		return
	}
	missing, was := f.missing(), f.astray(from)
	f.mu.Lock()
	promise := missing || time.Since(f.lost) < returning
	if promise {
		f.promised = time.Now()
	}
	if promise || !m.Silent {
		delete(f.refused, from)
	} else {
		r := refusal{f.refused[from].first, time.Now()}
		if r.last.Sub(f.refused[from].last) > f.length {
			r.first = r.last
		}
		f.refused[from] = r
	}
	f.mu.Unlock()
	if promise {
		m.Promise = true
		f.say(from, m)
	} else if !was && f.astray(from) {
		f.wake()
	}
}

// astray reports whether an agent has been cut off from etcd for some time, and still is.
func (f *freeze) astray(node string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.refused[node]
	return r.last.Sub(r.first) >= f.length && time.Since(r.last) < f.length
}

// frozen returns the latest moment since which every other agent has promised; zero: not all have.
func (f *freeze) frozen() time.Time {
	if !f.keep {
		return time.Time{}
	}
	peers, known := f.peers()
	if !known {
		return time.Time{} // nobody knows who has to promise
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	oldest := time.Now()
	for _, peer := range peers {
		if f.asked[peer].Before(oldest) {
			oldest = f.asked[peer]
		}
	}
	return oldest
}

// bound returns until when this agent's promises bind it.
func (f *freeze) bound() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.promised.Add(f.length)
}
