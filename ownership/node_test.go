package ownership

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// node is a simulated node: a kernel, a clock, and mostly an agent, which is what the package agent does around a
// Machine.
type node struct {
	w      *world
	id     int
	name   string
	gossip bool
	offset time.Duration
	drift  float64
	permit time.Duration
	grace  time.Duration // after a stop
	kernel kernel
	off    bool // no power

	// What follows is the process's. Whatever belongs to a former life does nothing.
	life         int
	m            *Machine
	running      bool // started
	stopping     bool
	frozen       time.Duration // until when the process stands still
	view         *egress.Snapshot
	cluster      *plan.Cluster    // of view, when the last round began
	listed       *egress.Snapshot // what view is of, with all owners
	partial      bool             // view has the owners of some egress IPs alone
	widening     bool             // etcd is asked for the others, or whether the node has none
	viewTerm     int64
	viewRestores int           // when it was listed
	head         head          // of the answers of etcd
	restores     int           // how often an answer showed that etcd is another one
	stalled      time.Duration // until when its watch says nothing
	slow         time.Duration // until when its requests to etcd may take long
	broken       time.Duration // until when writes to the kernel fail
	renewalDue   bool          // a renewal waits for the kernel
	busy         bool
	dirty        bool
	asking       int
	resting      bool // nothing asks etcd for a yes
	unanswered   bool // etcd has not answered something in this round
	heard        []gossipState
	backoff      time.Duration
}

type gossipState int

const (
	unknown gossipState = iota
	alive
	left
	dead
)

// kernel holds the permits. They end together, by its clock.
type kernel struct {
	w     *world
	list  map[netip.Addr]bool // IP -> answers
	until time.Duration
	exact bool // list is what the agent of now has written: a renewal needs no commit
	queue []func(done func())
	used  bool
}

func (k *kernel) answers(ip netip.Addr) bool { return k.list[ip] && k.w.now < k.until }

// do runs an operation that has the kernel to itself; it calls done in the end.
func (n *node) do(op func(done func())) {
	k := &n.kernel
	k.queue = append(k.queue, op)
	n.next()
}

func (n *node) next() {
	k := &n.kernel
	if k.used || len(k.queue) == 0 {
		return
	}
	op := k.queue[0]
	k.queue = k.queue[1:]
	k.used = true
	life := n.life
	op(func() {
		if n.life == life {
			k.used = false
			n.next()
		}
	})
}

// clock returns the node's own time.
func (n *node) clock() time.Time {
	return epoch.Add(n.offset + n.w.now + time.Duration(n.drift*float64(n.w.now)))
}

// span is how much true time passes while the node's clock moves on by d.
func (n *node) span(d time.Duration) time.Duration { return time.Duration(float64(d) / (1 + n.drift)) }

// unspan is how far the node's clock moves on while the true time d passes.
func (n *node) unspan(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (1 + n.drift))
}

// in runs do in d by the node's clock, in the process of now, when it is not frozen.
func (n *node) in(d time.Duration, do func()) {
	life := n.life
	var try func()
	try = func() {
		switch {
		case n.life != life:
		case n.w.now < n.frozen:
			n.w.after(n.frozen-n.w.now+n.w.between(0, time.Millisecond), try)
		default:
			do()
		}
	}
	n.w.after(n.span(d), try)
}

// step gives the machine an event, and does what has to be done at once.
func (n *node) step(e Event) {
	for _, f := range n.m.Step(n.clock(), e) {
		n.effect(f)
	}
}

func (n *node) effect(f Effect) {
	switch f := f.(type) {
	case Withdraw:
		n.narrow(func(netip.Addr) (bool, bool) { return false, false }, func(error) {})
	case Renew:
		n.renewSoon()
	case Wake:
		n.wake()
	case Say:
		n.send(f)
	case Confirm:
		n.beginToAsk()
	}
}

