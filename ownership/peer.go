package ownership

import (
	"maps"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// peers is what the gossip says of the other agents, and since when.
type peers struct {
	dead    func(node string) bool
	living  map[string]egress.Agent // plan.Living of the pass
	known   map[string]time.Time    // since when a lease is seen
	since   map[string]time.Time    // since when the agent of a lease is seen to be dead
	ignored map[string]bool         // nodes that died while this one was cut off, and have not been seen since
}

func (p *peers) init() {
	p.known, p.since, p.dead = map[string]time.Time{}, map[string]time.Time{}, func(string) bool { return false }
}

// letGoTime is how long the agent of a node that is gone has to let go by itself: it takes milliseconds, and a second and a half where its
// watch hangs.
const letGoTime = 2 * time.Second

// joinGrace is how long a lease must have been seen before its agent counts as dead: a new one may not have joined the gossip yet.
const joinGrace = 2 * time.Second

// see takes in who is dead.
func (p *peers) see(now *pass, node string, dead func(string) bool) {
	s := now.cluster.Snapshot
	for _, a := range s.Agents {
		if p.known[a.Lease].IsZero() {
			p.known[a.Lease] = now.now
		}
	}
	if len(p.known) > len(s.Agents) { // some are former ones
		there := map[string]bool{}
		for _, a := range s.Agents {
			there[a.Lease] = true
		}
		maps.DeleteFunc(p.known, func(lease string, _ time.Time) bool { return !there[lease] })
	}
	p.dead, p.living = dead, plan.Living(s, node, dead)
	p.ignored = plan.Missed(s, node, p.living == nil, dead, p.ignored)
}

// revoke ends the leases of dead agents, and of those that go on with IPs although their node is gone, which frees the IPs: the first in
// rank at once, each next one a step later.
func (m *Machine) revoke() []Effect {
	if !m.cfg.Gossip {
		return nil
	}
	var out []Effect
	since := map[string]time.Time{}
	for _, r := range plan.Revocations(m.pass.cluster.Snapshot, m.cfg.Node, m.peers.living, m.peers.dead) {
		if m.peers.ignored[r.Agent.Node] {
			continue
		}
		lease := r.Agent.Lease
		if since[lease] = m.peers.since[lease]; since[lease].IsZero() {
			since[lease] = m.pass.now
		}
		due := later(since[lease].Add(time.Duration(r.Rank)*m.cfg.ClaimDelay), m.peers.known[lease].Add(joinGrace))
		if r.Alive {
			due = due.Add(letGoTime)
		}
		if m.pass.now.Before(due) {
			m.pass.next = earlier(m.pass.next, due)
			continue
		}
		if id, err := egress.ParseLease(lease); err == nil { // else nobody can end it
			out = append(out, Revoke{Node: r.Agent.Node, Lease: id})
		}
	}
	m.peers.since = since
	return out
}

// endFormer ends the leases of this node's former life that locks are still under, as after a restore of etcd. A node has one agent, and
// that one is silent about those IPs: nobody has to wait for the end of such a lease.
func (m *Machine) endFormer() []Effect {
	var out []Effect
	former := map[int64]bool{}
	for _, o := range m.pass.cluster.Owners {
		if o.Node == m.cfg.Node && !m.holds(o) {
			former[o.Lease] = true
		}
	}
	for _, lease := range slices.Sorted(maps.Keys(former)) {
		out = append(out, Revoke{Node: m.cfg.Node, Lease: lease, Former: true})
	}
	return out
}
