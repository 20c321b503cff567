package cloud

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// mostOfACall is how many addresses one call is about: each takes up to three of the 120 operations of a transaction.
// Few interfaces of EC2 have more.
const mostOfACall = 40

// staleWait is how long a call waits whose transaction found something newer than the cache shows: the watch brings
// it within milliseconds.
const staleWait = 20 * time.Millisecond

var errStale = errors.New("etcd has changed meanwhile")

// controller is one leadership. One goroutine, that of run, owns it; calls are made beside it, and come back by done.
type controller struct {
	*replica
	lead *store.Leadership

	known    map[netip.Addr]*address
	asked    map[string]bool // interfaces that a call is under way about
	clock    uint64          // counts the beginnings and ends of calls
	reading  bool
	due      time.Time // when all is read anew
	doubt    int       // how many of pace.doubts are behind
	restores int       // of etcd, that known goes by
	pause    time.Time // nothing is asked of the cloud before
	wait     time.Duration

	done  chan func()
	calls sync.WaitGroup
}

// address is what is known of one, egress IP or node's.
type address struct {
	holder  string // as the cloud said last
	read    bool   // holder is that, and no call of unknown outcome was made since
	busy    bool   // a call about it is under way
	touched uint64 // clock, when a call about it began or ended last
	after   int64  // nothing is decided before the cache shows this revision

	owner int64 // the owner's revision that the following is about
	since time.Time
	retry time.Time // nothing is tried before
	wait  time.Duration
	err   string // what was said last
	again bool   // it was read, but before its owner claimed it
}

func newController(r *replica, lead *store.Leadership) *controller {
	return &controller{
		replica: r, lead: lead, known: map[netip.Addr]*address{}, asked: map[string]bool{}, done: make(chan func()),
	}
}

// run assigns until the leadership, or ctx, is over. Calls that are under way then are waited for: the next leader
// had better not see them done late.
func (c *controller) run(ctx context.Context) error {
	defer c.drain()
	ctx, stop := context.WithCancel(ctx)
	defer stop() // reads, which change nothing, end at once
	for {
		wake := time.NewTimer(time.Until(c.decide(ctx)))
		select {
		case <-ctx.Done():
			wake.Stop()
			return ctx.Err()
		case <-c.lead.Lost():
			wake.Stop()
			return store.ErrNotLeader
		case <-c.cache.Changed():
		case f := <-c.done:
			f()
		case <-wake.C:
		}
		wake.Stop()
	}
}

func (c *controller) drain() {
	ended := make(chan struct{})
	go func() { c.calls.Wait(); close(ended) }()
	for {
		select {
		case <-c.done:
		case <-ended:
			return
		}
	}
}

// beside runs f, which asks the cloud, and then what it returns in the goroutine of run.
func (c *controller) beside(ctx context.Context, f func(context.Context) func()) {
	c.calls.Go(func() {
		c.done <- f(context.WithoutCancel(ctx)) // a call that was made is waited for, whoever is told to stop
	})
}

// decide asks for what is to be asked for, and returns when to decide again at the latest.
func (c *controller) decide(ctx context.Context) (wake time.Time) {
	now, revision := time.Now(), c.cache.Revision() // before the records are read: they are of this one, or newer
	if n := c.cache.Restores(); n != c.restores {   // revisions are those of another etcd now
		c.restores = n
		for _, a := range c.known {
			a.after = 0
		}
	}
	s := readState(c.cache, c.known)
	wake = now.Add(c.CheckInterval)
	later := func(t time.Time) {
		if t.Before(wake) {
			wake = t
		}
	}
	if now.Before(c.pause) {
		later(c.pause)
		return wake
	}
	var steps []step
	count := map[string]int{assigned: 0, waiting: 0, failed: 0}
	for _, ip := range s.addresses() {
		state, next, again := c.look(s, ip, now, revision)
		if _, owned := s.owners[ip]; owned && s.allocated[ip] {
			count[state]++
		}
		if next != nil {
			steps = append(steps, *next)
		}
		if !again.IsZero() {
			later(again)
		}
	}
	c.metrics.states(count)
	for _, call := range calls(steps, mostOfACall) {
		if iface := call[0].iface; !c.asked[iface] {
			c.call(ctx, call, s, revision)
		}
	}
	c.read(ctx, s, now)
	if !c.reading {
		later(c.due)
	}
	return wake
}

// What is said of an address that has an owner.
const (
	assigned = "assigned"
	waiting  = "waiting"
	failed   = "failed"
)

