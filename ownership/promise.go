package ownership

import (
	"maps"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// promises is the rule for the case that all agents lose etcd: then nobody can claim, and each keeps its IPs. An agent
// without etcd asks every other. One that has lost etcd too, or has only just got it back, promises: for P from now it
// claims nothing, revokes nothing, and uses no IP that it has claimed and does not use yet. With the promise of all
// that could claim the agent goes on as if etcd had confirmed its lease when it asked. All, not most: of the rest any
// could claim once the lease has ended.
//
// An agent that has no use for a yes does not ask etcd, so it does not know whether it has lost it. Asked by a peer it
// promises, which is always safe, and asks etcd itself from then on, for as long as the peer may ask again; it promises
// until etcd has answered.
//
// Whose lease has ended gets no promise, also while etcd is missing: others may use what it had. Its own permits have
// ended then, but where its machine was paused together with its clock.
//
// Who asks without a permit left, and gets no promise, is partitioned: cut off from an etcd that others have. It need
// not be waited for.
type promises struct {
	asker
	view     *egress.Snapshot     // the last one; nil: none yet
	known    bool                 // who could claim: peers
	void     bool                 // etcd was restored, and this node has not seen yet what it holds
	peers    []string             // as of the last Question, and deaf
	deaf     map[string]bool      // who was last seen without gossip, also when its record is gone: it may come back
	answered map[string]time.Time // when what a peer last promised to was sent
	until    time.Time            // until when this agent's promises bind it
	lost     time.Time            // when etcd was last missed
	asking   time.Time            // since when this agent asks etcd for a yes; zero: it does not
	wanted   time.Time            // until when it does since a peer asked for a promise
	refused  map[string]refusal   // by who asked for a promise and got none
}

// asker is this node's agent, as it asks for promises.
type asker struct {
	length  time.Duration // P
	keep    bool          // ask; without it the machine only promises
	process uint64
	start   time.Time
	lease   string // the one under which view has, or last had, its record
	seen    int64  // when that was: the last such revision
}

// refusal is a time in which an agent without permits asked again and again, while this one had etcd. After P it is
// partitioned: until then it may be on its way to another member of etcd.
type refusal struct{ first, last time.Time }

// Message is what agents say to each other.
type Message struct {
	Process uint64        `json:"process"` // of the agent that asks
	Sent    time.Duration `json:"sent"`    // when it asked, by its own clock
	Promise bool          `json:"promise,omitempty"`
	Silent  bool          `json:"silent,omitempty"` // who asks has no permit any more
	Permit  time.Duration `json:"permit,omitempty"` // P of who asks, up to MaxPermit: that long a promise binds
	Lease   string        `json:"lease,omitempty"`  // under which who asks has its record
	Seen    int64         `json:"seen,omitempty"`   // the last revision of etcd at which it saw that; 0: it has not
}

// returning is for how long an agent goes on promising when etcd is back: the others' connections may come back later,
// for they wait up to a second between two attempts.
const returning = 3 * time.Second

func (p *promises) init(cfg Config) {
	p.length, p.keep, p.process, p.start = cfg.Permit, cfg.Freeze && cfg.Gossip, cfg.Process, cfg.Start
	p.answered, p.refused, p.deaf = map[string]time.Time{}, map[string]refusal{}, map[string]bool{}
	p.see(cfg.Permit)
}

// see takes in the longest P: a process does not know what its former one promised, nor to whom.
func (p *promises) see(longest time.Duration) { p.until = later(p.until, p.start.Add(longest)) }

// meet takes in which agents etcd has, and which of the others have no gossip, by their records. lease is this agent's.
func (p *promises) meet(s *egress.Snapshot, node, lease string) {
	p.view = s
	if s.Agents[node].Lease == lease {
		p.lease, p.seen = lease, s.Revision
	} else if p.lease != lease {
		p.lease, p.seen = "", 0
	}
	for name, a := range s.Agents {
		if a.Promises || a.Revocable { // an older one says the latter alone, and not while it restarts
			delete(p.deaf, name)
		} else if name != node && !a.Restarting {
			p.deaf[name] = true
		}
	}
	maps.DeleteFunc(p.deaf, func(name string, _ bool) bool { return plan.Gone(s, name) })
}

// ask asks the peers while etcd is missing.
func (p *promises) ask(now, confirmed time.Time, peers []string) []Effect {
	p.known, p.peers = true, slices.AppendSeq(slices.Clone(peers), maps.Keys(p.deaf))
	if !p.missing(now, confirmed) || !p.keep {
		return nil
	}
	var out []Effect
	for _, peer := range peers {
		out = append(out, Say{To: peer, Message: Message{
			Process: p.process, Sent: now.Sub(p.start), Silent: now.Sub(confirmed) > p.length, Permit: p.length,
			Lease: p.lease, Seen: p.seen,
		}})
	}
	return out
}

// asked notes that this agent asks etcd for a yes.
func (p *promises) asked(now time.Time) {
	if p.asking.IsZero() {
		p.asking = now
	}
}

// missing reports whether etcd has been silent for so long that the permits are in danger. It is asked every fifth of
// P, and all have to miss it before the first permit ends.
func (p *promises) missing(now, confirmed time.Time) bool {
	if p.asking.IsZero() || now.Sub(later(confirmed, p.asking)) < p.length*3/10 {
		return false
	}
	p.lost = now
	return true
}

// heard answers a question, or notes a promise.
func (p *promises) heard(now time.Time, e Heard, confirmed time.Time) []Effect {
	m := e.Message
	if m.Promise {
		if m.Process == p.process {
			p.answered[e.From] = later(p.answered[e.From], p.start.Add(m.Sent))
			return []Effect{Renew{}}
		}
		return nil
	}
	if m.Permit > MaxPermit {
		return nil // no agent of these versions has it, and a promise would keep this one from claims for as long
	}
	if p.ended(e.From, m) {
		return nil
	}
	was := p.partitioned(now, e.From)
	if was && m.Silent {
		// a promise would begin nothing, and etcd need not be asked again and again
		p.refused[e.From] = refusal{p.refused[e.From].first, now}
		return nil
	}
	p.wanted = now.Add(2 * max(p.length, m.Permit))
	idle := p.asking.IsZero()
	unknown := idle || confirmed.Before(p.asking)
	if p.missing(now, confirmed) || unknown || now.Sub(p.lost) < returning {
		p.until = later(p.until, now.Add(max(p.length, m.Permit)))
		delete(p.refused, e.From)
		m.Promise = true
		out := []Effect{Say{To: e.From, Message: m}}
		if idle {
			out = append(out, Confirm{})
		}
		return out
	}
	if !m.Silent {
		delete(p.refused, e.From)
		return nil
	}
	r := refusal{p.refused[e.From].first, now}
	if r.last.Sub(p.refused[e.From].last) > p.length {
		r.first = r.last
	}
	p.refused[e.From] = r
	if !was && p.partitioned(now, e.From) {
		return []Effect{Wake{}}
	}
	return nil
}

// ended reports whether the lease of an agent that asks for a promise has ended, as far as this one has seen etcd.
func (p *promises) ended(node string, m Message) bool {
	return p.view != nil && m.Seen > 0 && p.view.Revision >= m.Seen && p.view.Agents[node].Lease != m.Lease
}

// partitioned reports whether an agent has been cut off from etcd for some time, and still is.
func (p *promises) partitioned(now time.Time, node string) bool {
	r := p.refused[node]
	return r.last.Sub(r.first) >= p.length && now.Sub(r.last) < p.length
}

// all returns the latest moment since which all peers have promised; zero: not all have.
func (p *promises) all(now time.Time) time.Time {
	if !p.keep || !p.known || p.void {
		return time.Time{}
	}
	oldest := now
	for _, peer := range p.peers {
		if p.answered[peer].Before(oldest) {
			oldest = p.answered[peer]
		}
	}
	return oldest
}
