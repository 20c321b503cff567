package ownership

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// peers is what the gossip says of the other agents, and since when.
type peers struct {
	dead    func(node string) bool
	known   map[string]time.Time // since when a lease is seen
	since   map[string]time.Time // since when the agent of a lease is seen to be dead
	ignored map[string]bool      // nodes that died while this one was cut off, and have not been seen since
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
	known := map[string]time.Time{}
	for name, a := range now.snapshot.Agents {
		if name == node {
			continue
		}
		if known[a.Lease] = p.known[a.Lease]; known[a.Lease].IsZero() {
			known[a.Lease] = now.now
		}
	}
	p.known, p.dead = known, dead
	p.ignored = plan.Missed(now.snapshot, node, dead, p.ignored)
}

// revoke ends the leases of dead agents, and of those that go on with IPs although their node is gone, which frees the IPs: the first in
// rank at once, each next one a step later.
func (m *Machine) revoke() []Effect {
	if !m.cfg.Gossip {
		return nil
	}
	var out []Effect
	since := map[string]time.Time{}
	for _, r := range plan.Revocations(m.pass.snapshot, m.cfg.Node, m.peers.dead) {
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
	ended := map[int64]bool{}
	for _, ip := range slices.SortedFunc(maps.Keys(m.pass.snapshot.Owners), netip.Addr.Compare) {
		if o := m.pass.snapshot.Owners[ip]; o.Node == m.cfg.Node && !m.holds(o) && !ended[o.Lease] {
			ended[o.Lease] = true
			out = append(out, Revoke{Node: o.Node, Lease: o.Lease, Former: true})
		}
	}
	return out
}