// look returns how an address is, the step to be made for it, if any, and when to look again; zero: when something
// has changed.
func (c *controller) look(s state, ip netip.Addr, now time.Time, revision int64) (is string, next *step, again time.Time) {
	owner := s.owners[ip]
	a, node := c.at(ip), s.nodes[owner.Node]
	if a.owner != owner.Revision {
		a.owner, a.since, a.retry, a.wait, a.err, a.again = owner.Revision, now, time.Time{}, 0, "", a.read
	}
	is = waiting
	if a.err != "" {
		is = failed
	}
	if a.busy || a.after > revision {
		return is, nil, time.Time{}
	}
	if now.Before(a.retry) {
		return is, nil, a.retry
	}
	if !a.retry.IsZero() {
		if a.retry = (time.Time{}); a.err != "" { // something may have changed in the cloud
			c.doubtful(append([]netip.Addr{ip}, node.Addresses...)...)
		}
	}
	if !c.whole(ip, node) {
		return is, nil, time.Time{}
	}
	step, ok, err := s.next(ip)
	switch {
	case err != nil:
		c.fail(ip, owner.Node, err, now, c.pace.refused, c.pace.never)
		return failed, nil, a.retry
	case ok:
		a.again = false
		return is, &step, time.Time{}
	case a.again && owner.Node != "":
		// It is where it should be, as was read when the owner was another, or a node of the same name and address that
		// was replaced since: with another interface.
		a.again = false
		c.doubtful(append([]netip.Addr{ip}, node.Addresses...)...)
		return is, nil, time.Time{}
	}
	if a.err != "" {
		a.wait, a.err = 0, ""
		c.Log.Info("the cloud sends to the node", "egress_ip", ip, "node", owner.Node, "iface", a.holder)
	}
	return assigned, nil, time.Time{}
}

func (c *controller) at(ip netip.Addr) *address {
	if c.known[ip] == nil {
		c.known[ip] = &address{}
	}
	return c.known[ip]
}

// whole reports whether all that a decision about ip goes by was read.
func (c *controller) whole(ip netip.Addr, n egress.Node) bool {
	for _, ip := range append([]netip.Addr{ip}, n.Addresses...) {
		if !c.at(ip).read {
			return false
		}
	}
	return true
}

// doubtful has addresses read again, those that no call is under way about.
func (c *controller) doubtful(ips ...netip.Addr) {
	for _, ip := range ips {
		if a := c.at(ip); !a.busy {
			a.read = false
		}
	}
}

// read reads who has the addresses: all when that is due, else those that were not read. One read is under way at a
// time. What it says of addresses about which a call began or ended meanwhile is older than that, and not taken.
func (c *controller) read(ctx context.Context, s state, now time.Time) {
	if c.reading {
		return
	}
	all := s.toRead()
	whole := !now.Before(c.due)
	if whole {
		for ip := range c.known { // what nobody asks for any more
			if !all[ip] && !c.known[ip].busy {
				delete(c.known, ip)
			}
		}
	} else {
		for ip := range all {
			if a := c.at(ip); a.read || a.busy {
				delete(all, ip)
			}
		}
	}
	if len(all) == 0 {
		if whole {
			c.due = now.Add(c.CheckInterval)
		}
		return
	}
	c.reading = true
	began, ips := c.clock, sorted(all)
	c.beside(ctx, func(context.Context) func() {
		holders, err := c.Cloud.Holders(ctx, ips) // which has a time for each of its answers
		return func() {
			c.reading = false
			c.metrics.called("read", err)
			if err != nil {
				c.backOff(err)
				return
			}
			c.wait = 0
			for _, ip := range ips {
				if a := c.at(ip); !a.busy && a.touched <= began {
					a.holder, a.read = holders[ip], true
				}
			}
			if whole {
				c.due = time.Now().Add(c.CheckInterval)
				if c.doubt < len(c.pace.doubts) {
					c.due = time.Now().Add(min(c.pace.doubts[c.doubt], c.CheckInterval))
					c.doubt++
				}
			}
		}
	})
}

// backOff asks nothing for a while, since the cloud did not answer a read, or was asked too often.
func (c *controller) backOff(err error) {
	if c.wait == 0 {
		c.Log.Warn("the cloud does not answer, will retry", "err", err)
	}
	c.wait = min(max(2*c.wait, c.pace.first), c.pace.most)
	c.pause = time.Now().Add(jitter(c.wait))
}

