package ownership

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// peers is what the gossip says of the other agents, and since when.
type peers struct {
	dead   func(node string) bool
	living map[string]egress.Agent // plan.Living of the round
	known  map[string]time.Time    // since when a lease is seen
	of     map[string]egress.Agent // those whose leases known has
	since  map[string]time.Time    // since when the agent of a lease is seen to be dead

	suspicions map[string]suspicion // the last one against the agent of each node
	doubts     map[string]doubt     // by lease
	restores   int                  // of etcd, as of suspicions
}

// suspicion is one in etcd, as this node saw it.
type suspicion struct {
	revision     int64
	since, ended time.Time // when it was seen first, and when it was seen not to be there any more; zero: it is
	void         bool      // an agent that does not end suspicions was seen under its lease: it gets a yes all the same
}

// doubt is for how long the agent of a lease is not suspected again after it ended a suspicion while the gossip held it
// for dead, and until when.
type doubt struct {
	trusted time.Duration
	until   time.Time
}

func (p *peers) init() {
	p.known, p.since, p.dead = map[string]time.Time{}, map[string]time.Time{}, func(string) bool { return false }
	p.suspicions, p.doubts = map[string]suspicion{}, map[string]doubt{}
}

// releaseTime is how long the agent of a node that is gone has to let go by itself: it takes milliseconds, and a second
// and a half where its watch hangs.
const releaseTime = 2 * time.Second

// joinGrace is how long a lease must have been seen before its agent counts as dead: a new one may not have joined the
// gossip yet.
const joinGrace = 2 * time.Second

// see takes in who is dead.
func (p *peers) see(now *round, node string, dead func(string) bool) {
	s := now.cluster.Snapshot
	if !plan.Same(s.Agents, p.of) {
		p.meet(s.Agents, now.now)
	}
	p.dead, p.living = dead, plan.Living(s, node, dead)
	p.suspect(now)
}

// meet takes in the agents of a snapshot.
func (p *peers) meet(agents map[string]egress.Agent, now time.Time) {
	p.of = agents
	for _, a := range agents {
		if p.known[a.Lease].IsZero() {
			p.known[a.Lease] = now
		}
	}
	if len(p.known) > len(agents) { // some are former ones
		there := map[string]bool{}
		for _, a := range agents {
			there[a.Lease] = true
		}
		maps.DeleteFunc(p.known, func(lease string, _ time.Time) bool { return !there[lease] })
	}
}

// suspect takes in the suspicions that etcd has.
func (p *peers) suspect(now *round) {
	s := now.cluster.Snapshot
	if s.Restores != p.restores { // what stood in another etcd says nothing, even with the same revision
		p.suspicions, p.restores = map[string]suspicion{}, s.Restores
	}
	for name, r := range s.Suspicions {
		is := p.suspicions[name]
		if is.revision != r.Revision {
			is = suspicion{revision: r.Revision, since: now.now}
		}
		a, there := s.Agents[name]
		is.void = is.void || there && a.Lease == r.Lease && !a.Suspectable
		p.suspicions[name] = is
	}
	for name, was := range p.suspicions {
		switch _, stands := s.Suspicions[name]; {
		case stands:
		case was.ended.IsZero():
			was.ended = now.now
			p.suspicions[name] = was
			if a, there := s.Agents[name]; there { // it lives
				trusted := min(max(2*p.doubts[a.Lease].trusted, trust), mostTrust)
				p.doubts[a.Lease] = doubt{trusted, now.now.Add(trusted)}
			}
		case now.now.Sub(was.ended) > remembered: // nobody claims by it any more
			delete(p.suspicions, name)
		}
	}
}

// suspected returns when this node saw the suspicion of a revision first; otherwise if it has not.
func (p *peers) suspected(revision int64, otherwise time.Time) time.Time {
	for _, s := range p.suspicions {
		if s.revision == revision && !s.void {
			return s.since
		}
	}
	return otherwise
}