func (n *node) send(f Say) {
	to := n.w.nodes[f.To[0]-'A']
	if n.heard[to.id] != alive && n.heard[to.id] != unknown || n.w.chance(50) {
		return
	}
	d := n.w.between(200*time.Microsecond, 3*time.Millisecond)
	if n.w.chance(40) {
		d = n.w.between(0, 2*time.Second)
	}
	n.w.after(d, func() {
		if n.w.reaches(n.id, to.id) && to.m != nil && to.running && to.gossip {
			to.in(0, func() { to.step(Heard{From: n.name, Message: f.Message}) })
		}
	})
}

// ask sends a request to etcd. answer is called once: with true when etcd has done it and the answer came in time.
func (n *node) ask(timeout time.Duration, do func(e *etcd), answer func(ok bool)) {
	w := n.w
	answered := false
	finish := func(ok bool) {
		if !answered {
			answered = true
			answer(ok)
		}
	}
	trip := func() time.Duration {
		d := w.between(200*time.Microsecond, 3*time.Millisecond)
		if w.now < n.slow && w.chance(3) {
			d = w.between(0, 2*time.Second)
		}
		return d
	}
	life, sent, d := n.life, w.now, trip()
	timeout = n.span(timeout)
	late := func() {
		if n.life == life {
			n.in(n.unspan(sent+timeout-w.now), func() { finish(false) })
		}
	}
	if d > timeout {
		late()
	}
	w.after(d, func() {
		if !w.reaches(n.id, etcdEnd) || w.etcd.down {
			if d <= timeout {
				late()
			}
			return
		}
		do(w.etcd)
		back := trip()
		if d <= timeout && d+back > timeout {
			late()
		}
		w.after(back, func() {
			if n.life != life {
				return
			}
			if w.reaches(etcdEnd, n.id) {
				n.in(0, func() { finish(true) })
			} else if d+back <= timeout {
				late()
			}
		})
	})
}

// watch sends etcd as it is now to the process.
func (n *node) watch() {
	if n.m == nil || !n.running {
		return
	}
	w, s, term, life := n.w, n.w.etcd.take(), n.w.etcd.term, n.life
	d := w.between(200*time.Microsecond, 5*time.Millisecond)
	if w.chance(30) {
		d = w.between(0, 300*time.Millisecond)
	}
	if term != n.viewTerm {
		d += w.between(0, 2*time.Second) // it has to find out, and lists anew
	}
	d = max(d, n.stalled-w.now)
	w.after(d, func() {
		switch {
		case n.life != life || term != w.etcd.term:
		case !w.reaches(etcdEnd, n.id) || !w.reaches(n.id, etcdEnd) || w.etcd.down:
			// The watch is set up again when it can be.
		case n.view == nil || term > n.viewTerm || s.Revision > n.view.Revision:
			n.in(0, func() {
				listed := n.view == nil || term > n.viewTerm
				switch {
				case listed && term < n.head.term: // the answer comes after that of the etcd that was restored meanwhile
				case listed:
					if n.head == (head{}) || term > n.head.term {
						n.answers(n.head, head{term, s.Revision})
					}
					n.viewTerm, n.viewRestores = term, n.restores
					n.see(s)
				case term == n.viewTerm && s.Revision > n.view.Revision:
					n.see(s)
				}
			})
		}
	})
}

// see takes in etcd as the last list, and what was watched since, show it.
func (n *node) see(s *egress.Snapshot) {
	if n.viewTerm == n.head.term {
		n.head.revision = max(n.head.revision, s.Revision)
	}
	v := *s
	if v.Restores, n.listed = n.viewRestores, s; n.partial {
		v.Partial, v.Owners = true, map[netip.Addr]egress.Owner{}
		ip := n.w.ips[n.id%len(n.w.ips)] // of a pod of this node
		if o, owned := s.Owners[ip]; owned && n.id%3 > 0 {
			v.Owners[ip] = o
		}
	}
	n.view = &v
	n.wake()
}

