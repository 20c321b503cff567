package ownership

import (
	"time"
)

// gossip lets every agent find out, some time later, who is alive.
func (w *world) gossip() {
	for _, n := range w.nodes {
		for _, o := range w.nodes {
			if n != o {
				slowest := 700 * time.Millisecond
				if w.chance(4) {
					slowest = 1800 * time.Millisecond
				}
				w.after(w.between(200*time.Millisecond, slowest), func() { n.hears(o) })
			}
		}
	}
}

func (n *node) hears(o *node) {
	if n.m == nil || !n.gossip {
		return
	}
	was := n.heard[o.id]
	is := was
	up := o.m != nil && o.gossip && n.w.now >= max(o.frozen, o.paused) && n.w.reaches(n.id, o.id) && n.w.reaches(o.id, n.id)
	switch {
	case up:
		is = alive
	case was == alive:
		is = dead
	}
	if is != was {
		n.w.say("%s: gossip says that %s is %s", n.name, o.name, [...]string{"unknown", "alive", "left", "dead"}[is])
		n.heard[o.id] = is
		n.wake()
	}
}

// focuses are faults that have to come together for some mistakes to be found, by what that is about.
var focuses = map[string][]int{"loss": {10, 16}, "restore": {12, 17}, "suspicion": {3, 18}, "renewal": {5, 15}}

// fault does one thing that can happen to a cluster.
func (w *world) fault() {
	n := w.nodes[w.N(len(w.nodes))]
	long := w.between(50*time.Millisecond, 4*time.Second)
	if w.chance(2) {
		for _, o := range w.nodes { // most of what can go wrong is about who holds an IP
			if len(o.kernel.list) > 0 && w.chance(2) {
				n = o
			}
		}
	}
	if w.opt.labels && w.chance(3) {
		w.relabel(n)
		return
	}
	kind := w.N(22)
	if w.opt.focus != "" && w.chance(2) {
		kind = focuses[w.opt.focus][w.N(len(focuses[w.opt.focus]))]
	}
	switch kind {
	case 0:
		n.kill("by a fault")
		w.after(w.between(0, 2*time.Second), n.boot)
	case 1:
		n.stop()
		w.after(w.between(time.Second, 4*time.Second), n.boot)
	case 2:
		w.say("%s: power off for %v", n.name, long)
		n.powerOff()
		w.after(long, func() { n.off = false; n.boot() })
	case 3, 4:
		n.freeze(long)
	case 5:
		w.partition(n.id, etcdEnd, long, w.chance(2), w.chance(2))
	case 6:
		w.partition(n.id, etcdEnd, long, true, true)
		for _, o := range w.nodes {
			if o != n && w.chance(2) {
				w.partition(n.id, o.id, long, true, true)
			}
		}
	case 7:
		o := w.nodes[w.N(len(w.nodes))]
		w.partition(n.id, o.id, long, w.chance(2), true)
	case 8:
		n.slowDown(long)
	case 9:
		w.say("etcd: no answers for %v", long)
		w.etcd.down = true
		term := w.etcd.term
		w.after(long, func() {
			if w.etcd.term == term {
				w.say("etcd: answers again")
				w.etcd.down = false
				for id := range w.etcd.leases {
					w.etcd.leases[id].expires = w.now + w.etcd.leases[id].ttl
				}
				w.watchers()
			}
		})
	case 10:
		for _, o := range w.nodes {
			if o.m != nil && o.heard[n.id] == alive && w.chance(2) {
				w.say("%s: gossip says falsely that %s is dead", o.name, n.name)
				o.heard[n.id] = dead
				o.wake()
			}
		}
		w.after(long/4, w.gossip)
	case 11:
		w.say("%s: writes to its kernel fail for %v", n.name, long)
		n.broken = w.now + long
		if w.chance(2) {
			n.kill("by a fault")
			w.after(w.between(0, time.Second), n.boot)
		}
	case 12:
		w.say("%s: its watch says nothing for %v", n.name, long)
		n.stalled = w.now + long
	case 13, 14:
		ip := w.ips[w.N(len(w.ips))]
		w.say("operator: move %s to %s", ip, n.name)
		w.etcd.requestMove(ip, n.name, 3*time.Second)
	case 15:
		if w.opt.restores && w.backup != nil && !w.stopped() {
			w.say("etcd: restored to revision %d", w.backup.rev)
			w.etcd.restore(w.backup)
			return
		}
		if w.opt.noGossip || w.opt.toggle {
			return // a lease is all that they have
		}
		w.say("etcd: its leader is cut off, and grants renewals, for %v", long)
		w.etcd.deposed = true
		w.after(long, func() { w.etcd.deposed = false })
	case 16:
		// Etcd is lost for all but a few, some of which come just then.
		for _, o := range w.nodes {
			switch {
			case w.N(5) > 0:
				w.partition(o.id, etcdEnd, long+w.between(0, 500*time.Millisecond), true, true)
			case w.chance(2):
				w.say("%s: power off for a while", o.name)
				o.powerOff()
				w.after(w.between(0, long), func() { o.off = false; o.boot() })
			}
		}
	case 17:
		if !w.opt.restores {
			return
		}
		w.say("etcd: a backup of revision %d, to which it is restored in a moment", w.etcd.rev)
		backup := w.etcd.backup()
		for _, ip := range w.ips {
			w.etcd.requestMove(ip, n.name, 3*time.Second)
		}
		w.after(w.between(20*time.Millisecond, 500*time.Millisecond), func() {
			if !w.stopped() {
				w.say("etcd: restored to revision %d", backup.rev)
				w.etcd.restore(backup)
			}
		})
	}
	switch kind {
	case 18:
		// Somebody who lives is held for dead, and something happens to it while it says that it lives.
		w.slander(n, func() bool { return w.N(4) > 0 })
		if w.chance(2) {
			n.slowDown(long)
		}
		w.after(w.between(0, 600*time.Millisecond), func() {
			switch w.N(4) {
			case 0:
				n.stop()
			case 1:
				n.kill("while it was suspected")
			case 2:
				w.partition(n.id, etcdEnd, long, w.chance(2), true)
				return
			}
			w.after(w.between(0, time.Second), n.boot)
		})
		w.after(long, w.gossip)
	case 19:
		n.pause(min(long, w.end-w.now))
	case 20:
		// The way to etcd is back at about when the lease ends.
		if l := w.etcd.leases[w.etcd.under[n.name]]; l != nil && l.expires > w.now {
			w.partition(n.id, etcdEnd, max(l.expires-w.now+w.between(-50*time.Millisecond, 50*time.Millisecond), 0), true, w.chance(2))
		}
	case 21:
		w.endLease(n)
	}
	if w.opt.restores && w.chance(3) {
		w.say("etcd: a backup of revision %d", w.etcd.rev)
		w.backup = w.etcd.backup()
	}
}