// An agent that ended a suspicion, and that the gossip goes on to hold for dead, is not suspected again for trust, then
// twice as long, and so on up to mostTrust: as where the gossip is cut off for days. Should it die meanwhile, its lease
// ends by itself. Suspicions that are gone are remembered for some time.
const (
	trust = time.Second
	// unheardTime is how long most agents have to hold one for dead that ended a suspicion, until its lease is revoked
	// all the same.
	unheardTime = time.Second
	mostTrust   = time.Minute
	remembered  = 10 * time.Second
)

// revoke ends the leases of dead agents, which frees their IPs, and of those that go on with IPs although their node is
// gone: the first in rank at once, each next one a step later.
//
// That an agent is dead is first the gossip's word, which may be wrong, and then etcd's: a suspicion, which an agent
// that lives ends each time that it asks etcd for a yes, five times in P. It has a bit more than half of P for that;
// the next owner has to wait until the end of it in any case.
func (m *Machine) revoke() []Effect {
	if !m.cfg.Gossip {
		return nil
	}
	p, s, now := &m.peers, m.round.cluster.Snapshot, m.round.now
	var out []Effect
	since := map[string]time.Time{}
	due := func(at time.Time) bool {
		if now.Before(at) {
			m.round.next = earlier(m.round.next, at)
			return false
		}
		return true
	}
	for _, r := range plan.Revocations(s, m.cfg.Node, p.living, p.dead) {
		node, lease := r.Agent.Node, r.Agent.Lease
		id, err := egress.ParseLease(lease)
		if err != nil {
			continue // nobody can end it
		}
		if since[lease] = p.since[lease]; since[lease].IsZero() {
			since[lease] = now
		}
		rankDelay, lag := time.Duration(r.Rank)*m.cfg.ClaimDelay, time.Duration(0)
		if p.living == nil { // this node may be the one that is cut off: others go first, as far as they are there
			rankDelay, lag = rankDelay/20, m.cfg.ClaimDelay
		}
		if r.Alive {
			lag += releaseTime
		}
		begin := later(since[lease].Add(lag+rankDelay), p.known[lease].Add(joinGrace))
		suspicion, stands := s.Suspicions[node]
		switch {
		case r.Gone:
			if due(begin) {
				out = append(out, Revoke{Node: node, Lease: id})
			}
		case !stands && p.doubts[lease].trusted > 0 && 2*len(p.living) > len(s.Agents) && due(since[lease].Add(unheardTime+rankDelay)):
			// It has etcd, and most others do not hear it: nor do packets for its IPs reach it.
			out = append(out, Revoke{Node: node, Lease: id})
		case !stands:
			// Each time by the first in rank alone, as long as that one does it.
			if d := p.doubts[lease]; due(later(begin, d.until.Add(rankDelay))) {
				p.doubts[lease] = doubt{d.trusted, now.Add(trust)} // a look at etcd may miss that it was there
				out = append(out, Suspect{egress.Suspicion{Node: node, Lease: lease, By: m.cfg.Node}, s.Revision})
			}
		case due(later(begin, p.suspicions[node].since.Add(m.answerTime(r.Agent)+rankDelay))):
			out = append(out, Revoke{Node: node, Lease: id, Suspicion: suspicion})
		}
	}
	// the gossip says that it lives
	maps.DeleteFunc(p.doubts, func(lease string, _ doubt) bool { return since[lease].IsZero() })
	p.since = since
	return out
}

// answerTime is for how long a suspicion against an agent has to stand until its lease is revoked.
func (m *Machine) answerTime(a egress.Agent) time.Duration {
	return cmp.Or(time.Duration(a.Permit), m.cfg.Permit) * 6 / 10
}

// endFormer ends the leases of this node's former life that locks are still under, as after a restore of etcd. A node
// has one agent, and that one is silent about those IPs: nobody has to wait for the end of such a lease.
func (m *Machine) endFormer() []Effect {
	var out []Effect
	former := map[int64]bool{}
	for _, o := range m.round.cluster.Held(m.cfg.Node) {
		if !m.owns(o) {
			former[o.Lease] = true
		}
	}
	for _, lease := range slices.Sorted(maps.Keys(former)) {
		out = append(out, Revoke{Node: m.cfg.Node, Lease: lease, Former: true})
	}
	return out
}
