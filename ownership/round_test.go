package ownership

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

func (n *node) wake() {
	if n.m == nil || n.stopping || !n.running {
		return
	}
	if n.busy {
		n.dirty = true
		return
	}
	if n.view == nil {
		return
	}
	n.busy, n.dirty = true, false
	n.in(n.w.between(0, 2*time.Millisecond), n.round)
}

// round is the agent's reconcile: withdraw, program, permit, and then etcd.
func (n *node) round() {
	n.cluster = n.cluster.With(n.view)
	n.step(View{Cluster: n.cluster})
	n.narrow(n.m.May, func(err error) {
		if err != nil {
			n.end(err)
			return
		}
		f := plan.Facts{Node: n.name, Uplink: plan.Link{Name: "eth0", Up: true}}
		effects := n.m.Step(n.clock(), Facts{Facts: f, Dead: func(node string) bool { return n.heard[node[0]-'A'] == dead }})
		n.watches(effects[1].(Watch))
		program := func(bool) { n.program(effects[0].(Program).Roles) }
		if slices.ContainsFunc(effects, func(f Effect) bool { _, confirm := f.(Confirm); return confirm }) {
			n.beginToAsk()
			n.confirm(program)
		} else {
			program(true)
		}
	})
}

// program makes the kernel hold what the roles ask for, and goes on in etcd.
func (n *node) program(roles map[netip.Addr]plan.Role) {
	var list []Permit
	for _, ip := range n.w.ips {
		switch roles[ip] {
		case plan.Own:
			list = append(list, Permit{IP: ip, Answer: true})
		case plan.Relay, plan.Arrive:
			list = append(list, Permit{IP: ip})
		}
	}
	n.narrow(func(ip netip.Addr) (send, answer bool) {
		i := slices.IndexFunc(list, func(p Permit) bool { return p.IP == ip })
		return i >= 0, i >= 0 && list[i].Answer
	}, func(err error) {
		if err != nil {
			n.transact(false, err)
			return
		}
		n.in(n.w.between(time.Millisecond, 20*time.Millisecond), func() {
			n.do(func(free func()) {
				n.kernel.exact = n.kernel.same(list)
				n.m.Grant(list, n.kernel.exact)
				n.write(func(err error) { free(); n.transact(true, err) })
			})
		})
	})
}

func (n *node) transact(applied bool, err error) {
	deadline := n.clock().Add(time.Second)
	n.each(deadline, n.m.Step(n.clock(), Programmed{Applied: applied}), func() {
		if !applied {
			n.end(err)
			return
		}
		n.each(deadline, n.m.Step(n.clock(), Settled{}), func() { n.end(err) })
	})
}

// each tries effects in etcd, one after the other.
func (n *node) each(deadline time.Time, list []Effect, done func()) {
	if n.stopping {
		n.end(nil) // what is under way may arrive all the same
		return
	}
	if len(list) == 0 {
		done()
		return
	}
	rest := func() { n.each(deadline, list[1:], done) }
	left := deadline.Sub(n.clock())
	if left <= 0 {
		n.answered(list[0], false, true)
		rest()
		return
	}
	n.tell(list[0], left, func(ok, failed bool) {
		n.answered(list[0], ok, failed)
		rest()
	})
}

func (n *node) answered(f Effect, ok, failed bool) {
	n.unanswered = n.unanswered || failed
	if h, is := f.(HandOver); is {
		n.step(HandedOver{IP: h.Owner.IP, OK: ok, Err: failed})
	}
}