// watches makes the view what the machine wants it to be. Ranges that are added are listed at the revision of the view;
// the watches go on meanwhile.
func (n *node) watches(want Watch) {
	switch {
	case want.All && n.partial && !n.widening:
		n.widening = true
		n.ask(time.Second, func(*etcd) {}, func(ok bool) {
			if n.widening = false; !ok || n.viewTerm != n.w.etcd.term {
				n.wake() // the next round asks again
				return
			}
			n.w.say("%s: sees all owners", n.name)
			n.partial = false
			n.see(n.listed)
		})
	case !want.All && !n.partial && !n.widening:
		n.widening = true
		// This question may overtake what is slow.
		n.in(n.w.between(time.Millisecond, 20*time.Millisecond), func() {
			n.widening = false
			answered := !n.w.etcd.down && n.viewTerm == n.w.etcd.term && n.w.reaches(n.id, etcdEnd) && n.w.reaches(etcdEnd, n.id)
			owned := slices.ContainsFunc(slices.Collect(maps.Values(n.w.etcd.owners)), func(o egress.Owner) bool { return o.Node == n.name })
			if !answered || owned {
				n.in(500*time.Millisecond, n.wake)
				return
			}
			n.w.say("%s: sees the owners of its pods' IPs alone", n.name)
			n.partial = true
			n.see(n.listed)
		})
	}
}

// head is what etcd says of itself in an answer: it has another term of raft after a restore.
type head struct{ term, revision int64 }

// answers takes in an answer of etcd, and what was known when it was asked: false when it is another etcd.
func (n *node) answers(asked, h head) bool {
	if asked != (head{}) && (h.revision < asked.revision || h.term != asked.term) {
		n.restores++
		n.head = h
		n.w.say("%s: sees that etcd is another one", n.name)
		return false
	}
	n.head = head{h.term, max(n.head.revision, h.revision)}
	return true
}

// rewatch sets up a watch that may have missed something, again and again.
func (n *node) rewatch() {
	if n.view == nil || n.viewTerm != n.w.etcd.term || n.view.Revision < n.w.etcd.rev {
		n.watch()
	}
	n.in(n.w.between(300*time.Millisecond, time.Second), n.rewatch)
}

// write writes the permits, by a frame where the kernel has exactly those, else by a commit.
func (n *node) write(done func(error)) {
	list := n.m.Permits()
	w, k, life := n.w, &n.kernel, n.life
	if len(list) == 0 && k.exact {
		done(nil)
		return
	}
	now := n.clock()
	end, limit, err := n.m.Look(now)
	if len(list) == 0 {
		end, limit, err = now, time.Time{}, nil
	}
	if err != nil {
		done(err)
		return
	}
	d := end.Sub(now)
	if k.exact && !w.chance(10) {
		// A frame works within a twentieth of P, or never.
		if length := d / (n.permit / 16) * (n.permit / 16); n.m.permits.bounded {
			d = length
		}
		w.after(w.between(0, n.span(n.permit/20)), func() {
			if n.life == life && k.exact && d > 0 {
				k.until = w.now + n.span(d)
				w.say("%s: kernel renewed its permits for %v", n.name, d)
				for ip := range k.list {
					w.check(n, ip)
				}
			}
		})
		n.in(n.permit/20, func() {
			n.m.Written(now.Add(d), limit)
			done(nil)
		})
		return
	}
	if w.now < n.broken {
		n.in(time.Millisecond, func() { done(errKernel) })
		return
	}
	k.exact = false
	w.after(w.between(0, n.span(n.permit/25)), func() {
		if n.life != life && w.chance(2) {
			return // killed before
		}
		if n.off {
			return
		}
		k.list = map[netip.Addr]bool{}
		for _, p := range list {
			k.list[p.IP] = p.Answer
		}
		k.until = w.now + n.span(d)
		w.say("%s: kernel has permits %s for %v", n.name, permitNames(list), d)
		for ip := range k.list {
			w.check(n, ip)
		}
		if n.life == life {
			k.exact = true
		}
	})
	n.in(n.permit/25, func() {
		n.m.Written(end, limit)
		done(nil)
	})
}