// jitter spreads a wait by a half: others of the account were told to wait at the same time.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// call makes one call, after the transaction that allows it.
func (c *controller) call(ctx context.Context, call []step, s state, revision int64) {
	c.clock++
	for _, step := range call {
		a := c.at(step.ip)
		a.busy, a.touched = true, c.clock
	}
	iface := call[0].iface
	c.asked[iface] = true
	ops, err := s.ops(call, revision)
	c.beside(ctx, func(ctx context.Context) func() {
		// What the transaction allows is allowed for so long: who leads then may have decided otherwise.
		ctx, cancel := context.WithTimeout(ctx, c.pace.call)
		defer cancel()
		var at int64 // when a record was written: the cache comes to that revision
		errs := map[netip.Addr]error{}
		if err == nil {
			at, err = c.lead.CommitAt(ctx, ops...)
		}
		if !slices.ContainsFunc(ops, func(op store.Op) bool { return op.Still == 0 && !op.Exists }) {
			at = 0
		}
		switch {
		case errors.Is(err, store.ErrConflict):
			err = errStale
		case err != nil: // nothing was asked of the cloud
			err = fmt.Errorf("%w: %w", errNotAsked, err)
		default:
			c.request(ctx, call, errs)
		}
		return func() {
			delete(c.asked, iface)
			c.clock++
			for _, step := range call {
				c.ended(step, s.owners[step.ip].Node, at, errors.Join(err, errs[step.ip]))
			}
		}
	})
}

var errNotAsked = errors.New("etcd did not take what comes before")

// request asks the cloud for what a call is, until ctx or the leadership ends. Of several addresses it refuses all
// where it refuses one: so halves are tried, down to that one.
func (c *controller) request(ctx context.Context, call []step, errs map[netip.Addr]error) {
	first := call[0]
	var ips []netip.Addr
	for _, s := range call {
		ips = append(ips, s.ip)
	}
	var err error
	select {
	case <-c.lead.Lost():
		err = ErrNotSent
	case <-ctx.Done():
		err = ErrNotSent
	default:
	}
	switch {
	case err != nil:
	case first.verb == assign:
		err = c.Cloud.Assign(ctx, first.iface, ips, first.move)
	case first.verb == unassign:
		err = c.Cloud.Unassign(ctx, first.iface, ips)
	default:
		return
	}
	if errors.Is(err, ErrNotSent) {
		err = errStale // a new transaction has to allow it
	} else {
		c.metrics.called(string(first.verb), err)
	}
	if errors.Is(err, ErrAddressRefused) && len(call) > 1 {
		c.request(ctx, call[:len(call)/2], errs)
		c.request(ctx, call[len(call)/2:], errs)
		return
	}
	for _, ip := range ips {
		errs[ip] = err
	}
}

// ended takes in how a step went. at is the revision of its transaction.
func (c *controller) ended(s step, node string, at int64, err error) {
	a, now := c.at(s.ip), time.Now()
	a.busy, a.touched, a.after = false, c.clock, at
	switch {
	case err == nil:
		c.wait, a.retry, a.wait, a.err = 0, time.Time{}, 0, ""
		switch s.verb {
		case assign:
			a.holder = s.iface
			c.metrics.moved(now.Sub(a.since))
			c.Log.Info("assigned", "egress_ip", s.ip, "node", node, "iface", s.iface)
		case unassign:
			a.holder = ""
			c.Log.Info("unassigned", "egress_ip", s.ip, "iface", s.iface)
		}
	case errors.Is(err, errStale):
		a.retry = now.Add(staleWait)
	case errors.Is(err, ErrThrottled):
		if !now.Before(c.pause) { // one call has many addresses
			c.backOff(err)
		}
	case errors.Is(err, ErrRefused), errors.Is(err, errNotAsked):
		c.fail(s.ip, node, err, now, c.pace.refused, c.pace.never)
	default:
		// It may be done, or be done later: it is read now, and some times more.
		a.read, c.doubt = false, 0
		if soon := now.Add(c.pace.doubts[0]); soon.Before(c.due) {
			c.due = soon
		}
		c.fail(s.ip, node, err, now, c.pace.first, c.pace.most)
	}
}

// fail has the address wait, longer each time, and says why when that is not what was said last.
func (c *controller) fail(ip netip.Addr, node string, err error, now time.Time, first, most time.Duration) {
	a := c.at(ip)
	if text := err.Error(); a.err != text {
		a.err = text
		c.Log.Error("cannot have the cloud send to the node, will retry", "egress_ip", ip, "node", node, "err", err)
	}
	a.wait = min(max(2*a.wait, first), most)
	a.retry = now.Add(jitter(a.wait))
}