// tell does one effect in etcd.
func (n *node) tell(f Effect, left time.Duration, answer func(ok, failed bool)) {
	w, id := n.w, n.m.round.lease
	if _, publish := f.(Publish); !publish {
		w.trigger(n, atChange)
	}
	var done, lost bool
	ask := func(do func(e *etcd) bool, what string, args ...any) {
		n.ask(left, func(e *etcd) {
			done = do(e)
			w.say("%s: "+what+": %t at revision %d", append(append([]any{n.name}, args...), done, e.rev)...)
		}, func(ok bool) {
			if lost {
				n.step(Lost{Lease: id})
			}
			answer(ok && done, !ok)
		})
	}
	switch f := f.(type) {
	case Publish:
		r := egress.Agent{Node: n.name, Lease: egress.FormatLease(id), Promises: n.gossip && !n.old, Revocable: f.Revocable, Suspectable: f.Revocable && !n.old, Permit: egress.Duration(n.permit)}
		have := n.m.round.cluster.Agents[n.name]
		have.Suspectable = have.Suspectable && !n.old // as its view has it
		if have.Lease == r.Lease && have.Promises == r.Promises && have.Revocable == r.Revocable && have.Restarting == r.Restarting && have.Permit == r.Permit && have.Suspectable == r.Suspectable {
			answer(true, false)
			return
		}
		w.trigger(n, atRecord)
		seen := n.m.round.cluster.Revision
		ask(func(e *etcd) (ok bool) {
			ok, lost = e.putAgent(id, r, seen)
			return ok
		}, "agent's record, revocable %t, lease %x", f.Revocable, id)
	case Longest:
		seen := n.m.round.cluster.Revision
		ask(func(e *etcd) bool { return e.setLongest(f, seen) }, "longest P %v, raised %t", f.Permit, f.Raise)
	case Release:
		ask(func(e *etcd) bool { return e.release(f.Owner, f.Unused) }, "releases %s of revision %d", f.Owner.IP, f.Owner.Revision)
	case Ready:
		ask(func(e *etcd) bool { return e.ready(f.Move, id) }, "ready for %s", f.Move.IP)
	case HandOver:
		ask(func(e *etcd) bool { return e.handOver(f.Owner, f.Move, f.To) }, "hands %s over to %s", f.Owner.IP, f.To.Node)
	case Suspect:
		if n.old && n.m.peers.living == nil {
			answer(true, false) // it may be the one that is cut off
			return
		}
		if n.old {
			id, _ := egress.ParseLease(f.Suspicion.Lease) // it is an agent's
			ask(func(e *etcd) bool { e.revoke(id); return true }, "revokes lease %x of %s, without a suspicion", id, f.Suspicion.Node)
			return
		}
		ask(func(e *etcd) bool { return e.suspect(f.Suspicion, f.Seen) }, "suspects %s", f.Suspicion.Node)
	case Revoke:
		revoke := func() {
			ask(func(e *etcd) bool { e.revoke(f.Lease); return true }, "revokes lease %x of %s", f.Lease, f.Node)
		}
		if f.Suspicion.Revision == 0 {
			revoke()
			return
		}
		stands := false
		n.ask(left, func(e *etcd) { stands = e.suspicions[f.Node].Revision == f.Suspicion.Revision }, func(ok bool) {
			if !ok || !stands {
				answer(false, !ok)
				return
			}
			revoke()
		})
	case Claim:
		o := egress.Owner{IP: f.IP, Node: n.name, Why: f.Why}
		var rev int64
		claim := func() {
			if o.From == "" {
				o.Suspicion = f.Suspicion.Revision
			}
			ask(func(e *etcd) bool {
				ok, gone, again := e.claim(id, o, f, rev)
				if again { // at once: what may come between two requests may come before both
					o.Suspicion = 0
					ok, gone, _ = e.claim(id, o, f, rev)
				}
				lost = gone
				return ok
			}, "claims %s from %q, suspicion %d", f.IP, o.From, o.Suspicion)
		}
		if f.Seen == 0 {
			claim()
			return
		}
		n.ask(left, func(e *etcd) { o.From, rev = e.released(f.IP, f.Seen) }, func(ok bool) {
			if !ok {
				o.From = ""
			}
			claim()
		})
	default:
		panic(fmt.Sprintf("no such effect: %T", f))
	}
}

// end ends a round.
func (n *node) end(err error) {
	n.busy = false
	if n.unanswered && err == nil {
		err = errNoAnswer // it is tried again, as any error is
	}
	n.unanswered = false
	if n.stopping {
		n.handOn()
		return
	}
	wait := time.Hour
	if next := n.m.Next(); !next.IsZero() {
		wait = next.Sub(n.clock())
	}
	if err != nil {
		n.backoff = min(max(2*n.backoff, 50*time.Millisecond), 5*time.Second)
		wait = min(max(wait, 0), n.backoff)
	} else {
		n.backoff = 0
	}
	if n.dirty {
		n.wake()
		return
	}
	if wait < time.Hour {
		n.in(max(wait, time.Millisecond), n.wake)
	}
}