var (
	errKernel   = fmt.Errorf("the kernel did not take it")
	errNoAnswer = fmt.Errorf("etcd has not answered")
)

func permitNames(list []Permit) (out []string) {
	for _, p := range list {
		if p.Answer {
			out = append(out, p.IP.String())
		} else {
			out = append(out, p.IP.String()+"(sends)")
		}
	}
	return out
}

// renewSoon renews the permits once for all who ask meanwhile.
func (n *node) renewSoon() {
	if !n.renewalDue {
		n.renewalDue = true
		n.do(func(free func()) {
			n.renewalDue = false
			if n.m.permits.last {
				free()
				return
			}
			n.write(func(error) { free() })
		})
	}
}

// narrow ends what may does not allow.
func (n *node) narrow(may func(netip.Addr) (bool, bool), done func(error)) {
	n.do(func(free func()) {
		gone, silent := n.m.Narrow(may)
		n.revoke(gone, silent, func(err error) {
			if err == nil {
				n.m.Acknowledged()
			}
			free()
			done(err)
		})
	})
}

// revoke ends permits in the kernel.
func (n *node) revoke(gone, silent []netip.Addr, done func(error)) {
	if len(gone)+len(silent) == 0 {
		done(nil)
		return
	}
	if n.w.now < n.broken {
		n.kernel.exact = false // the next write is a commit
		n.in(time.Millisecond, func() { done(errKernel) })
		return
	}
	life := n.life
	n.w.after(n.w.between(0, 2*time.Millisecond), func() {
		if n.life != life && n.w.chance(2) {
			return
		}
		for _, ip := range gone {
			delete(n.kernel.list, ip)
		}
		for _, ip := range silent {
			if _, ok := n.kernel.list[ip]; ok {
				n.kernel.list[ip] = false
			}
		}
		n.w.say("%s: kernel is silent about %v, only sends with %v", n.name, gone, silent)
	})
	n.in(2*time.Millisecond, func() { done(nil) })
}

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