// relabel changes which nodes the pool selects: one of them, for good or for a moment that its agent may not see, or
// all.
func (w *world) relabel(n *node) {
	is := len(w.base.Nodes[n.name].Labels) > 0
	switch w.N(4) {
	case 0:
		w.label(w.nodes, true)
	case 1:
		w.label(w.nodes, false)
		w.label(w.nodes[w.N(len(w.nodes)):], true)
	case 2:
		w.after(w.between(0, 2*time.Second), func() {
			if !w.healed {
				w.label([]*node{n}, is)
			}
		})
		fallthrough
	default:
		w.label([]*node{n}, !is)
	}
}

// stopped reports whether a kernel has permits that outlive the lease that an older etcd would know, or is about to.
func (w *world) stopped() bool {
	for _, n := range w.nodes {
		if n.stopping || n.kernel.until > w.now+n.permit {
			return true
		}
	}
	return false
}

// slander tells falsely that a node is dead: all, but for those to whom told is false.
func (w *world) slander(n *node, told func() bool) {
	w.say("gossip: all are told falsely that %s is dead", n.name)
	for _, o := range w.nodes {
		if o.m != nil && o != n && told() {
			o.heard[n.id] = dead
			o.wake()
		}
	}
}

// freeze stops the process for a while.
func (n *node) freeze(d time.Duration) {
	n.w.say("%s: frozen for %v", n.name, d)
	n.frozen = n.w.now + d
	n.w.gossip()
	n.w.after(d, n.w.gossip)
}

func (w *world) partition(a, b int, d time.Duration, to, from bool) {
	if a == b || w.healed {
		return
	}
	name := func(i int) string {
		if i == etcdEnd {
			return "etcd"
		}
		return w.nodes[i].name
	}
	if to {
		w.say("network: nothing passes from %s to %s for %v", name(a), name(b), d)
		w.cut[[2]int{a, b}] = true
	}
	if from {
		w.say("network: nothing passes from %s to %s for %v", name(b), name(a), d)
		w.cut[[2]int{b, a}] = true
	}
	w.gossip()
	w.after(d, func() {
		delete(w.cut, [2]int{a, b})
		delete(w.cut, [2]int{b, a})
		w.gossip()
	})
}

// endLease has etcd end the lease of an agent that says that others may: one that revokes may have decided so long ago.
func (w *world) endLease(n *node) {
	if a, there := w.etcd.agents[n.name]; there && a.Revocable && !a.Restarting {
		w.say("etcd: lease %s of %s is ended by somebody", a.Lease, n.name)
		w.etcd.revoke(w.etcd.under[n.name])
	}
}

// effectKind is what an agent is about to do when something happens to it.
type effectKind int

const (
	atChange effectKind = iota // of a lock, a move, a suspicion or the longest P, or the end of another one's lease
	atRecord                   // of the agent
	atKernel                   // a commit
	atStart                    // of a process that takes a lease over
	atMove                     // of the locks to another lease
	effectKinds
)

// trigger lets something happen to who is about to do something.
func (w *world) trigger(n *node, at effectKind) {
	if w.wait == 0 || w.healed || at != w.at {
		return
	}
	if w.wait--; w.wait > 0 {
		return
	}
	long := w.between(50*time.Millisecond, 3*time.Second)
	if w.chance(2) {
		n.slowDown(long)
	}
	w.after(w.between(0, 4*time.Millisecond), func() {
		if w.healed {
			return
		}
		kind := w.N(8)
		if w.opt.focus == "loss" {
			kind = 5
		}
		switch kind {
		case 0, 1:
			n.kill("in the middle of something")
			w.after(w.between(0, 500*time.Millisecond), n.boot)
		case 2:
			n.stop()
			w.after(w.between(time.Second, 2*time.Second), n.boot)
		case 3:
			n.freeze(long)
		case 4:
			w.partition(n.id, etcdEnd, long, w.chance(2), true)
		case 5:
			for _, o := range w.nodes {
				w.partition(o.id, etcdEnd, long, true, true)
			}
		case 6:
			n.pause(min(long, w.end-w.now))
		case 7:
			w.endLease(n)
		}
	})
}
