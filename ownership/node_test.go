package ownership

import (
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
	losses int  // of power
	gone   bool // for good
	old    bool // its agent knows no suspicions, and promises to whoever asks
	// A machine that is paused with its clock, as a virtual one may be: it does not know when it goes on.
	paused   time.Duration // until when
	stood    time.Duration // for how long in all, that included
	woken    time.Duration // until when it may go on by what it had
	pausedAt time.Time     // by its clock

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
	lossy        time.Duration // and until when they may be lost
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

// clock returns the node's own time.
func (n *node) clock() time.Time {
	passed := n.w.now - n.stood + max(n.paused-n.w.now, 0)
	return epoch.Add(n.offset + passed + time.Duration(n.drift*float64(passed)))
}

// pause stops the machine with its clock. For how long it answers then does not depend on how long that was.
func (n *node) pause(d time.Duration) {
	w, k := n.w, &n.kernel
	if w.now < n.paused || n.off || d <= 0 {
		return
	}
	w.say("%s: the machine stands still with its clock for %v", n.name, d)
	n.pausedAt = n.clock()
	n.stood += d
	n.paused = w.now + d
	by := n.permit
	if n.m == nil || !n.running || n.stopping || !n.gossip || !n.m.Bounded() {
		by = restartGrace + time.Second
	}
	if n.woken = n.paused + n.span(by); w.now < k.until {
		k.until += d
		n.woken = max(n.woken, k.until)
	}
	w.gossip()
	w.after(d, w.gossip)
	w.after(n.woken-w.now, func() {
		for _, ip := range w.ips {
			w.check(n, ip)
		}
	})
}

// unsure reports whether the machine was paused, and goes on by what it had. In a schedule with agents of older versions
// it may do so until etcd has answered it, since those promise it to go on.
func (n *node) unsure() bool {
	if n.w.now < n.woken {
		return true
	}
	if !n.w.opt.versions || n.m == nil || n.pausedAt.IsZero() || !n.m.Bounded() {
		return false
	}
	l := n.m.Lease()
	return !l.Valid.IsZero() && !l.Confirmed.After(n.pausedAt)
}

// span is how much true time passes while the node's clock moves on by d.
func (n *node) span(d time.Duration) time.Duration { return time.Duration(float64(d) / (1 + n.drift)) }

// unspan is how far the node's clock moves on while the true time d passes.
func (n *node) unspan(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (1 + n.drift))
}

// after runs do when d has passed for the machine, whatever its processes do.
func (n *node) after(d time.Duration, do func()) {
	stood, losses := n.stood, n.losses
	var try func()
	try = func() {
		switch {
		case n.losses > losses: // it was to be in memory
		case n.stood > stood:
			d := n.stood - stood
			stood = n.stood
			n.w.after(d, try)
		case n.w.now < n.paused:
			n.w.after(n.paused-n.w.now, try)
		default:
			do()
		}
	}
	n.w.after(d, try)
}

// in runs do in d by the node's clock, in the process of now, when it is not frozen.
func (n *node) in(d time.Duration, do func()) {
	life := n.life
	var try func()
	try = func() {
		switch {
		case n.life != life:
		case n.w.now < n.frozen:
			n.after(n.frozen-n.w.now+n.w.between(0, time.Millisecond), try)
		default:
			do()
		}
	}
	n.after(n.span(d), try)
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
	if n.old || to.old {
		f.Message.Lease, f.Message.Seen = "", 0
	}
	n.w.words++
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

// slowDown has requests to etcd, and answers, take long, and maybe some lost.
func (n *node) slowDown(d time.Duration) {
	n.slow = n.w.now + d
	if n.w.chance(2) {
		n.lossy = n.slow
	}
	n.w.say("%s: its requests to etcd may take long for %v, or are lost: %t", n.name, d, n.lossy == n.slow)
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
	trip := func() (d time.Duration, lost bool) {
		d = w.between(200*time.Microsecond, 3*time.Millisecond)
		if w.now < n.slow && w.chance(3) {
			d, lost = w.between(0, 2*time.Second), w.now < n.lossy && w.chance(4)
		}
		return d, lost
	}
	life, sent := n.life, w.now
	d, lost := trip()
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
		if lost || !w.reaches(n.id, etcdEnd) || w.etcd.down {
			if d <= timeout {
				late()
			}
			return
		}
		do(w.etcd)
		back, lost := trip()
		if d <= timeout && d+back > timeout {
			late()
		}
		w.after(back, func() {
			if n.life != life {
				return
			}
			if !lost && w.reaches(etcdEnd, n.id) {
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
	if n.old {
		// As before there were suspicions: who is dead by the gossip is revoked.
		v.Suspicions, v.Agents = nil, maps.Clone(s.Agents)
		for name, a := range v.Agents {
			a.Suspectable = true
			v.Agents[name] = a
		}
	}
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