func (k *kernel) same(list []Permit) bool {
	want := map[netip.Addr]bool{}
	for _, p := range list {
		want[p.IP] = p.Answer
	}
	return maps.Equal(want, k.list)
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
		w.trigger(n)
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
		r := egress.Agent{Node: n.name, Lease: egress.FormatLease(id), Revocable: f.Revocable, Suspectable: f.Revocable, Permit: egress.Duration(n.permit)}
		have := n.m.round.cluster.Agents[n.name]
		if have.Lease == r.Lease && have.Revocable == r.Revocable && have.Restarting == r.Restarting && have.Permit == r.Permit && have.Suspectable == r.Suspectable {
			answer(true, false)
			return
		}
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

// boot starts an agent.
func (n *node) boot() {
	if n.m != nil || n.off {
		return
	}
	n.life++
	n.running, n.stopping, n.busy, n.dirty, n.view, n.asking, n.frozen, n.backoff = false, false, false, false, nil, 0, 0, 0
	n.viewTerm, n.viewRestores, n.head, n.restores, n.resting, n.unanswered = 0, 0, head{}, 0, false, false
	n.listed, n.partial, n.widening = nil, false, false
	if n.w.opt.mixedP {
		n.permit = []time.Duration{200 * time.Millisecond, permitLength, time.Second}[n.w.N(3)]
	}
	n.kernel.queue, n.kernel.used, n.kernel.exact, n.renewalDue = nil, false, false, false
	for i := range n.heard {
		n.heard[i] = unknown
	}
	if n.w.opt.toggle && n.w.chance(2) {
		n.gossip = !n.gossip
	}
	n.m = New(Config{
		Node: n.name, Permit: n.permit, ClaimDelay: claimDelay, Linger: lingerTime, Gossip: n.gossip, Freeze: n.gossip,
		Process: n.w.Uint64(), Start: n.clock(), Late: lateTime,
	})
	n.w.say("%s: agent begins", n.name)
	n.w.gossip()
	again := func() {
		n.kill("the start failed")
		n.w.after(n.w.between(50*time.Millisecond, 500*time.Millisecond), n.boot)
	}
	n.start(again)
}

// start is agent.start: the former agent's lease and permits, or a new lease.
func (n *node) start(again func()) {
	var former egress.Agent
	var there bool
	n.ask(5*time.Second, func(e *etcd) { former, there = e.agents[n.name] }, func(ok bool) {
		if !ok {
			again()
			return
		}
		if !there {
			n.newLease(again, n.loops)
			return
		}
		id, _ := egress.ParseLease(former.Lease) // it wrote one
		kept, sent := false, n.clock()
		var ttl time.Duration
		n.ask(5*time.Second, func(e *etcd) {
			if kept = e.renew(id); kept {
				ttl = e.leases[id].ttl
			}
		}, func(ok bool) {
			switch {
			case !ok:
				again()
			case !kept:
				n.newLease(again, n.loops)
			default:
				n.adopt(former, Granted{Lease: id, Sent: sent, TTL: ttl}, again)
			}
		})
	})
}

func (n *node) newLease(again, then func()) {
	sent := n.clock()
	var id int64
	n.ask(5*time.Second, func(e *etcd) { id = e.grant(leaseTTL) }, func(ok bool) {
		if !ok {
			again()
			return
		}
		n.w.say("%s: new lease %x", n.name, id)
		n.step(Granted{Lease: id, Sent: sent, TTL: leaseTTL})
		then()
	})
}

func (n *node) adopt(former egress.Agent, g Granted, again func()) {
	leftOver := map[netip.Addr]bool{}
	if n.w.now < n.kernel.until {
		for ip := range n.kernel.list {
			leftOver[ip] = n.kernel.list[ip]
		}
	}
	var held []netip.Addr
	n.ask(5*time.Second, func(e *etcd) { held = e.owned(g.Lease) }, func(ok bool) {
		if !ok {
			again()
			return
		}
		resume := func(g Granted) {
			n.w.say("%s: adopts lease %x", n.name, g.Lease)
			n.step(g)
			n.confirm(func(ok bool) {
				if !ok {
					again()
					return
				}
				n.resume(former, held, leftOver)
			})
		}
		if !former.Restarting {
			// What the former process has sent may arrive yet.
			var ok bool
			n.ask(5*time.Second, func(e *etcd) { ok = e.moveLocks(g.Lease, g.Lease, n.name, held, func(netip.Addr) bool { return true }) }, func(came bool) {
				if !came || !ok {
					again()
					return
				}
				resume(g)
			})
			return
		}
		n.shorten(former, g, held, leftOver, again, resume)
	})
}

// resume renews the permits that the kernel still has for what this node holds, at once.
func (n *node) resume(former egress.Agent, held []netip.Addr, leftOver map[netip.Addr]bool) {
	var list []Permit
	var ips, gone []netip.Addr
	for _, ip := range n.w.ips {
		if !leftOver[ip] {
			continue
		}
		if slices.Contains(held, ip) {
			list, ips = append(list, Permit{IP: ip, Answer: true}), append(ips, ip)
		} else {
			gone = append(gone, ip)
		}
	}
	n.step(Adopted{IPs: ips, Revocable: former.Revocable, Permit: time.Duration(former.Permit)})
	n.do(func(free func()) {
		n.revoke(gone, nil, func(error) {
			n.kernel.exact = n.kernel.same(list)
			n.m.Grant(list, n.kernel.exact)
			n.write(func(error) { free(); n.loops() })
		})
	})
}

// shorten moves the locks from a lease that was to outlive the restart to one of the usual length.
func (n *node) shorten(former egress.Agent, g Granted, held []netip.Addr, leftOver map[netip.Addr]bool, again func(), then func(Granted)) {
	next := Granted{Sent: n.clock(), TTL: leaseTTL}
	n.ask(5*time.Second, func(e *etcd) { next.Lease = e.grant(leaseTTL) }, func(ok bool) {
		if !ok {
			again()
			return
		}
		most := next.Sent.Add(next.TTL).Sub(n.clock())
		var cut []Permit
		for _, ip := range held {
			if leftOver[ip] && n.kernel.until-n.w.now > n.span(most) {
				cut = append(cut, Permit{IP: ip, Answer: true})
			}
		}
		move := func() {
			n.moveTo(g.Lease, next.Lease, former, func(netip.Addr) bool { return true }, func(rest func()) { rest() }, func(ok bool) {
				if !ok {
					again()
					return
				}
				then(next)
			})
		}
		if len(cut) == 0 {
			move()
			return
		}
		if n.w.now < n.broken {
			again()
			return
		}
		d := n.w.between(0, 2*time.Millisecond)
		life := n.life
		n.w.after(d, func() {
			if n.life != life && n.w.chance(2) {
				return
			}
			n.kernel.list = map[netip.Addr]bool{}
			for _, p := range cut {
				n.kernel.list[p.IP] = p.Answer
			}
			n.kernel.until = n.w.now + n.span(most)
			n.w.say("%s: kernel's permits %s are cut to %v", n.name, permitNames(cut), most)
		})
		n.in(2*time.Millisecond, move)
	})
}

// moveTo is store.Lease.MoveTo. moved is called once the record has moved, and calls its argument.
func (n *node) moveTo(from, to int64, a egress.Agent, keep func(netip.Addr) bool, moved func(func()), done func(bool)) {
	round := 0
	var again func()
	again = func() {
		if round++; round > 2 {
			done(true)
			return
		}
		var ips []netip.Addr
		n.ask(time.Second, func(e *etcd) { ips = e.owned(from) }, func(ok bool) {
			switch {
			case !ok:
				done(false)
			case round == 2 && len(ips) == 0:
				done(true)
			default:
				kept := map[netip.Addr]bool{} // as of the request
				for _, ip := range ips {
					kept[ip] = keep(ip)
				}
				n.endLeft(kept, func() {
					keep := func(ip netip.Addr) bool { return kept[ip] }
					var did bool
					if round == 2 {
						// The record is under the next lease already.
						n.ask(time.Second, func(e *etcd) { did = e.moveLocks(from, to, a.Node, ips, keep) }, func(ok bool) { done(ok && did) })
						return
					}
					n.ask(time.Second, func(e *etcd) {
						did = e.moveTo(from, to, a, ips, keep)
						n.w.say("%s: moves its locks %v from lease %x to %x: %t", n.name, ips, from, to, did)
					}, func(ok bool) {
						if !ok || !did {
							done(false)
							return
						}
						moved(again)
					})
				})
			}
		})
	}
	again()
}

// endLeft ends the permits of the locks that are not kept, and keeps those where that fails.
func (n *node) endLeft(kept map[netip.Addr]bool, done func()) {
	var left []netip.Addr
	for _, ip := range n.w.ips {
		if keeps, ours := kept[ip]; ours && !keeps {
			left = append(left, ip)
		}
	}
	if len(left) == 0 {
		done()
		return
	}
	n.narrow(func(ip netip.Addr) (send, answer bool) {
		stays := !slices.Contains(left, ip)
		return stays, stays
	}, func(err error) {
		for _, ip := range left {
			kept[ip] = err != nil
		}
		done()
	})
}

func (e *etcd) moveLocks(from, next int64, node string, ips []netip.Addr, keep func(netip.Addr) bool) bool {
	if e.leases[next] == nil {
		return false
	}
	for _, ip := range ips {
		if e.owners[ip].Lease != from {
			return false
		}
	}
	if len(ips) == 0 {
		return true
	}
	rev := e.changed()
	for _, ip := range ips {
		o := e.owners[ip]
		if keep(ip) {
			o.Lease, o.Revision = next, rev
			e.owners[ip] = o
		} else {
			delete(e.owners, ip)
			e.last[ip] = tenure{egress.Tenure{IP: ip, Why: egress.ReasonRelease, From: silentSince(o, node)}, rev}
		}
	}
	e.w.watchers()
	return true
}

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
		if ok && there && suspected {
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

// kill ends the process at once.
func (n *node) kill(why string) {
	if n.m == nil {
		return
	}
	n.w.say("%s: agent killed (%s)", n.name, why)
	n.life++
	n.m = nil
	n.kernel.queue, n.kernel.used, n.kernel.exact = nil, false, false
	n.w.gossip()
}

// powerOff takes everything along.
func (n *node) powerOff() {
	n.kill("power off")
	n.off = true
	n.kernel.list, n.kernel.until = nil, 0
}

// stop is what SIGTERM does: the locks go to a lease that outlives the restart, and the permits last as long.
func (n *node) stop() {
	if n.m == nil || n.stopping || !n.running {
		return
	}
	n.w.say("%s: agent is told to stop", n.name)
	n.stopping = true
	if !n.busy {
		n.handOn()
	}
}

// exit ends a process that says so to its peers. When the faults have ended, it is started again at once: what was to
// start it may have come before the end of a slow exit.
func (n *node) exit(why string) {
	n.kill(why)
	if n.w.healed {
		n.w.after(time.Second, n.boot)
	}
	for _, o := range n.w.nodes {
		if o.heard[n.id] == alive && n.w.reaches(n.id, o.id) {
			o.heard[n.id] = left
		}
	}
}

// handOn is what an agent does that is told to stop.
func (n *node) handOn() {
	exit := n.exit
	n.in(time.Second, func() { exit("the last words took too long") })
	var r egress.Agent
	n.ask(time.Second, func(e *etcd) { r = e.agents[n.name] }, func(ok bool) {
		if !ok {
			exit("no last words")
			return
		}
		next := Extended{Sent: n.clock(), TTL: n.grace}
		n.ask(time.Second, func(e *etcd) { next.Lease = e.grant(n.grace) }, func(ok bool) {
			if !ok {
				exit("no last words")
				return
			}
			from := n.m.Lease().ID
			r.Node, r.Restarting, r.Revocable = n.name, true, false
			keep := func(ip netip.Addr) bool {
				keep := n.m.Keeps(n.clock(), ip)
				if keep {
					next.IPs = append(next.IPs, ip)
				}
				return keep
			}
			extended := false
			giveBack := func(why string) {
				n.narrow(func(netip.Addr) (send, answer bool) { return false, false }, func(err error) {
					if err != nil {
						exit(why)
						return
					}
					n.ask(time.Second, func(e *etcd) { e.revoke(next.Lease) }, func(bool) { exit(why) })
				})
			}
			extend := func(rest func()) {
				n.do(func(free func()) {
					n.step(next)
					if len(next.IPs) > 0 && len(n.m.Permits()) == 0 {
						free()
						giveBack("its permits had ended")
						return
					}
					n.kernel.exact = false
					n.write(func(err error) {
						free()
						if err != nil {
							giveBack("its permits are not lengthened")
							return
						}
						extended = true
						rest()
					})
				})
			}
			n.moveTo(from, next.Lease, r, keep, extend, func(ok bool) {
				switch {
				case !ok && !extended:
					giveBack("locks not moved")
				case !ok:
					exit("stopped; locks that came meanwhile not moved")
				default:
					exit("stopped")
				}
			})
		})
	})
}
