package ownership

import (
	"time"
)

// loops begins what a process does for as long as it runs.
func (n *node) loops() {
	n.running = true
	n.watch()
	n.rewatch()
	if n.gossip || n.m.permits.bounded {
		n.confirming()
	}
	if n.gossip {
		n.questions()
	}
	n.keeping()
	n.renewing()
}

func (n *node) confirming() {
	if n.resting = !n.m.Asks(n.clock()); n.resting {
		return
	}
	if n.asking < 5 {
		n.confirm(func(bool) {})
	}
	n.in(n.permit/5, n.confirming)
}

// beginToAsk ends a rest.
func (n *node) beginToAsk() {
	if n.resting {
		n.confirming()
	}
}

// confirm is store.Lease.Confirm.
func (n *node) confirm(done func(bool)) {
	id, sent, asked, restores := n.m.Lease().ID, n.clock(), n.head, n.restores
	n.asking++
	var there, suspected bool
	var h head
	deadline := sent.Add(n.permit)
	var answer func(ok bool)
	answer = func(ok bool) {
		if ok && there && suspected && !n.old {
			suspected, sent = false, n.clock()
			n.ask(deadline.Sub(sent), func(e *etcd) { there, h = e.acquit(n.name, id), head{e.term, e.rev} }, answer)
			return
		}
		n.asking--
		switch {
		case !ok || restores != n.restores || !n.answers(asked, h): // another answer may have shown meanwhile that etcd is another one
			done(false)
		case there:
			n.step(Confirmed{Lease: id, Sent: sent, Restores: restores})
			done(true)
		default:
			n.keep(id, n.permit, func(bool) { done(false) })
		}
	}
	n.ask(n.permit, func(e *etcd) {
		there, h = e.under[n.name] == id, head{e.term, e.rev}
		_, suspected = e.suspicions[n.name]
	}, answer)
}

// keep renews the lease once.
func (n *node) keep(id int64, timeout time.Duration, done func(bool)) {
	sent, kept := n.clock(), false
	n.ask(timeout, func(e *etcd) { kept = e.renew(id) }, func(ok bool) {
		switch {
		case !ok:
		case kept:
			n.step(Renewed{Lease: id, Sent: sent, TTL: n.m.Lease().TTL})
		default:
			n.step(Lost{Lease: id})
		}
		done(ok && kept)
	})
}

func (n *node) keeping() {
	id := n.m.Lease().ID
	if n.m.Lease().Valid.IsZero() {
		n.w.say("%s: its lease %x is lost", n.name, id)
		n.newLease(func() { n.in(n.w.between(100*time.Millisecond, time.Second), n.keeping) }, func() { n.wake(); n.keeping() })
		return
	}
	if n.stopping {
		return
	}
	n.keep(id, leaseTTL*7/40, func(kept bool) {
		n.in(leaseTTL/10, func() { n.skip(kept, 2) })
	})
}

// skip leaves out some renewals of the lease while the agent is idle, as store.Lease.Run does.
func (n *node) skip(kept bool, times int) {
	if times > 0 && kept && !n.stopping && n.m.Idle() && !n.m.Lease().Valid.IsZero() {
		n.in(leaseTTL/10, func() { n.skip(kept, times-1) })
		return
	}
	n.keeping()
}

func (n *node) renewing() {
	if n.m.permits.last {
		return
	}
	n.renewSoon()
	n.in(n.permit/4, n.renewing)
}

func (n *node) questions() {
	if n.view != nil && n.m.Asks(n.clock()) && n.clock().Sub(n.m.Lease().Confirmed) >= n.permit/4 {
		var peers []string
		for _, o := range n.w.nodes {
			if _, there := n.view.Agents[o.name]; o != n && (there || n.heard[o.id] == alive) {
				peers = append(peers, o.name)
			}
		}
		n.step(Question{Peers: peers})
	}
	// While etcd answers, nothing comes of it.
	due := n.m.Lease().Confirmed.Add(n.permit * 3 / 10).Sub(n.clock())
	n.in(max(n.permit/10, due), n.questions)
}
